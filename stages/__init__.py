"""One module a stage: files in, pure functions, files out."""

"""One module per stage: files in, pure functions, files out."""

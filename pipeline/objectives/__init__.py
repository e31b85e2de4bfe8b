"""The mathematics of the project as pure tensor functions: no configuration, no files, no devices."""

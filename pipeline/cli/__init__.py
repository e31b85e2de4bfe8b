"""The `xkd-pipeline` command."""

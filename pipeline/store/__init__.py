"""The teacher store: what a teacher said, in plain Parquet files that are named by their content."""

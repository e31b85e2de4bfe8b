"""The report: what the stages wrote, read from their files and drawn on one page."""

"""Curves that the stages wrote."""

import csv
from pathlib import Path

from pipeline.errors import in_one_line


def curve_of(path: Path) -> dict[str, list[float]]:
    """Columns of a curve's CSV file; empty where there is none. Raises UserError where they are not numbers."""
    if not path.is_file():
        return {}
    with in_one_line(f"{path} holds no curve"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())}

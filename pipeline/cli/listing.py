"""What a command lists, as a table for people, or as JSON or CSV for programs.

The rows are any objects; a column says how its value is read from one, and how that is shown. For programs numbers
are numbers: an interval is three of them (`KEY`, `KEY_low`, `KEY_high`), a size is in bytes, a time is ISO 8601, and
what is unknown is null (JSON) or empty (CSV).
"""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from pipeline import console
from pipeline.errors import UserError
from pipeline.streams import STDOUT


class Form(StrEnum):
    """How a listing is printed."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"

    @classmethod
    def of(cls, as_json: bool, as_csv: bool) -> "Form":
        """From the options --json and --csv. Raises UserError where both are given."""
        if as_json and as_csv:
            raise UserError("--json and --csv: give one of them")
        return cls.JSON if as_json else cls.CSV if as_csv else cls.TEXT


def shown(value: object) -> str:
    """A value in a table, unless its column has a `show` of its own."""
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) or "-" if isinstance(value, list | tuple) else str(value)


@dataclass(frozen=True)
class Column:
    """One column. `read` gives None where a row has no value."""

    key: str  # in JSON and CSV; "": only in the table
    read: Callable[[Any], Any]
    heading: str | None = ""  # in the table; "": the key, None: not in the table
    show: Callable[[Any], str] = shown
    interval: bool = False  # values are mappings of `value`, `low` and `high`

    def cell(self, row: object) -> str:
        value = self.read(row)
        return "-" if value is None else self.show(value)

    @property
    def keys(self) -> list[str]:
        """The keys of this column in JSON and CSV."""
        bounds = [f"{self.key}_low", f"{self.key}_high"] if self.interval else []
        return [self.key, *bounds] if self.key else []

    def values(self, row: object) -> list[Any]:
        """A row's values in JSON and CSV, in the order of `keys`."""
        value = self.read(row)
        if self.interval:
            return [plain((value or {}).get(name)) for name in ("value", "low", "high")]
        return [plain(value)]


@dataclass(frozen=True)
class Listing:
    """Rows and columns; the first `names` columns of the table say which row it is."""

    columns: Sequence[Column]
    rows: Sequence[Any]
    names: int = 1

    def records(self) -> list[dict[str, Any]]:
        """For JSON and CSV: one flat dictionary per row, all with the same keys."""
        columns = [column for column in self.columns if column.key]
        return [
            {key: value for column in columns for key, value in zip(column.keys, column.values(row), strict=True)}
            for row in self.rows
        ]

    def show(self, title: str) -> None:
        """Print the table."""
        columns = [column for column in self.columns if column.heading is not None]
        cells = [[column.cell(row) for column in columns] for row in self.rows]
        headings = [column.heading or column.key.replace("_", " ") for column in columns]
        console.table(title, headings, cells, self.names)

    def write(self, form: Form, name: str = "rows", beside: Mapping[str, Any] | None = None) -> None:
        """Print the records as JSON or CSV. beside: in JSON, further entries, with the records under the key `name`."""
        if form is Form.CSV:
            writer = csv.writer(STDOUT, lineterminator="\n")
            writer.writerow(key for column in self.columns for key in column.keys)
            writer.writerows(map(_csv_cell, record.values()) for record in self.records())
            return STDOUT.flush()
        content = self.records() if beside is None else {**beside, name: self.records()}
        is_unicode = (STDOUT.encoding or "").lower().startswith("utf")
        console.write(json.dumps(plain(content), indent=2, ensure_ascii=not is_unicode, allow_nan=False) + "\n")


def _csv_cell(value: Any) -> Any:
    """A value in one CSV cell; a list becomes its items with spaces between them."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.astimezone().isoformat(timespec="seconds")
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(each) for each in value]
    return value if isinstance(value, str | int | bool | None) else str(value)

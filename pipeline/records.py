"""Data sets as plain records: from a hub name, a `datasets` folder, or JSONL, CSV and Parquet files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, reason_of

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SLOT = re.compile(r"\{([^{}]+)\}")


def load_records(path: str, config: str = "") -> dict[str, Any]:
    """Split name -> `datasets.Dataset`. A single file is one split, `train`; no code of a data set is run.

    Raises UserError where nothing can be read from `path`.
    """
    import datasets

    datasets.disable_progress_bars()
    local = Path(path).expanduser()
    try:
        if local.is_file():
            if local.suffix not in _FORMATS:
                raise UserError(f"{path}: data sets are read from {', '.join(_FORMATS)} files and from folders")
            found = datasets.load_dataset(_FORMATS[local.suffix], data_files=str(local))
        elif local.is_dir() and ((local / "state.json").is_file() or (local / "dataset_dict.json").is_file()):
            found = datasets.load_from_disk(str(local))
        elif local.is_dir():  # a hub data set's configuration means nothing here
            found = datasets.load_dataset(str(local))
        elif local.exists():
            raise UserError(f"{path} is neither a file nor a folder: data sets are read from these")
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            found = datasets.load_dataset(path, config or None)
        else:
            raise UserError(f"no data set at {path}: not a file, not a folder, and not a hub name")
    except UserError:
        raise
    except Exception as error:  # readers of many formats, and the network
        cause = error.__cause__ or error
        where = "" if local.exists() else " (nothing of that name here, so it was looked for on the hub)"
        raise UserError(f"cannot read the data set {path}{where}: {reason_of(cause)}") from error
    return dict(found) if isinstance(found, Mapping) else {"train": found}


def value_at(record: Mapping[str, Any], column: str) -> Any:
    """The value of a column; `a.b` looks inside column a. Raises KeyError with the columns that are there."""
    value: Any = record
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise KeyError(f"no column '{column}'; found {known}")
        value = value[part]
    return value


def fill(template: str, record: Mapping[str, Any]) -> str:
    """`template` with every `{column}` replaced by the record's text; a list of texts is joined by spaces."""
    return _SLOT.sub(lambda slot: _text(value_at(record, slot[1])), template)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return "" if value is None else str(value)


def texts_at(record: Mapping[str, Any], column: str) -> list[str]:
    """The references in a column: a text, or a list of texts; empty ones are left out."""
    value = value_at(record, column)
    return [text for text in map(_text, value if isinstance(value, list) else [value]) if text.strip()]

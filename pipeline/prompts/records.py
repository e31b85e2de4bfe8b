"""Data sets as plain records: from a hub name, a `datasets` folder, or JSONL, CSV, Parquet and parallel text files."""

import gzip
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, in_one_line, reason_of, shown

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SLOT = re.compile(r"\{([^{}]+)\}")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_KINDS = {word: kind for kind, words in _WORDS.items() for word in words}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows of a split, read anew each time."""

    read: Callable[[], Iterator[Record]]

    def __iter__(self) -> Iterator[Record]:
        return self.read()


def load_records(path: str, config: str = "") -> dict[str, Any]:
    """Split name -> its rows. A single file is one split, `train`; no code of a data set is run.

    Raises UserError where nothing can be read from `path`.
    """
    import datasets

    datasets.disable_progress_bars()
    local = Path(path).expanduser()
    try:
        if local.is_file():
            form = _FORMATS.get(Path(local.name.removesuffix(".gz")).suffix)
            if form is None:
                raise UserError(f"{path}: data sets are read from {', '.join(_FORMATS)} files and from folders")
            splits = datasets.load_dataset(form, data_files=str(local))
        elif local.is_dir() and ((local / "state.json").is_file() or (local / "dataset_dict.json").is_file()):
            splits = datasets.load_from_disk(str(local))
        elif local.is_dir():  # `config` is for hub data sets only
            splits = _parallel(local) or _tables(local)
        elif local.exists():
            raise UserError(f"{path} is neither a file nor a folder: data sets are read from these")
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            splits = datasets.load_dataset(path, config or None)
        else:
            raise UserError(f"no data set at {path}: not a file, not a folder, and not a hub name")
    except UserError:
        raise
    except Exception as error:  # readers of many formats, and the network
        cause = error.__cause__ or error
        where = "" if local.exists() else " (no file or folder of that name, so it was looked up on the hub)"
        raise UserError(f"cannot read the data set {path}{where}: {reason_of(cause)}") from error
    return dict(splits) if isinstance(splits, Mapping) else {"train": splits}


def find_split(records: Mapping[str, Any], name: str) -> str | None:
    """The split of this name, or the only one with a name of the same meaning: `dev` or `val.tok` for `validation`.

    Raises UserError where several have one.
    """
    if name in records:
        return name
    kind = _KINDS.get(name)
    alike = [split for split in records if kind in map(_KINDS.get, re.split(r"[\W\d_]+", split.lower()))]
    if kind and len(alike) > 1:
        raise UserError(f"several splits may be the one for '{name}': set dataset.{kind}_split to {' or '.join(alike)}")
    return alike[0] if kind and alike else None


def _tables(folder: Path) -> dict[str, Rows]:
    """The files that `datasets` finds for each split, read one by one: their columns need not be the same."""
    import datasets

    builder = datasets.load_dataset_builder(str(folder))
    form = builder.__module__.rpartition(".")[2]  # json, csv, parquet, ...
    splits = {
        str(split): [datasets.load_dataset(form, data_files=[file], split="train") for file in files]
        for split, files in builder.config.data_files.items()
    }
    return {split: Rows(partial(chain.from_iterable, tables)) for split, tables in splits.items()}


def _parallel(folder: Path) -> dict[str, Rows]:
    """Text files that differ in their last suffix only (train.en and train.de, or train.en.gz), which is the column.

    Empty where there are none, or where the folder has files of another format.
    """
    splits: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        split, _, column = path.name.removesuffix(".gz").rpartition(".")
        if split and path.is_file():
            splits.setdefault(split, {}).setdefault(column, path)
    if any(f".{column}" in _FORMATS for files in splits.values() for column in files):
        return {}
    return {split: Rows(partial(_side_by_side, files)) for split, files in splits.items() if len(files) > 1}


def _side_by_side(files: Mapping[str, Path]) -> Iterator[Record]:
    columns = {column: _lines(path) for column, path in files.items()}
    lengths = {files[column]: len(lines) for column, lines in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{path} has {length:,}" for path, length in lengths.items())
        raise UserError(f"parallel files must have equally many lines, but {counts}")
    for texts in zip(*columns.values(), strict=True):
        yield dict(zip(columns, texts, strict=True))


def _lines(path: Path) -> list[str]:
    """The lines of a text file; only a line feed ends one, not the other line ends of Unicode."""
    opened = gzip.open if path.suffix == ".gz" else open
    with (
        in_one_line(f"{path} cannot be read as UTF-8 text"),
        opened(path, "rt", encoding="utf-8", newline="\n") as file,
    ):
        return [line.rstrip("\r\n") for line in file]


def value_at(record: Record, column: str) -> Any:
    """The value of a column; `a.b` looks inside column a. Raises LookupError that lists the columns."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise LookupError(f"no column '{column}'; found {_columns(value)}")
        value = value[part]
    return value


def _values_at(record: Record, columns: Sequence[str]) -> list[Any]:
    """The values of those columns that the record has. Raises LookupError where it has none of them."""
    values = []
    for column in columns:
        try:
            values.append(value_at(record, column))
        except LookupError:
            if len(columns) == 1:
                raise
    if not values:
        raise LookupError(f"none of the columns {', '.join(columns)}; found {_columns(record)}")
    return values


def _columns(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"


def fill(template: str, record: Record) -> str:
    """`template` with every `{column}` replaced by the record's text; a list of texts is joined by spaces.

    `{a|b}` is the first of these columns that the record has.
    """

    def text(slot: re.Match) -> str:
        values = _values_at(record, slot[1].split("|"))
        return _text(next((value for value in values if value is not None), None), slot[1])

    return _SLOT.sub(text, template)


def texts_at(record: Record, columns: Sequence[str]) -> list[str]:
    """The references in those columns that the record has, each a text or a list of texts; without empty ones."""
    lists = [value if isinstance(value, list) else [value] for value in _values_at(record, columns)]
    texts = [_text(value, ", ".join(columns)) for value in chain.from_iterable(lists)]
    return [text for text in texts if text.strip()]


def _text(value: Any, column: str) -> str:
    if isinstance(value, Mapping):
        raise LookupError(
            f"column '{column}' is not a text; inside it are {_columns(value)}: write COLUMN.NAME for one"
        )
    if isinstance(value, bytes):
        raise LookupError(f"column '{column}' is not a text: found {shown(value)}")
    if isinstance(value, list):
        return " ".join(_text(each, column) for each in value)
    return "" if value is None else str(value)

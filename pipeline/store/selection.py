"""The rows of one experiment: `manifest.json` and, unless they stay in the store, the rows themselves."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.files import cannot_read
from pipeline.store import schema
from pipeline.store.kept_mass import KeptMass
from pipeline.store.manifest import WRITE_AGAIN, listed_files, read_manifest
from pipeline.store.narrowing import narrowed
from pipeline.store.open_files import OpenFiles
from pipeline.store.requests import Location, RequestFolder, open_store, pick, pick_unsure
from pipeline.store.schema import KEPT, SCHEMA, SCHEMAS, SUPPORT, TOPK, Columns, Malformed, Row


@dataclass(frozen=True)
class Label:
    """What a selection says of a stored row, which may have been stored for another prompt file or purpose."""

    key: str
    prompt_id: str
    origin: str
    number: int | None  # among the prompt's rows of this origin; None: the row's own, which is in the key
    stop_token_ids: tuple[int, ...] | None  # None where the request holds them, or they are unknown

    def apply(self, row: Row, k: int, support: str | None) -> Row:
        """The row as the selection has it. Raises UserError where it cannot serve (see `narrowed`)."""
        sample = row.sample if self.number is None else self.number
        finish = row.finish if self.stop_token_ids is None else schema.finish_of(row.response_ids, self.stop_token_ids)
        labels = {"prompt_id": self.prompt_id, "origin": self.origin, "sample": sample, "finish": finish}
        return replace(narrowed(row, k, support), **labels)


def labels_of(part: dict) -> list[Label]:
    """The labels of a manifest's part, in canonical order."""
    sampled, stops = part["request"]["kind"] == "sample", part.get("stop_token_ids")
    stops = None if stops is None else tuple(stops)
    labels = []
    for prompt_id, keys in part["keys"].items():
        counts: Counter[str] = Counter()
        for key, origin in zip(keys, part["origins"][prompt_id], strict=True):
            own = sampled and origin == "teacher"
            labels.append(Label(key, prompt_id, origin, None if own else counts[origin], stops))
            counts[origin] += 1
    return labels


@dataclass
class Counted:
    """Counts of rows that passed: rows, response tokens, cut responses, mass of the kept tokens, and one digest."""

    rows: int = 0
    tokens: int = 0
    cut: int = 0
    kept: KeptMass = field(default_factory=KeptMass)
    content: Any = field(default_factory=hashlib.sha256)

    def through(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.rows += 1
            self.tokens += len(row.response_ids)
            self.cut += row.finish == "length"
            self.kept.add(row.topk_logprobs)
            self.content.update(schema.row_digest(row))
            yield row


def _checked(folder: Path) -> tuple[dict, OpenFiles]:
    """The manifest of a selection, and its files, each checked against the manifest."""
    while True:
        manifest = read_manifest(folder)
        files = OpenFiles("the selection was rewritten or removed while it was read. Run the same command again")
        wrong = [path for name, file in listed_files(manifest).items() if not _add(files, path := folder / name, file)]
        if not wrong:
            return manifest, files
        if read_manifest(folder)["sha256"] == manifest["sha256"]:  # else it was rewritten just now
            raise UserError(f"{wrong[0]} is missing or not what manifest.json says: {WRITE_AGAIN}")


def _add(files: OpenFiles, path: Path, file: dict) -> bool:
    try:
        return files.add(path, file["sha256"])
    except FileNotFoundError:
        return False
    except OSError as error:
        raise cannot_read(path, error) from error


class Selection:
    """A selection on disk, opened for reading: its rows stay the same, also when `folder` is rewritten."""

    def __init__(self, folder: Path, store: str | Path | None = None):
        """Raises UserError where the manifest is missing or a file does not match it.

        store: where rows that were not materialised are read from.
        """
        self.folder, self.store = Path(folder), store
        self.manifest, self.files = _checked(self.folder)
        self.teacher: dict = self.manifest["teacher"]
        self.parts: dict[str, dict] = self.manifest["parts"]
        self.k: int = self.manifest["k"]  # tokens per position
        self.support: str | None = self.manifest["support"]  # sampled or topk; None where the rows are text alone

    @property
    def fingerprint(self) -> str:
        """Digest of the selection that was opened, whatever is in `folder` by now."""
        return self.manifest["sha256"][:16]

    def require_teacher(self, what: str) -> None:
        """Raises UserError where the rows are text alone, without a teacher's log-probabilities."""
        if self.support is None:
            raise UserError(
                f"{self.folder} holds text only, no teacher's log-probabilities: {what} needs them. Use "
                "distill.objective=seqkd with distill.reward=none, or have a teacher score the responses "
                "(generate.engine other than text)"
            )

    def require_same_teacher(self, other: "Selection") -> None:
        """Raises UserError where the other selection is of another teacher."""
        if self.teacher["identity"] != other.teacher["identity"]:
            raise UserError(
                f"{self.folder} is of teacher {self.teacher['identity']}, but {other.folder} of teacher "
                f"{other.teacher['identity']}: {WRITE_AGAIN}, with the same teacher"
            )

    def part(self, name: str) -> dict:
        """The manifest's entry of a part."""
        if name not in self.parts:
            raise UserError(f"{self.folder} has no part '{name}'; it holds {', '.join(self.parts)}")
        return self.parts[name]

    def rows(self, name: str, topk: bool = True) -> Iterator[Row]:
        """All rows of a part in their canonical order; without `topk` they have no kept tokens."""
        part = self.part(name)
        if not self.manifest["materialized"]:
            for row in self._rows_in_store(name, *self.located(name)):
                yield row if topk else without_topk(row)
            return
        for file in part["files"]:
            yield from self.file_rows(file, () if topk else KEPT)

    def file_rows(self, file: dict, without: tuple[str, ...] = ()) -> Iterator[Row]:
        """The rows of one file that the manifest lists; `without`: columns that are left empty."""
        with self.files.reader(self.folder / file["name"]) as reader:
            for group in range(reader.num_row_groups):
                yield from read_group(reader, group, without)

    def located(self, name: str) -> tuple[RequestFolder, list["Label"], list[Location]]:
        """Where the rows of a part are in the store, in their canonical order, and their labels.

        Raises UserError where one is gone.
        """
        part = self.part(name)
        folder = RequestFolder(open_store(self.store), self.teacher["identity"], part["request_identity"])
        index, labels = folder.index(set_aside=False), labels_of(part)
        locations = [self._locate(index, label.key, folder) for label in labels]
        folder.hold({location.shard for location in locations})
        return folder, labels, locations

    def checked(self, name: str) -> tuple[RequestFolder, list["Label"], list[Location]]:
        """`located`, after comparing the rows there with those that this selection was made of.

        Raises UserError where they differ.
        """
        located = self.located(name)
        for _ in self._rows_in_store(name, *located):
            pass
        return located

    def _rows_in_store(
        self, name: str, folder: RequestFolder, labels: list["Label"], locations: list[Location]
    ) -> Iterator[Row]:
        counted, labelled = Counted(), zip(labels, folder.read_each(locations), strict=True)
        yield from counted.through(label.apply(row, self.k, self.support) for label, row in labelled)
        if counted.content.hexdigest() != self.part(name)["content"]:
            raise UserError(
                f"the store {folder} holds other rows than {self.folder} was made of: run `xkd-pipeline cache verify` "
                "to set damaged ones aside, then generate (or score) again"
            )

    def _locate(self, index: dict[str, list[Location]], key: str, folder: RequestFolder) -> Location:
        copies = index.get(key, [])
        location = pick(copies, self.k, self.support) or pick_unsure(copies, self.k, self.support)
        if location is None:
            damaged = "".join(f"; {name} there is damaged: {what}" for name, what in folder.damaged.items())
            raise UserError(
                f"row {key} of {self.folder} is no longer in the store {folder}: {WRITE_AGAIN}, with the same "
                f"--store{damaged}"
            )
        return location


def without_topk(row: Row) -> Row:
    """The row without its kept tokens, like a row that was read without the columns KEPT."""
    topk = {name: getattr(row, name)[:, :0] for name in TOPK}
    return replace(row, **topk, **dict.fromkeys(SUPPORT))


def read_group(reader: pq.ParquetFile, group: int, without: tuple[str, ...] = ()) -> Columns:
    """The rows of one row group of a selection's file; `without`: columns of TEXT and KEPT that are left empty."""
    stored = set(reader.schema_arrow.names)
    if absent := set(SCHEMAS[1].names) - stored:
        raise Malformed(f"it has no column {', '.join(sorted(absent))}")
    table = reader.read_row_group(group, columns=[name for name in SCHEMA.names if name in stored - set(without)])
    for name in set(SCHEMA.names) - set(table.column_names):
        type_, size = SCHEMA.field(name).type, len(table)
        empty = pa.array([[]] * size, type_) if name in TOPK else pa.nulls(size, type_)
        table = table.append_column(name, empty)
    return Columns(table.select(SCHEMA.names).cast(SCHEMA))

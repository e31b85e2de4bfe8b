"""The rows of one experiment: `manifest.json` and, unless they stay in the store, the rows rewritten canonically.

The bytes depend on nothing but the request, the samples and the teacher's provenance: prompt order, fixed file size, k
trimmed, no times, hosts or paths. So nothing reruns because of how or when rows got into the store.
"""

import hashlib
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import interrupts
from pipeline.errors import UserError
from pipeline.files import (
    cannot_read,
    locked,
    replace_file,
    sha256_file,
    sync,
    write_atomically,
    write_json_atomically,
    writing_to,
)  # fmt: skip
from pipeline.store import schema
from pipeline.store.identity import Request
from pipeline.store.kept_mass import KeptMass
from pipeline.store.manifest import (
    MANIFEST,
    WRITE_AGAIN,
    is_left_behind,
    is_staged,
    listed_files,
    read_manifest,
    rows_name,
    sealed,
)  # fmt: skip
from pipeline.store.narrowing import narrowed
from pipeline.store.open_files import OpenFiles
from pipeline.store.requests import Location, RequestFolder, open_store, pick, pick_unsure
from pipeline.store.schema import KEPT, SCHEMA, SCHEMAS, SUPPORT, TOPK, Columns, Malformed, Row

ROWS_PER_FILE = 4096


@dataclass
class Part:
    """Rows of one name (a split, or `scored`): prompt id -> keys and origins, and where each key is stored.

    stop_token_ids: of a score request, which does not hold them; they say whether a given response has ended.
    texts: prompt id -> the prompt as it was rendered for this selection; stored ones may differ in spaces.
    """

    folder: RequestFolder
    request: Request
    stop_token_ids: tuple[int, ...] | None = None
    keys: dict[str, list[str]] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    locations: dict[str, Location] = field(default_factory=dict)
    counted: "Counted | None" = None  # what was written

    def add(self, prompt_id: str, key: str, origin: str, location: Location, text: str | None = None) -> None:
        """Add a key that the prompt does not have yet. Without a text, rows keep the stored one."""
        if key not in self.keys.setdefault(prompt_id, []):
            self.keys[prompt_id].append(key)
            self.origins.setdefault(prompt_id, []).append(origin)
            self.locations[key] = location
        if text is not None:
            self.texts[prompt_id] = text

    def labelled(self, labels: Sequence["Label"], k: int, support: str | None, folder: Path) -> Iterator[Row]:
        """The stored rows as the selection labels them, with its own prompts' texts. folder: for temporary files."""
        stored = self.folder.read_each((self.locations[label.key] for label in labels), folder)
        for label, row in zip(labels, stored, strict=True):
            if fault := schema.value_fault(row):  # stored by an earlier version, which did not check
                raise UserError(
                    f"row {row.key} in {self.folder} cannot be used: {fault}. Run `xkd-pipeline cache verify`, which "
                    "sets its shard aside, and the same command again"
                )
            yield replace(label.apply(row, k, support), prompt=self.texts.get(label.prompt_id, row.prompt))

    @property
    def rows(self) -> int:
        return sum(map(len, self.keys.values()))

    def drawn(self) -> dict[str, int]:
        """Rows by the k with which their tokens were drawn; it decides which tokens a smaller k has."""
        stored = (self.locations[key] for keys in self.keys.values() for key in keys)
        widths = Counter(location.k for location in stored if location.support == "sampled")
        return {str(k): rows for k, rows in sorted(widths.items())}

    def describe(self) -> dict:
        """The manifest's entry, without files and counts of tokens."""
        stops = {} if self.stop_token_ids is None else {"stop_token_ids": list(self.stop_token_ids)}
        return stops | {
            "request": self.request.describe(), "request_identity": self.request.identity,
            "prompts": len(self.keys), "rows": self.rows, "keys": self.keys, "origins": self.origins,
        }  # fmt: skip


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


def write_selection(
    out: Path,
    parts: dict[str, Part],
    teacher: dict,
    k: int,
    skipped: int,
    materialize: bool,
    student: str | None = None,
    support: str | None = "topk",
) -> dict:
    """Write `out` and return the manifest; an earlier selection there is replaced once the new one is whole.

    Other files in `out` stay. student: fingerprint of the model that rows of origin `student` are samples of. support:
    of all rows; None for text alone.
    """
    manifest: dict[str, Any] = {
        "schema_version": schema.SCHEMA_VERSION, "teacher": teacher, "k": k, "support": support,
        "materialized": materialize, "skipped": skipped, "parts": {},
    } | ({} if student is None else {"student": student})  # fmt: skip

    def fill(staged: Path) -> None:
        for name, part in parts.items():
            footing = schema.footer(teacher, part.request.describe(), k, support)
            manifest["parts"][name] = _write_part(staged, name, part, footing, materialize)

    _replace(out, manifest, fill)
    return manifest


def join_selections(out: Path, folders: Sequence[Path]) -> dict:
    """Write `out` with the parts of several materialised selections of one teacher, and return the manifest.

    Their parts have different names. An earlier selection in `out` is replaced as `write_selection` does.
    """
    selections = list(map(Selection, folders))
    for other in selections[1:]:
        other.require_same_teacher(selections[0])
    manifest = {name: value for name, value in selections[0].manifest.items() if name != "sha256"}
    manifest["skipped"] = sum(each.manifest["skipped"] for each in selections)
    manifest["parts"] = {name: part for each in selections for name, part in each.parts.items()}

    def fill(staged: Path) -> None:
        for each in selections:
            for name in listed_files(each.manifest):
                shutil.copyfile(each.folder / name, staged / name)
                sync(staged / name)

    _replace(out, manifest, fill)
    return manifest


def _replace(out: Path, manifest: dict, fill: Callable[[Path], None]) -> None:
    """Make what `fill` writes into a folder, and the manifest as it is then, the selection in `out`."""
    with writing_to(out), locked(out):  # two runs with one `out` write one after the other
        _remove(path for path in out.iterdir() if is_staged(path))  # first, since it takes the room of a selection
        staged = out / f".tmp-{uuid.uuid4().hex}"
        try:
            with writing_to(staged):
                fill(staged)
                write_json_atomically(staged / MANIFEST, sealed(manifest))
                with interrupts.deferred():
                    _swap(staged, out, listed_files(manifest))
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _swap(staged: Path, out: Path, files: Collection[str]) -> None:
    """Make the selection in `staged` the one in `out`: at every moment `out` has one that is whole.

    New files lie beside the earlier ones until the manifest is replaced; only then the earlier ones are removed.
    """
    new = {file for file in files if not os.path.lexists(out / file)}
    try:
        for file in files:
            replace_file(staged / file, out / file)
        sync(out)
        replace_file(staged / MANIFEST, out / MANIFEST)
        sync(out)
    except BaseException:
        with suppress(OSError):
            _remove(out / file for file in new - _listed(out))
        raise
    _remove(path for path in out.iterdir() if path.name not in {MANIFEST, *files} and is_left_behind(path))


def _listed(out: Path) -> set[str]:
    """Files of the selection in `out`; none where it has no readable one."""
    try:
        return set(listed_files(read_manifest(out)))
    except UserError:
        return set()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write_part(out: Path, name: str, part: Part, footing: dict, materialize: bool) -> dict:
    """Write a part's files, if they are to be materialized, and return its manifest entry. footing: their footer."""
    described = part.describe()
    if footing["k"] and (drawn := part.drawn()):
        described["drawn"] = drawn
    labels, files = labels_of(described), []
    counted = part.counted = Counted()
    rows = counted.through(part.labelled(labels, footing["k"], footing["support"], out))
    if materialize:
        for number, start in enumerate(range(0, len(labels), ROWS_PER_FILE)):
            groups = schema.row_groups(islice(rows, ROWS_PER_FILE))
            path = write_atomically(
                out,
                lambda temporary, groups=groups: schema.write_row_groups(temporary, groups, footing),
                lambda temporary, number=number: rows_name(name, number, sha256_file(temporary)),
            )
            count = min(ROWS_PER_FILE, len(labels) - start)
            files.append({"name": path.name, "rows": count, "sha256": sha256_file(path)})
        return described | {"tokens": counted.tokens, "files": files}
    for _ in rows:
        pass
    return described | {"tokens": counted.tokens, "files": [], "content": counted.content.hexdigest()}


def groups_of(rows: Sequence[Row]) -> np.ndarray:
    """The row group that each row of a part has in the files of a materialised selection, int [N]."""
    files = (rows[start : start + ROWS_PER_FILE] for start in range(0, len(rows), ROWS_PER_FILE))
    sizes = [len(group) for file in files for group in schema.row_groups(file)]
    return np.repeat(np.arange(len(sizes)), sizes)


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

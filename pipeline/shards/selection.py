"""The rows of one experiment: `manifest.json` and, unless they stay in the store, the rows rewritten canonically.

The bytes depend on the request, the samples and the teacher's provenance alone: prompt order, fixed file size, k
trimmed, no times, hosts or paths. So nothing reruns because of how or when rows got into the store.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.shards.files import sha256_file, write_atomically, write_json_atomically, writing_to
from pipeline.shards.identity import Request
from pipeline.shards.schema import SCHEMA, SCHEMA_VERSION, Row, footer, from_table, row_digest, write_shard
from pipeline.shards.store import Location, RequestFolder, pick, store_root

ROWS_PER_FILE = 4096
_ROWS_AT_ONCE = 512
_FILE = re.compile(r"(train|validation|scored|references|negatives|samples)-\d{5}\.parquet")


@dataclass
class Part:
    """Rows of one name (a split, or `scored`): prompt id -> keys and origins, and where each key is stored."""

    folder: RequestFolder
    request: Request
    keys: dict[str, list[str]] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)
    locations: dict[str, Location] = field(default_factory=dict)

    def add(self, prompt_id: str, key: str, origin: str, location: Location) -> None:
        """A key that the prompt already has is not added again."""
        if key not in self.keys.setdefault(prompt_id, []):
            self.keys[prompt_id].append(key)
            self.origins.setdefault(prompt_id, []).append(origin)
            self.locations[key] = location

    @property
    def rows(self) -> int:
        return sum(map(len, self.keys.values()))

    def describe(self) -> dict:
        """The manifest's entry, files and counts of tokens apart."""
        return {
            "request": self.request.describe(),
            "request_identity": self.request.identity,
            "prompts": len(self.keys),
            "rows": self.rows,
            "keys": self.keys,
            "origins": self.origins,
        }


@dataclass(frozen=True)
class _Label:
    """What a selection says of a stored row. The store may have got the row for another prompt file or purpose."""

    key: str
    prompt_id: str
    origin: str
    number: int  # among the prompt's rows of this origin

    def apply(self, row: Row, k: int) -> Row:
        sample = row.sample if self.origin == "teacher" else self.number
        return replace(row.trimmed(k), prompt_id=self.prompt_id, origin=self.origin, sample=sample)


def _labels(part: dict) -> list[_Label]:
    return [
        _Label(key, prompt_id, origin, origins[:place].count(origin))
        for prompt_id, keys in part["keys"].items()
        for origins in [part["origins"][prompt_id]]
        for place, (key, origin) in enumerate(zip(keys, origins, strict=True))
    ]


def write_selection(
    out: Path,
    parts: dict[str, Part],
    teacher: dict,
    k: int,
    skipped: int,
    materialize: bool,
    student: str | None = None,
) -> dict:
    """Write `out` (files of an earlier selection are removed, no others) and return the manifest.

    student: fingerprint of the model that rows of origin `student` are samples of.
    """
    with writing_to(out):
        for stale in out.iterdir():
            if stale.name == "manifest.json" or _FILE.fullmatch(stale.name):
                stale.unlink()
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "teacher": teacher,
        "k": k,
        "materialized": materialize,
        "skipped": skipped,
        "parts": {},
    } | ({} if student is None else {"student": student})
    for name, part in parts.items():
        described = part.describe()
        labels, tokens, files, content = _labels(described), 0, [], hashlib.sha256()
        for number, start in enumerate(range(0, len(labels), ROWS_PER_FILE)):
            some = labels[start : start + ROWS_PER_FILE]
            stored = part.folder.read(part.locations[label.key] for label in some)
            rows = [label.apply(row, k) for label, row in zip(some, stored, strict=True)]
            tokens += sum(len(row.response_ids) for row in rows)
            if materialize:
                footing = footer(teacher, part.request.describe(), k)
                path = write_atomically(
                    out, partial(write_shard, rows=rows, metadata=footing), f"{name}-{number:05d}.parquet"
                )
                files.append({"name": path.name, "rows": len(rows), "sha256": sha256_file(path)})
            else:
                for row in rows:
                    content.update(row_digest(row))
        manifest["parts"][name] = described | {"tokens": tokens, "files": files}
        if not materialize:
            manifest["parts"][name]["content"] = content.hexdigest()
    write_json_atomically(out / "manifest.json", manifest)
    return manifest


class Selection:
    """A selection on disk, opened for reading."""

    def __init__(self, folder: Path, store: Path | None = None):
        """Raises UserError where the manifest is missing or a file does not match it.

        `store` is where rows are read from that were not materialised.
        """
        self.folder, self.store = Path(folder), store
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"no cached teacher at {folder}: run `xkd-pipeline generate` (or `dvc repro generate`) first"
            )
        self.manifest = json.loads(path.read_text(encoding="utf-8"))
        self.teacher: dict = self.manifest["teacher"]
        self.parts: dict[str, dict] = self.manifest["parts"]
        for part in self.parts.values():
            for file in part["files"]:
                self._verify(file)

    def _verify(self, file: dict) -> None:
        path = self.folder / file["name"]
        if not path.is_file() or sha256_file(path) != file["sha256"]:
            raise UserError(f"{path} is missing or not what manifest.json says: run `xkd-pipeline generate` again")

    def require_teacher(self, what: str) -> None:
        """Raises UserError where the rows are text alone, without a teacher's log-probabilities."""
        if self.manifest["k"] == 0:
            raise UserError(
                f"{self.folder} holds text only, no teacher's log-probabilities: {what} needs them. Use "
                "distill.objective=seqkd with distill.reward=none, or have a teacher score the responses "
                "(generate.engine other than text)"
            )

    def require_same_teacher(self, other: "Selection") -> None:
        """Raises UserError where another teacher spoke there."""
        if self.teacher["identity"] != other.teacher["identity"]:
            raise UserError(
                f"{self.folder} is of teacher {self.teacher['identity']}, {other.folder} of teacher "
                f"{other.teacher['identity']}: run `xkd-pipeline score` again, with the same teacher and store"
            )

    def part(self, name: str) -> dict:
        """The manifest's entry of `train`, `validation` or `scored`."""
        if name not in self.parts:
            raise UserError(f"{self.folder} has no part '{name}'; it holds {', '.join(self.parts)}")
        return self.parts[name]

    def rows(self, name: str) -> Iterator[Row]:
        """All rows of a part in their canonical order."""
        part = self.part(name)
        if self.manifest["materialized"]:
            for file in part["files"]:
                for batch in pq.ParquetFile(self.folder / file["name"]).iter_batches(_ROWS_AT_ONCE):
                    yield from from_table(pa.Table.from_batches([batch]).cast(SCHEMA))
        else:
            yield from self._rows_in_store(part)

    def _rows_in_store(self, part: dict) -> Iterator[Row]:
        folder = RequestFolder(store_root(self.store), self.teacher["identity"], part["request_identity"])
        index, k, content = folder.index(), self.manifest["k"], hashlib.sha256()
        labels = _labels(part)
        for start in range(0, len(labels), _ROWS_AT_ONCE):
            some = labels[start : start + _ROWS_AT_ONCE]
            stored = folder.read([self._locate(index, label.key, k, folder) for label in some])
            for label, row in zip(some, stored, strict=True):
                labelled = label.apply(row, k)
                content.update(row_digest(labelled))
                yield labelled
        if content.hexdigest() != part["content"]:
            raise UserError(
                f"the store {folder.path} holds other rows than {self.folder} was made of: run generate again"
            )

    def _locate(self, index: dict[str, list[Location]], key: str, k: int, folder: RequestFolder) -> Location:
        location = pick(index.get(key, []), k)
        if location is None:
            raise UserError(
                f"row {key} of {self.folder} is no longer in the store {folder.path}: run `xkd-pipeline generate` "
                "again, with the same --store"
            )
        return location

"""The rows of one experiment: `manifest.json` and, unless they stay in the store, the rows rewritten canonically.

The bytes depend on the request and the samples alone: prompt order, fixed file size, k trimmed, no times, hosts or
paths. So DVC sees a change exactly when the teacher's words change.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.shards.files import sha256_file, write_json_atomically
from pipeline.shards.identity import Request
from pipeline.shards.schema import SCHEMA, SCHEMA_VERSION, Row, footer, from_table, write_shard
from pipeline.shards.store import Location, RequestFolder, pick, store_root

ROWS_PER_FILE = 4096
_ROWS_AT_ONCE = 512


@dataclass
class Part:
    """Rows of one name (a split, or `scored`): prompt id -> keys, and where each key is stored."""

    folder: RequestFolder
    request: Request
    keys: "OrderedDict[str, list[str]]" = field(default_factory=OrderedDict)
    locations: dict[str, Location] = field(default_factory=dict)

    def add(self, prompt_id: str, key: str, location: Location) -> None:
        self.keys.setdefault(prompt_id, []).append(key)
        self.locations[key] = location

    def ordered(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]

    def rows(self, keys: Sequence[str], k: int) -> list[Row]:
        return [row.trimmed(k) for row in self.folder.read(self.locations[key] for key in keys)]


def write_selection(out: Path, parts: dict[str, Part], teacher: dict, k: int, skipped: int, materialize: bool) -> dict:
    """Write `out` (files of an earlier selection are removed) and return the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in [*out.glob("*.parquet"), out / "manifest.json"]:
        stale.unlink(missing_ok=True)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "teacher": teacher,
        "k": k,
        "materialized": materialize,
        "skipped": skipped,
        "parts": {},
    }
    for name, part in parts.items():
        keys = part.ordered()
        described = {
            "request": part.request.describe(),
            "request_identity": part.request.identity,
            "prompts": len(part.keys),
            "rows": len(keys),
            "keys": dict(part.keys),
        }
        if materialize:
            tokens, files = _write_files(out, name, part, keys, k, manifest)
        else:
            rows = part.folder.read(part.locations[key] for key in keys)
            tokens, files = sum(len(row.response_ids) for row in rows), []
            described["shards"] = sorted({part.locations[key].shard.name for key in keys})
        manifest["parts"][name] = described | {"tokens": tokens, "files": files}
    write_json_atomically(out / "manifest.json", manifest)
    return manifest


def _write_files(out: Path, name: str, part: Part, keys: list[str], k: int, manifest: dict) -> tuple[int, list[dict]]:
    tokens, files = 0, []
    for number, start in enumerate(range(0, len(keys), ROWS_PER_FILE)):
        rows = part.rows(keys[start : start + ROWS_PER_FILE], k)
        path = out / f"{name}-{number:05d}.parquet"
        write_shard(path, rows, footer(manifest["teacher"], part.request.describe(), k))
        tokens += sum(len(row.response_ids) for row in rows)
        files.append({"name": path.name, "rows": len(rows), "sha256": sha256_file(path)})
    return tokens, files


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
        index, k = folder.index(), self.manifest["k"]
        keys = [key for keys in part["keys"].values() for key in keys]
        for start in range(0, len(keys), ROWS_PER_FILE):
            locations = [self._locate(index, key, k, folder) for key in keys[start : start + ROWS_PER_FILE]]
            yield from (row.trimmed(k) for row in folder.read(locations))

    def _locate(self, index: dict[str, list[Location]], key: str, k: int, folder: RequestFolder) -> Location:
        location = pick(index.get(key, []), k)
        if location is None:
            raise UserError(
                f"row {key} of {self.folder} is no longer in the store {folder.path}: run `xkd-pipeline generate` "
                "again, with the same --store"
            )
        return location

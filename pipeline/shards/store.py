"""The store on disk: `<store>/<teacher>/<request>/part-<first 16 hex digits of the file's sha256>.parquet`.

A name that is its content's digest makes damage visible and collisions of writers impossible. Nothing is ever changed
in place: shards are added whole, and a damaged one is moved aside.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from platformdirs import user_cache_path

from pipeline.shards.files import canonical_json, sha256_file, write_atomically, write_json_atomically, writing_to
from pipeline.shards.schema import SCHEMA, Row, from_table, read_metadata, write_shard

_SHARD = re.compile(r"part-([0-9a-f]{16})\.parquet")


def store_root(option: Path | None = None) -> Path:
    """`--store`, else the environment's XKD_STORE, else the user's cache directory."""
    return Path(option or os.environ.get("XKD_STORE") or user_cache_path("xkd-pipeline") / "store")


@dataclass(frozen=True)
class Location:
    """Where a row is."""

    shard: Path
    row: int
    k: int


def pick(locations: Sequence[Location], k: int) -> Location | None:
    """The stored copy to use where `k` tokens a position are wanted: the first with enough, or None."""
    return next((location for location in locations if location.k >= k), None)


class RequestFolder:
    """All that one teacher answered to one request."""

    def __init__(self, root: Path, teacher: str, request: str):
        """`teacher` and `request` are identities."""
        self.path = Path(root) / teacher / request
        self.damaged: list[str] = []
        self._skipped_path = self.path / "skipped.jsonl"

    def index(self, set_aside: bool = True) -> dict[str, list[Location]]:
        """Every stored row by key, after checking each shard's bytes against its name.

        A damaged shard is named in `self.damaged`, left out and, with `set_aside`, moved to `damaged/`. Where a key
        is stored more than once (at several k, or by two writers at once) its locations come in a fixed order: k,
        then shard name.
        """
        rows: dict[str, list[Location]] = {}
        for shard in sorted(self.path.glob("part-*.parquet")):
            problem = _fault(shard)
            if problem is not None:
                self.damaged.append(f"{shard}: {problem}")
                if set_aside:
                    self._set_aside(shard)
                continue
            k = read_metadata(shard)["k"]
            for number, key in enumerate(pq.read_table(shard, columns=["key"]).column(0).to_pylist()):
                rows.setdefault(key, []).append(Location(shard, number, k))
        for locations in rows.values():
            locations.sort(key=lambda location: (location.k, location.shard.name))
        return rows

    def _set_aside(self, shard: Path) -> None:
        aside = shard.parent / "damaged"
        try:
            aside.mkdir(exist_ok=True)
            shard.replace(aside / shard.name)
        except OSError as error:
            self.damaged[-1] += f" (left in place: {error.strerror})"

    def add(self, rows: Sequence[Row], footer: dict) -> Path:
        """Write one shard; all rows have the same k. `footer` is `schema.footer(...)`."""
        return write_atomically(
            self.path,
            lambda temporary: write_shard(temporary, rows, footer),
            lambda temporary: f"part-{sha256_file(temporary)[:16]}.parquet",
        )

    def describe(self, teacher: dict, request: dict) -> None:
        """Make the folder self-describing: teacher.json above it, request.json in it."""
        for path, value in ((self.path.parent / "teacher.json", teacher), (self.path / "request.json", request)):
            if not path.exists():
                write_json_atomically(path, value)

    def read(self, locations: Iterable[Location]) -> list[Row]:
        """The rows at `locations`, in their order; each shard is decoded once."""
        locations = list(locations)
        by_shard: dict[Path, list[int]] = {}
        for number, location in enumerate(locations):
            by_shard.setdefault(location.shard, []).append(number)
        rows: dict[int, Row] = {}
        for shard, numbers in by_shard.items():
            table = pq.read_table(shard, schema=SCHEMA).take([locations[number].row for number in numbers])
            rows.update(zip(numbers, from_table(table), strict=True))
        return [rows[number] for number in range(len(locations))]

    def skipped(self) -> dict[str, dict]:
        """Rows that could not be made, by key: {key, prompt_id, reason}. A torn last line is ignored."""
        found = {}
        if self._skipped_path.exists():
            for line in self._skipped_path.read_text(encoding="utf-8").split("\n"):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                found[entry["key"]] = entry
        return found

    def skip(self, entry: dict) -> None:
        """Append one entry to skipped.jsonl, durably."""
        with writing_to(self.path), self._skipped_path.open("a+b") as file:
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * torn + canonical_json(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _fault(shard: Path) -> str | None:
    """What is wrong with a shard, or None."""
    name = _SHARD.fullmatch(shard.name)
    if name is None:
        return "not a shard's name"
    if not sha256_file(shard).startswith(name[1]):
        return "its content does not match its name"
    try:
        read_metadata(shard)
    except (ValueError, pa.ArrowException) as error:
        return str(error)
    return None

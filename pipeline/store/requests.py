"""The store: `<store>/<teacher>/<request>/part-<first 16 hex digits of the file's sha256>.parquet`.

A name that is its content's digest makes damage visible and collisions of writers impossible. Nothing is ever changed
in place: shards are added whole, and a damaged one is moved to `damaged/`.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from platformdirs import user_cache_path

from pipeline.errors import UserError
from pipeline.files import canonical_json, digest, sha256_file, write_atomically, writing_to
from pipeline.store.checks import SHARD, UNREADABLE, Damaged, Header, check_shard, text_of
from pipeline.store.open_files import OpenFiles
from pipeline.store.ordering import Group, in_order
from pipeline.store.schema import Row, from_table, group_ends, read_metadata, write_shard
from pipeline.store.storage import Storage

SKIPPED = "skipped.jsonl"


def open_store(where: str | Path | None = None) -> Storage:
    """The files at `--store`, else at the environment's XKD_STORE, else in the user's cache directory.

    Raises UserError where there is a file.
    """
    storage = Storage(where or os.environ.get("XKD_STORE") or user_cache_path("xkd-pipeline") / "store")
    if not storage.remote and storage.path.exists() and not storage.path.is_dir():
        raise UserError(f"the store {storage.name} is a file: move it away, or name another --store")
    return storage


@dataclass(frozen=True, slots=True)
class Location:
    """Where a row is."""

    shard: Path
    row: int
    k: int
    support: str | None  # sampled or topk; None: text alone


def pick(locations: Sequence[Location], k: int, support: str | None) -> Location | None:
    """The stored copy to read k tokens per position from: the first of the support with as many, or None.

    For k = 0 any copy serves.
    """
    return next((each for each in locations if each.k >= k and (k == 0 or each.support == support)), None)


def pick_unsure(locations: Sequence[Location], k: int, support: str | None) -> Location | None:
    """Where `pick` finds no top k: the widest sampled copy, which may hold one (see `narrowing.holds_top`)."""
    sampled = [each for each in locations if each.support == "sampled" and each.k >= k]
    return sampled[-1] if support == "topk" and sampled else None


class RequestFolder:
    """All answers of one teacher to one request."""

    def __init__(self, store: Storage | str | Path, teacher: str, request: str):
        """`teacher` and `request` are identities."""
        self.storage = store if isinstance(store, Storage) else Storage(store)
        self.teacher, self.request = teacher, request
        self.name = f"{teacher}/{request}"
        self.path = self.storage.path / self.name
        self.damaged: dict[str, str] = {}  # shard -> what is wrong with it
        self._passed: dict[Path, Header] = {}
        self.files = OpenFiles(f"it was removed from the store {self} while it was read. Run the same command again")

    def __str__(self) -> str:
        return f"{self.storage.name}/{self.name}"

    def index(self, set_aside: bool = True) -> dict[str, list[Location]]:
        """Every stored row by key; each shard's bytes are checked against its name the first time.

        A damaged shard is named in `self.damaged`, left out and, with `set_aside`, moved to `damaged/`. Where a key
        is stored more than once (at several k, or by two writers at once) its locations come in a fixed order: k,
        then support, then shard name.
        """
        rows: dict[str, list[Location]] = {}
        for shard in self._shards(set_aside):
            header = self._passed.get(shard) or self._check(shard, set_aside)
            if header is not None:
                self._passed[shard] = header
                for number, key in enumerate(header.keys):
                    rows.setdefault(key, []).append(Location(shard, number, header.k, header.support))
        for locations in rows.values():
            locations.sort(key=lambda each: (each.k, each.support != "topk", each.shard.name))
        return rows

    def headers(self) -> list[dict]:
        """The footers of the shards that passed a check, by shard name; call after `index`."""
        return [read_metadata(shard) for shard in sorted(self._passed)]

    def _shards(self, write: bool) -> list[Path]:
        """The shards on this machine, after fetching those that only the remote has."""
        if not self.storage.remote:
            return sorted(self.path.glob("part-*.parquet"))
        if write:
            self.storage.push(self.name)
        stored = {}  # without what only the mirror has: others may have removed it from the store
        for name in self.storage.find(self.name):
            folder, _, last = name.rpartition("/")
            if folder == self.name and SHARD.fullmatch(last):
                stored[last] = self.path / last
                if not stored[last].exists():
                    self.storage.fetch(name, stored[last])
        waiting = {path.name: path for path in (self.path / "outbox").glob("part-*.parquet")}
        return [path for _, path in sorted((waiting | stored).items())]

    def _check(self, shard: Path, set_aside: bool) -> Header | None:
        try:
            return check_shard(shard, self.teacher, self.request)
        except Damaged as error:
            if self.storage.remote:  # only the mirror's copy may be damaged
                with suppress(FileNotFoundError, Damaged):
                    self.storage.fetch(f"{self.name}/{shard.name}", shard)
                    return check_shard(shard, self.teacher, self.request)
            elif not os.path.lexists(shard):
                return None  # removed, or set aside by another process, since it was listed
            self.damaged[shard.name] = str(error)
        if set_aside:
            try:
                self.set_aside(shard.name)
            except (OSError, UserError) as error:
                self.damaged[shard.name] += f" (left in place: {getattr(error, 'strerror', None) or error})"
        return None

    def set_aside(self, name: str) -> None:
        """Move a file of this folder to `damaged/`, where nothing reads it."""
        self._passed.pop(self.path / name, None)
        with suppress(FileNotFoundError):
            self.storage.move(f"{self.name}/{name}", f"{self.name}/damaged/{name}")
        if self.storage.remote:
            (self.path / name).unlink(missing_ok=True)

    def add(self, rows: Sequence[Row], footer: dict) -> Path:
        """Write one shard; all rows have the same k and support. `footer` is `schema.footer(...)`."""
        written = write_atomically(
            self.storage.outbox(self.name),
            lambda temporary: write_shard(temporary, rows, footer),
            lambda temporary: f"part-{sha256_file(temporary)[:16]}.parquet",
        )
        self.storage.push(self.name)
        return self.path / written.name

    def describe(self, teacher: dict, request: dict) -> None:
        """Make the folder self-describing: teacher.json above it, request.json in it."""
        files = {f"{self.teacher}/teacher.json": teacher, f"{self.name}/request.json": request}
        for name, value in files.items():
            if not describes(name, self.storage.read_text(name)):
                self.storage.write_json(name, value)

    def hold(self, shards: Iterable[Path]) -> None:
        """Keep shards that passed a check open, so that they can be read even when somebody removes them.

        Raises UserError where one is gone already.
        """
        for shard in sorted(shards):
            try:
                self.files.add(shard, shard.stem.removeprefix("part-"), check=False)
            except OSError as error:
                raise _unreadable(shard, error) from error

    def read(self, locations: Iterable[Location]) -> list[Row]:
        """The rows at `locations`, in their order; only the row groups that hold them are decoded, each once.

        Raises UserError where a shard that was there is no longer readable.
        """
        locations = list(locations)
        rows: list[Row | None] = [None] * len(locations)
        for group in self._groups(locations):
            for place, row in zip(group.places, group.rows, strict=True):
                rows[place] = row
        return rows

    def read_each(self, locations: Iterable[Location], folder: Path | None = None) -> Iterator[Row]:
        """The rows at `locations`, one after the other, in bounded memory; each row group is decoded once.

        folder: for a temporary file, where the order needs one. Raises UserError as `read`.
        """
        return in_order(self._groups(list(locations)), folder)

    def _groups(self, locations: Sequence[Location]) -> Iterator[Group]:
        """The rows at `locations` by row group, in the order in which those are first needed."""
        for places, shard, number, rows in sorted(self.row_groups(locations), key=lambda group: group[0][0]):
            with self.reading(shard) as file:
                table = file.read_row_group(number).take(rows)
                group = Group(places.tolist(), from_table(table), table.nbytes)
            yield group

    def row_groups(self, locations: Sequence[Location]) -> Iterator[tuple[np.ndarray, Path, int, np.ndarray]]:
        """Each row group that holds some of `locations`: their places there, its shard and number, their rows in it."""
        by_shard: dict[Path, list[int]] = {}
        for place, location in enumerate(locations):
            by_shard.setdefault(location.shard, []).append(place)
        for shard, places in by_shard.items():
            with self.reading(shard) as file:
                ends = group_ends(file.metadata)
            rows = np.array([locations[place].row for place in places])
            numbers = np.searchsorted(ends, rows, side="right")
            for number in np.unique(numbers).tolist():
                here = numbers == number
                yield np.array(places)[here], shard, number, rows[here] - (ends[number - 1] if number else 0)

    @contextmanager
    def reading(self, shard: Path) -> Iterator[pq.ParquetFile]:
        """A shard to read from. Raises UserError where it has become unreadable."""
        try:
            with self.files.reader(shard) as file:
                yield file
        except (OSError, *UNREADABLE) as error:
            raise _unreadable(shard, error) from error

    def skipped(self) -> dict[str, dict]:
        """Rows that could not be made, by key: {key, prompt_id, reason}. Other lines are ignored."""
        texts = [self.storage.read_text(f"{self.name}/{SKIPPED}") or ""]
        if self.storage.remote and (self.path / SKIPPED).is_file():  # others may have written the remote's
            texts.append((self.path / SKIPPED).read_text(encoding="utf-8", errors="replace"))
        entries = (skipped_entry(line) for text in texts for line in text.split("\n"))
        return {entry["key"]: entry for entry in entries if entry is not None}

    def skip(self, entries: Sequence[dict]) -> None:
        """Append entries to skipped.jsonl, durably."""
        if not entries:
            return
        path = self.path / SKIPPED
        with writing_to(self.path), path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a killed writer's line
                    file.write(b"\n")
            file.write(b"".join(canonical_json(entry).encode() + b"\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())
        if self.storage.remote:
            lines = "".join(canonical_json(entry) + "\n" for entry in self.skipped().values())
            write_atomically(self.path, lambda temporary: temporary.write_text(lines, encoding="utf-8"), SKIPPED)
            self.storage.put(path, f"{self.name}/{SKIPPED}")


def _unreadable(shard: Path, error: Exception) -> UserError:
    return UserError(
        f"{shard} cannot be read ({text_of(error)}): run `xkd-pipeline cache verify`, which sets aside what is "
        "damaged, and the same command again"
    )


def describes(name: str, text: str | None) -> bool:
    """Whether the text of `<teacher>/teacher.json` or `<teacher>/<request>/request.json` fits the folder it is in."""
    folder = name.split("/")[-2]
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        return False
    if name.endswith("/teacher.json"):
        return isinstance(value, dict) and value.get("identity") == folder
    return digest(value)[:16] == folder


def skipped_entry(line: str) -> dict | None:
    """An entry of skipped.jsonl; None for a line that is not an entry."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        entry = json.loads(line)
        texts = {name: entry[name] for name in ("key", "prompt_id", "reason")}
        return texts if all(isinstance(text, str) for text in texts.values()) else None
    return None

"""What of a store nobody refers to: shown by `cache gc`, and removed once somebody agrees."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.shards.catalogue import files_by_request
from pipeline.shards.checking import SHARD
from pipeline.shards.references import Reference, keys_of, references
from pipeline.shards.storage import Found, Storage
from pipeline.shards.store import ASIDE, RequestFolder, pick

WRITING_SECONDS = 3600.0  # a temporary file that is younger may still be being written

Uses = dict[str, list[tuple[set[str], int] | None]]  # request -> keys and k of each user; None: all of it


@dataclass(frozen=True)
class Garbage:
    """A file that can go, and why."""

    name: str
    size: int
    why: str


def in_use(storage: Storage, selections: Sequence[Path] = ()) -> tuple[Uses, list[Reference], list[Reference]]:
    """What is used of each request, by recorded references that hold (second) and by further `selections`.

    Third: references to selections that are gone. Raises UserError where one of `selections` is damaged.
    """
    uses: Uses = {}
    known = references(storage)
    gone = [reference for reference in known if reference.gone]
    holding = [reference for reference in known if not reference.gone]
    for found in [*(reference.uses() for reference in holding), *(keys_of(selection) for selection in selections)]:
        for request, used in found.items():
            uses.setdefault(request, []).append(used)
    return uses, holding, gone


def garbage(storage: Storage, uses: Uses, gone: Sequence[Reference]) -> Iterator[Garbage]:
    """All files that nothing in `uses` needs: shards, what was set aside, and what killed writers left."""
    files = storage.find()
    requests = files_by_request(storage)
    for reference in gone:
        if found := files.get(reference.name):
            yield Garbage(reference.name, found.size, "the selection is gone")
    for request, inside in requests.items():
        needed = _needed(storage, request, uses[request]) if request in uses else None
        for name, file in inside.items():
            if why := _why(name, request, file, request in uses, needed):
                yield Garbage(name, file.size, why)
    for name, file in files.items():
        teacher, _, last = name.partition("/")
        if last == f"teacher.json{ASIDE}":
            yield Garbage(name, file.size, "damaged, and set aside")
        elif last == "teacher.json" and not any(used.startswith(f"{teacher}/") for used in uses):
            yield Garbage(name, file.size, "no selection refers to the teacher")
        elif name.count("/") < 2 and last.startswith(".tmp-") and _is_old(file):
            yield Garbage(name, file.size, "left by a killed writer")


def _needed(storage: Storage, request: str, users: Sequence[tuple[set[str], int] | None]) -> set[str] | None:
    """Names of the shards that users read, each its own k; None where all are needed."""
    if None in users:
        return None
    index = RequestFolder(storage, *request.split("/")).index(set_aside=False)
    picked = (pick(index.get(key, []), k) for keys, k in users for key in keys)
    return {location.shard.name for location in picked if location is not None}


def _why(name: str, request: str, file: Found, referred: bool, needed: set[str] | None) -> str | None:
    last = name.rpartition("/")[2]
    if last.startswith(".tmp-"):
        return "left by a killed writer" if _is_old(file) else None
    if name.startswith(f"{request}/damaged/") or last.endswith(ASIDE):
        return "damaged, and set aside"
    if not referred:
        return "no selection refers to the request"
    if needed is not None and SHARD.fullmatch(last) and last not in needed:
        return "no selection refers to its rows"
    return None


def _is_old(file: Found) -> bool:
    return file.modified is not None and time.time() - file.modified > WRITING_SECONDS

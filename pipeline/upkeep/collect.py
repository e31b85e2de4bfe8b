"""The files of a store that no selection refers to: `cache gc` shows them, and removes them once somebody agrees."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import ASIDE
from pipeline.store.checks import SHARD
from pipeline.store.requests import SKIPPED, RequestFolder, pick, pick_unsure
from pipeline.store.storage import Storage, StoredFile
from pipeline.store.users import FOLDER, Used, User, keys_of, users_of
from pipeline.upkeep.catalogue import IDENTITY, files_by_request

WRITING_SECONDS = 3600.0  # a temporary file that is younger may still be being written

Uses = dict[str, list[Used | None]]  # request -> what each user reads of it; None: all of it


@dataclass(frozen=True)
class Garbage:
    """A file that can be removed, and why."""

    name: str
    size: int
    why: str


@dataclass(frozen=True)
class InUse:
    """What is used of each request, by whom, and which users were given up."""

    uses: Uses
    kept: list[User]
    forgotten: list[User]

    @property
    def absent(self) -> list[User]:
        """Users whose rows are kept although they are not at their place."""
        return [user for user in self.kept if user.absent]


def in_use(storage: Storage, selections: Sequence[Path] = (), forget: Collection[User] = ()) -> InUse:
    """What is used by the store's recorded users, except those to `forget`, and by further `selections`.

    A user that was recorded anew meanwhile is another one, and not forgotten. Raises UserError where a selection or a
    user's file is damaged: what it used is not known.
    """
    users, unreadable = users_of(storage)
    if unreadable:
        raise UserError(
            f"{', '.join(f'{storage.name}/{name}' for name in unreadable)}: not a readable record of a selection "
            "that uses the store, so what is in use is not known and nothing is removed. Run generate or score for the "
            "selections of this store, and remove the file"
        )
    uses: Uses = {}
    kept = [user for user in users if user not in forget]
    for rows_used in [*(user.uses() for user in kept), *(keys_of(selection) for selection in selections)]:
        for request, used in rows_used.items():
            uses.setdefault(request, []).append(used)
    return InUse(uses, kept, [user for user in users if user in forget])


def garbage(storage: Storage, used: InUse) -> Iterator[Garbage]:
    """All files that no user needs: shards, what was set aside, and what killed writers left."""
    files, requests, uses = storage.find(), files_by_request(storage), used.uses
    for user in used.forgotten:
        if file := files.get(user.name):
            yield Garbage(user.name, file.size, f"the selection {user.selection} is forgotten")
    for request, inside in requests.items():
        needed = _needed(storage, request, uses[request]) if request in uses else None
        for name, file in inside.items():
            if why := _why(name, request, file, request in uses, needed):
                yield Garbage(name, file.size, why)
    for name, file in files.items():
        folder, _, last = name.rpartition("/")
        if folder != FOLDER and not IDENTITY.fullmatch(folder):
            continue
        if last == f"teacher.json{ASIDE}":
            yield Garbage(name, file.size, "damaged, and set aside")
        elif last == "teacher.json" and not any(request.startswith(f"{folder}/") for request in uses):
            yield Garbage(name, file.size, "no selection refers to the teacher")
        elif last.startswith(".tmp-") and _is_old(file):
            yield Garbage(name, file.size, "left by a killed writer")


def _needed(storage: Storage, request: str, users: Sequence[Used | None]) -> set[str] | None:
    """Names of the shards that users read, each with its own k and support, and of damaged ones; None: all of them."""
    if None in users:
        return None
    folder = RequestFolder(storage, *request.split("/"))
    index = folder.index(set_aside=False)
    copies = ((index.get(key, []), k, support) for keys, k, support in users for key in keys)
    picked = (pick(*each) or pick_unsure(*each) for each in copies)
    return {location.shard.name for location in picked if location is not None} | folder.damaged.keys()


def _why(name: str, request: str, file: StoredFile, referred: bool, needed: set[str] | None) -> str | None:
    inside, _, last = name.rpartition("/")
    if inside == f"{request}/damaged" or (inside == request and last.endswith(ASIDE)):
        return "damaged, and set aside"
    if inside == request and last.startswith(".tmp-"):
        return "left by a killed writer" if _is_old(file) else None
    if inside != request or not (SHARD.fullmatch(last) or last in (SKIPPED, "request.json")):
        return None  # not a file of ours
    if not referred:
        return "no selection refers to the request"
    if needed is not None and SHARD.fullmatch(last) and last not in needed:
        return "no selection refers to its rows"
    return None


def _is_old(file: StoredFile) -> bool:
    return file.modified is not None and time.time() - file.modified > WRITING_SECONDS

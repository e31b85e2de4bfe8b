"""Which selections use a store's rows: `<store>/references/`, one small file per selection.

`generate` and `score` record the use before they ask a teacher and after they have written a selection, so that
`cache gc` removes nothing that somebody uses, or that an interrupted run would go on from. A selection that is not at
its place may still be in use: its folder may have another name by now, or lie on a disk that is not mounted.
"""

import json
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.files import ASIDE, digest
from pipeline.store.manifest import holds_selection, read_manifest, seal_of
from pipeline.store.storage import Storage

FOLDER = "references"

# What a user's file records: the selection that was written last to a place, an unfinished run that is to replace it,
# or an earlier selection of that place that was not there any more when such a run began.
WRITTEN, UNFINISHED, DISPLACED = "written", "unfinished", "displaced"


@dataclass(frozen=True)
class User:
    """A selection that uses the store. `complete` is false from when its teacher is asked until it is written."""

    selection: str
    host: str
    teacher: str
    requests: tuple[str, ...]
    complete: bool
    manifest: str | None = None  # its seal; earlier versions did not say it, unfinished runs have none
    kind: str = WRITTEN  # by the name of its file
    recorded: float | None = None  # seconds since 1970: the last change of its file

    @classmethod
    def of(cls, selection: Path, teacher: str, requests: list[str], complete: bool) -> "User":
        """A selection of this machine, and the requests (identities) that it uses."""
        seal, kind = (seal_of(selection), WRITTEN) if complete else (None, UNFINISHED)
        place = str(selection.absolute())
        return cls(place, socket.gethostname(), teacher, tuple(requests), complete, seal, kind)

    @property
    def name(self) -> str:
        """Its file in the store."""
        more = {WRITTEN: [], UNFINISHED: [UNFINISHED], DISPLACED: [self.teacher, self.requests, self.manifest]}
        return f"{FOLDER}/{digest([self.host, self.selection, *more[self.kind]])[:16]}.json"

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def absent(self) -> bool:
        """Whether its place is empty or has another selection: it was deleted or moved, or its disk is not mounted."""
        place = Path(self.selection)
        if not (self.here and self.complete):
            return False
        if not holds_selection(place):
            return True
        if self.manifest is None and self.kind == WRITTEN:  # all that is known: which teacher and requests
            return not _keys_there(place).keys() <= self._whole_requests().keys()
        return seal_of(place) not in (None, self.manifest)

    def uses(self) -> "dict[str, Used | None]":
        """`<teacher>/<request>` -> the rows in use; None where the whole request is to be kept.

        The whole request is kept for a selection that is on another machine, absent, unfinished or damaged. What lies
        in its folder meanwhile is in use too.
        """
        there = _keys_there(Path(self.selection)) if self.here else {}
        return there if there and self.complete and not self.absent else there | self._whole_requests()

    def _whole_requests(self) -> dict[str, None]:
        return {f"{self.teacher}/{request}": None for request in self.requests}

    def record(self, storage: Storage) -> bool:
        """Write this use into the store; returns whether that was possible.

        An unfinished run keeps the file of the selection that it is to replace. It renames the file of one that is
        absent, since what will be written to the same place does not replace that one. Raises UserError where its file
        cannot be read, or something is in its place.
        """
        place = replace(self, kind=WRITTEN).name
        earlier = None if self.complete else _parsed(storage.read_text(place), place)
        try:
            # DVC itself removes what a stage is about to replace, and keeps it in its own cache.
            if earlier is not None and earlier.absent and "DVC_STAGE" not in os.environ:
                storage.move(place, replace(earlier, kind=DISPLACED).name)
            storage.write_json(self.name, {name: getattr(self, name) for name in _ENTRIES})
            if self.complete:  # the run is over, and a selection that was displaced is at its place again
                over = {replace(self, kind=kind).name for kind in (UNFINISHED, DISPLACED)}
                for name in over & storage.find(FOLDER).keys():
                    storage.remove(name)
        except (OSError, UserError):
            return False
        return True


_REQUIRED = ["selection", "host", "teacher", "requests", "complete"]
_ENTRIES = [*_REQUIRED, "manifest"]


class Used(NamedTuple):
    """Rows of a request that a selection reads."""

    keys: set[str]
    k: int
    support: str | None


def _keys_there(place: Path) -> dict[str, Used]:
    """`keys_of` the selection at a place; empty where none can be read there."""
    try:
        return keys_of(place)
    except (UserError, OSError):
        return {}


def keys_of(selection: Path) -> dict[str, Used]:
    """`<teacher>/<request>` -> the rows that a selection holds. Raises UserError where it is damaged."""
    manifest, rows_used = read_manifest(selection), {}
    for part in manifest["parts"].values():
        request = f"{manifest['teacher']['identity']}/{part['request_identity']}"
        used = rows_used.setdefault(request, Used(set(), manifest["k"], manifest["support"]))
        used.keys.update(key for each in part["keys"].values() for key in each)
    return rows_used


def users_of(storage: Storage) -> tuple[list[User], list[str]]:
    """All users that were recorded, and the names of files in their folder that are not of one.

    Raises UserError where something is in the place of a file.
    """
    users, unreadable = [], []
    for name, file in storage.find(FOLDER).items():
        if name.rpartition("/")[2].startswith(".tmp-") or ASIDE in name:  # aside: written anew under its own name
            continue
        text = storage.read_text(name)
        if text is None and storage.has_gone(name):
            continue
        user = _parsed(text, name)
        if user is None:
            unreadable.append(name)
        else:
            users.append(replace(user, recorded=file.modified))
    return sorted(users, key=lambda user: (user.host, user.selection)), unreadable


def named(users: list[User], names: Iterable[str]) -> list[User]:
    """The users that names stand for: a selection's path, `PATH on HOST`, or `all` for those that are absent.

    Where a path names a user that is absent and another one that is there, it stands for the absent one. Raises
    UserError for a name that no user has.
    """
    meant = []
    for name in names:
        by_path = {name, str(Path(name).absolute())}
        same_name = [user for user in users if user.selection in by_path or f"{user.selection} on {user.host}" == name]
        if name == "all":
            same_name = [user for user in users if user.absent]
        elif not same_name:
            known = ", ".join(f"{user.selection} on {user.host}" for user in users) or "none"
            raise UserError(f"--forget {name}: no selection of this name uses the store; those that do: {known}")
        meant += [user for user in same_name if user.absent] or same_name
    return meant


def _parsed(text: str | None, name: str) -> User | None:
    """The user in a file of this name; None where the text is not of one. Ignores entries of later versions."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        entry = json.loads(text or "")
        user = User(**{field: entry[field] for field in _REQUIRED}, manifest=entry.get("manifest"))
        texts = [user.selection, user.host, user.teacher, *user.requests, user.manifest or ""]
        if all(isinstance(text, str) for text in texts) and isinstance(user.complete, bool):
            user = replace(user, requests=tuple(user.requests))
            kinds = (replace(user, kind=kind) for kind in (WRITTEN, UNFINISHED, DISPLACED))
            return next((each for each in kinds if each.name == name), None)
    return None

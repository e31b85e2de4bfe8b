"""Which selections a store's rows are in use for: `<store>/references/`, one small file a selection.

`generate` and `score` leave word before they ask a teacher and after they have written a selection, so that `cache gc`
removes nothing that somebody uses, or that an interrupted run would go on from. That a selection is not at its place is
no proof that nobody uses it: its folder may have another name by now, or lie on a disk that is not mounted.
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
from pipeline.files import ASIDE, digest, is_in_the_way, move_aside
from pipeline.store.manifest import holds_selection, read_manifest, seal_of
from pipeline.store.storage import Storage

FOLDER = "references"


# What a reference's file is of: the selection that was written last to a place, an unfinished run that is to replace
# it, or an earlier selection of that place that was not there any more when such a run began.
WRITTEN, UNFINISHED, DISPLACED = "written", "unfinished", "displaced"


@dataclass(frozen=True)
class Reference:
    """A selection on some machine. `complete` is false from when its teacher is asked until it is written."""

    selection: str
    host: str
    teacher: str
    requests: tuple[str, ...]
    complete: bool
    manifest: str | None = None  # its seal; earlier versions did not say it, unfinished runs have none
    kind: str = WRITTEN  # by the name of its file
    recorded: float | None = None  # seconds since 1970 at which it was left, by its file

    @classmethod
    def of(cls, selection: Path, teacher: str, requests: list[str], complete: bool) -> "Reference":
        """That a selection of this machine uses these requests (identities)."""
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
        """Whether its place has nothing, or another selection: it was deleted or moved, or its disk is not there."""
        place = Path(self.selection)
        if not (self.here and self.complete):
            return False
        if not holds_selection(place):
            return True
        if self.manifest is None and self.kind == WRITTEN:  # all that is known is of whom it asked what
            return not _keys_there(place).keys() <= self._everything().keys()
        return seal_of(place) not in (None, self.manifest)

    def uses(self) -> "dict[str, Used | None]":
        """`<teacher>/<request>` -> the rows in use; None where all of the request is to be kept.

        That is so for a selection that is on another machine, absent, unfinished or damaged. What lies in the folder
        meanwhile is in use too.
        """
        there = _keys_there(Path(self.selection)) if self.here else {}
        return there if there and self.complete and not self.absent else there | self._everything()

    def _everything(self) -> dict[str, None]:
        return {f"{self.teacher}/{request}": None for request in self.requests}

    def record(self, storage: Storage) -> bool:
        """Leave word in the store; whether that was possible.

        An unfinished run leaves the word of the selection that it is to replace, and moves that of one that is absent
        to a name of its own: what will be written to its place does not replace it.
        """
        try:
            if _in_the_way(storage) == [FOLDER]:
                move_aside(storage.path / FOLDER)
            place = replace(self, kind=WRITTEN).name
            earlier = None if self.complete else _parsed(storage.read_text(place), place)
            # DVC itself removes what a stage is about to replace, and has it in its own cache.
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
    """`keys_of` what lies at a place; empty where that is nothing that can be read."""
    try:
        return keys_of(place)
    except (UserError, OSError):
        return {}


def keys_of(selection: Path) -> dict[str, Used]:
    """`<teacher>/<request>` -> the rows that a selection holds. Raises UserError where it is damaged."""
    manifest, found = read_manifest(selection), {}
    for part in manifest["parts"].values():
        request = f"{manifest['teacher']['identity']}/{part['request_identity']}"
        used = found.setdefault(request, Used(set(), manifest["k"], manifest["support"]))
        used.keys.update(key for each in part["keys"].values() for key in each)
    return found


def references(storage: Storage) -> tuple[list[Reference], list[str]]:
    """All that were recorded, and the names of files in their folder that are none."""
    found, unreadable = [], _in_the_way(storage)
    for name, file in storage.find(FOLDER).items():
        if name.rpartition("/")[2].startswith(".tmp-") or ASIDE in name:  # aside: written anew under its own name
            continue
        if any(name.startswith(f"{other}/") for other in unreadable):
            continue
        text = storage.read_text(name)
        if text is None and storage.has_gone(name):
            continue
        reference = _parsed(text, name)
        if reference is None:
            unreadable.append(name)
        else:
            found.append(replace(reference, recorded=file.modified))
    return sorted(found, key=lambda reference: (reference.host, reference.selection)), unreadable


def named(known: list[Reference], names: Iterable[str]) -> list[Reference]:
    """The references that are meant: a selection's path, `PATH on HOST`, or `all` that are absent.

    Where one of a path is absent and another one is there, the absent one is meant. Raises UserError for a name that is
    none of them.
    """
    meant = []
    for name in names:
        by_path = {name, str(Path(name).absolute())}
        found = [each for each in known if each.selection in by_path or f"{each.selection} on {each.host}" == name]
        if name == "all":
            found = [each for each in known if each.absent]
        elif not found:
            users = ", ".join(f"{each.selection} on {each.host}" for each in known) or "none"
            raise UserError(f"--forget {name}: no selection of this name uses the store; those that do: {users}")
        meant += [each for each in found if each.absent] or found
    return meant


def _in_the_way(storage: Storage) -> list[str]:
    """What is where the folder of references must be, or a folder, pipe or device where one of them must be."""
    folder = storage.path / FOLDER
    if storage.remote or not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        return [FOLDER]
    strange = (path.name for path in sorted(folder.iterdir()) if ASIDE not in path.name and is_in_the_way(path))
    return [f"{FOLDER}/{name}" for name in strange]


def _parsed(text: str | None, name: str) -> Reference | None:
    """None for a text that is no reference, or not the one of this name; entries of a later version are ignored."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        entry = json.loads(text or "")
        found = Reference(**{field: entry[field] for field in _REQUIRED}, manifest=entry.get("manifest"))
        texts = [found.selection, found.host, found.teacher, *found.requests, found.manifest or ""]
        if all(isinstance(text, str) for text in texts) and isinstance(found.complete, bool):
            found = replace(found, requests=tuple(found.requests))
            kinds = (replace(found, kind=kind) for kind in (WRITTEN, UNFINISHED, DISPLACED))
            return next((reference for reference in kinds if reference.name == name), None)
    return None

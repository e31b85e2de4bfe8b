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
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pipeline.errors import UserError
from pipeline.shards.files import ASIDE, digest, is_in_the_way, move_aside
from pipeline.shards.manifest import holds_selection, read_manifest
from pipeline.shards.storage import Storage

FOLDER = "references"


@dataclass(frozen=True)
class Reference:
    """A selection on some machine. `complete` is false from when its teacher is asked until it is written."""

    selection: str
    host: str
    teacher: str
    requests: tuple[str, ...]
    complete: bool
    recorded: float | None = None  # seconds since 1970 at which it was left, by its file

    @classmethod
    def of(cls, selection: Path, teacher: str, requests: list[str], complete: bool) -> "Reference":
        """That a selection of this machine uses these requests (identities)."""
        return cls(str(selection.absolute()), socket.gethostname(), teacher, tuple(requests), complete)

    @property
    def name(self) -> str:
        """Its file in the store."""
        return f"{FOLDER}/{digest([self.host, self.selection])[:16]}.json"

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def absent(self) -> bool:
        """Whether nothing of the selection is at its place now: it was deleted or moved, or its disk is not there."""
        return self.here and self.complete and not holds_selection(Path(self.selection))

    def uses(self) -> dict[str, tuple[set[str], int] | None]:
        """`<teacher>/<request>` -> keys in use and their k; None where all of the request is to be kept.

        That is so for a selection that is on another machine, absent, unfinished, damaged, or not the one that left
        word. What lies in the folder meanwhile is in use too.
        """
        everything = {f"{self.teacher}/{request}": None for request in self.requests}
        if not self.here:
            return everything
        try:
            found = keys_of(Path(self.selection))
        except UserError:
            return everything
        return found if self.complete and found.keys() <= everything.keys() else found | everything

    def record(self, storage: Storage) -> bool:
        """Leave word in the store; whether that was possible."""
        try:
            if _in_the_way(storage) == [FOLDER]:
                move_aside(storage.path / FOLDER)
            storage.write_json(self.name, {name: getattr(self, name) for name in _ENTRIES})
        except (OSError, UserError):
            return False
        return True


_ENTRIES = [field.name for field in fields(Reference) if field.name != "recorded"]


def keys_of(selection: Path) -> dict[str, tuple[set[str], int]]:
    """`<teacher>/<request>` -> the keys that a selection holds, and its k. Raises UserError where it is damaged."""
    manifest, found = read_manifest(selection), {}
    for part in manifest["parts"].values():
        request = f"{manifest['teacher']['identity']}/{part['request_identity']}"
        keys, _ = found.setdefault(request, (set(), manifest["k"]))
        keys.update(key for each in part["keys"].values() for key in each)
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
        reference = _parsed(text)
        if reference is None or reference.name != name:
            unreadable.append(name)
        else:
            found.append(replace(reference, recorded=file.modified))
    return sorted(found, key=lambda reference: (reference.host, reference.selection)), unreadable


def named(known: list[Reference], names: Iterable[str]) -> list[Reference]:
    """The references that are meant: a selection's path, `PATH on HOST`, or `all` that are absent.

    Raises UserError for a name that is none of them.
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
        meant += found
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


def _parsed(text: str | None) -> Reference | None:
    """None for a text that is no reference; entries of a later version are ignored."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        entry = json.loads(text or "")
        found = Reference(**{name: entry[name] for name in _ENTRIES})
        texts = [found.selection, found.host, found.teacher, *found.requests]
        if all(isinstance(text, str) for text in texts) and isinstance(found.complete, bool):
            return replace(found, requests=tuple(found.requests))
    return None

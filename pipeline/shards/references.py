"""Which selections a store's rows are in use for: `<store>/references/`, one small file a selection.

`generate` and `score` leave word before they ask a teacher and after they have written a selection, so that `cache gc`
removes nothing that somebody uses, or that an interrupted run would go on from.
"""

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.shards.files import digest
from pipeline.shards.selection import read_manifest
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
    def gone(self) -> bool:
        """Whether the selection is known not to exist any more."""
        return self.here and self.complete and not (Path(self.selection) / "manifest.json").is_file()

    def uses(self) -> dict[str, tuple[set[str], int] | None]:
        """`<teacher>/<request>` -> keys in use and their k; None where all of the request is to be kept.

        That is so for a selection that cannot be looked at, being on another machine, unfinished or damaged.
        """
        everything = {f"{self.teacher}/{request}": None for request in self.requests}
        if not self.here or not self.complete:
            return everything
        try:
            return keys_of(Path(self.selection))
        except UserError:
            return everything

    def record(self, storage: Storage) -> None:
        """Leave word in the store; a store that can only be read is none the worse."""
        with suppress(UserError):
            storage.write_json(self.name, asdict(self))


def keys_of(selection: Path) -> dict[str, tuple[set[str], int]]:
    """`<teacher>/<request>` -> the keys that a selection holds, and its k. Raises UserError where it is damaged."""
    manifest, found = read_manifest(selection), {}
    for part in manifest["parts"].values():
        request = f"{manifest['teacher']['identity']}/{part['request_identity']}"
        keys, _ = found.setdefault(request, (set(), manifest["k"]))
        keys.update(key for each in part["keys"].values() for key in each)
    return found


def references(storage: Storage) -> list[Reference]:
    """All that were recorded; files that are none are passed over."""
    found = []
    for name in storage.find(FOLDER):
        with suppress(json.JSONDecodeError, KeyError, TypeError):
            entry = json.loads(storage.read_text(name) or "")
            entry["requests"] = tuple(entry["requests"])
            found.append(Reference(**entry))
    return sorted(found, key=lambda reference: (reference.host, os.fspath(reference.selection)))

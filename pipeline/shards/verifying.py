"""`cache verify`: look at every byte and every row of a store and of its selections, and set aside what is wrong.

What is set aside is no longer read, so the next `generate` makes exactly those rows, or that selection, again.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.shards.catalogue import files_by_request
from pipeline.shards.checking import Damaged, check_shard, row_faults
from pipeline.shards.files import digest
from pipeline.shards.schema import read_metadata
from pipeline.shards.selection import Selection, file_fault, labels_of, read_manifest, selection_files
from pipeline.shards.storage import Storage
from pipeline.shards.store import ASIDE, SKIPPED, RequestFolder, describes, skipped_entry


@dataclass(frozen=True)
class Problem:
    """A file that is not what it should be, and what became of it."""

    file: str
    what: str
    repair: str
    aside: bool = False


def verify_store(storage: Storage, prefix: str, set_aside: bool, advance: Callable[[], None]) -> Iterator[Problem]:
    """All that is wrong in the requests whose name begins with `prefix`. `advance` is called once a file."""
    requests = files_by_request(storage, prefix)
    for teacher in sorted({request.split("/")[0] for request in requests}):
        yield from _description(storage, f"{teacher}/teacher.json", set_aside)
    for request, files in sorted(requests.items()):
        folder = RequestFolder(storage, *request.split("/"))
        if any(name.rpartition("/")[0] == request for name in files):  # not only what was set aside before
            yield from _description(storage, f"{request}/request.json", set_aside)
        strange = [f"{request}/{path.name}" for path in folder.path.glob("part-*") if path.is_dir()]
        for name in sorted([*files, *strange]):
            inside, _, last = name.rpartition("/")
            if inside == request and not last.startswith(".tmp-") and not last.endswith(ASIDE):
                yield from _file(storage, folder, last, set_aside)
            advance()


def _description(storage: Storage, name: str, set_aside: bool) -> Iterator[Problem]:
    """teacher.json or request.json: it must be of the folder it is in."""
    text = storage.read_text(name)
    if text is None:
        yield Problem(name, "it is missing", "the next generate that asks this teacher writes it")
    elif not describes(name, text):
        moved = set_aside and _aside(lambda: storage.move(name, name + ASIDE))
        yield Problem(name, "it describes something else than its folder", "the next generate writes it anew", moved)


def _file(storage: Storage, folder: RequestFolder, last: str, set_aside: bool) -> Iterator[Problem]:
    name, what, repair = f"{folder.name}/{last}", None, "generate makes its rows again"
    if last == SKIPPED:
        lines = (storage.read_text(name) or "").split("\n")
        bad = sum(bool(line.strip()) and skipped_entry(line) is None for line in lines)
        if bad:
            yield Problem(name, f"{bad} of its lines are no entries, and ignored", "those rows are asked for again")
        return
    if last == "request.json":
        return
    if not last.startswith("part-"):
        yield Problem(name, "it is no file of the store, and ignored", "remove it, or leave it")
        return
    with _stored(storage, name) as path:
        try:
            check_shard(path, folder.teacher, folder.request)
            found = list(row_faults(path))
            more = f", and {len(found) - 1} more rows" if len(found) > 1 else ""
            what = f"{found[0]}{more}" if found else None
        except Damaged as error:
            what = str(error)
    if what:
        yield Problem(name, what, repair, set_aside and _aside(lambda: folder.set_aside(last)))


@contextmanager
def _stored(storage: Storage, name: str) -> Iterator[Path]:
    """The bytes that the store has, not those of the mirror, as a file on this machine."""
    if not storage.remote:
        yield storage.path / name
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / name.rpartition("/")[2]
        with suppress(FileNotFoundError):
            storage.fetch(name, path)
        yield path


def verify_selection(folder: Path, store: str | Path | None, set_aside: bool) -> Iterator[Problem]:
    """What is wrong with a selection: its manifest against its files, and against their rows or those in the store."""
    manifest_path, repair = folder / "manifest.json", "generate (or score) writes the selection again"

    def problem(path: Path, what: str) -> Problem:
        moved = set_aside and path.exists() and _aside(lambda: os.replace(path, path.with_name(path.name + ASIDE)))
        return Problem(str(path), what, repair, moved)

    try:
        manifest = read_manifest(folder)
    except UserError as error:
        yield problem(manifest_path, str(error))
        return
    faults = [
        (file["name"], fault)
        for part in manifest["parts"].values()
        for file in part["files"]
        if (fault := file_fault(folder, file))
    ]
    for name, what in faults:
        yield problem(folder / name, what)
    listed = {file["name"] for part in manifest["parts"].values() for file in part["files"]}
    for path in selection_files(folder):
        if path.name not in listed:
            yield problem(path, "manifest.json does not list it")
    if not faults and (stale := _stale(folder, manifest, store)):
        yield problem(manifest_path, f"it is stale: {stale}")


def _stale(folder: Path, manifest: dict, store: str | Path | None) -> str | None:
    """What a manifest says that its rows do not, or None."""
    try:
        selection = Selection(folder, store)
        for name, part in selection.parts.items():
            labels, rows, tokens = labels_of(part), 0, 0
            if digest(part["request"])[:16] != part["request_identity"]:
                return f"the request of part {name} is not the one of its identity"
            for file in part["files"]:
                metadata = read_metadata(folder / file["name"])
                if any(metadata[name] != manifest[name] for name in ("teacher", "k")):
                    return f"{file['name']} is of another teacher or k"
            for label, row in zip(labels, selection.rows(name, topk=False), strict=True):
                if (label.key, label.prompt_id, label.origin) != (row.key, row.prompt_id, row.origin):
                    return f"part {name} holds row {row.key} in place of {label.key}"
                rows, tokens = rows + 1, tokens + len(row.response_ids)
            if (part["rows"], part["prompts"], part["tokens"]) != (rows, len(part["keys"]), tokens):
                return f"part {name} has {rows} rows of {tokens} tokens, not {part['rows']} of {part['tokens']}"
    except (UserError, ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _aside(move: Callable[[], None]) -> bool:
    """Whether the move was made; a store that can only be read stays as it is."""
    try:
        move()
    except (OSError, UserError):
        return False
    return True

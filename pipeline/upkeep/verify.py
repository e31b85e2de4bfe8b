"""`cache verify`: check every byte and every row of a store and of its selections, and set aside what is wrong.

What is set aside is no longer read, so the next `generate` makes exactly those rows, or that selection, again.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.files import ASIDE, locked, require_file
from pipeline.store.checks import UNREADABLE, Damaged, RowCheck, check_shard, row_faults, text_of
from pipeline.store.manifest import MANIFEST, WRITE_AGAIN, file_fault, read_manifest, seal_of, unlisted_files
from pipeline.store.requests import SKIPPED, RequestFolder, describes, skipped_entry
from pipeline.store.schema import checked_metadata, read_metadata
from pipeline.store.selection import Selection, labels_of
from pipeline.store.storage import Storage
from pipeline.store.users import FOLDER, users_of
from pipeline.upkeep.catalogue import IDENTITY, files_by_request

_FOLDER = re.compile(rf"{IDENTITY.pattern}(/{IDENTITY.pattern})?")
_OF_ALL = ("teacher", "k", "support")  # what all files of a selection share


@dataclass(frozen=True)
class Problem:
    """A file that is not what it should be, and what became of it."""

    file: str
    what: str
    repair: str
    aside: bool = False


def verify_store(storage: Storage, prefix: str, set_aside: bool, advance: Callable[[], None]) -> Iterator[Problem]:
    """All that is wrong in the requests whose name begins with `prefix`. `advance` is called once per file."""
    for name in storage.find():
        if _FOLDER.fullmatch(name) and (name.startswith(prefix) or prefix.startswith(name)):
            yield Problem(name, "it is not a folder", "move it away")
    yield from _readable(storage, FOLDER, _user_problems(storage))
    requests = files_by_request(storage, prefix)
    for teacher in sorted({request.split("/")[0] for request in requests}):
        name = f"{teacher}/teacher.json"
        yield from _readable(storage, name, _description_problems(storage, name, set_aside))
    for request, files in sorted(requests.items()):
        folder = RequestFolder(storage, *request.split("/"))
        if any(name.rpartition("/")[0] == request for name in files):  # not only what was set aside before
            name = f"{request}/request.json"
            yield from _readable(storage, name, _description_problems(storage, name, set_aside))
        for name in sorted(files):
            inside, _, last = name.rpartition("/")
            if inside == request and not last.startswith(".tmp-") and not last.endswith(ASIDE):
                yield from _readable(storage, name, _file_problems(storage, folder, last, set_aside))
            advance()


def _readable(storage: Storage, name: str, problems: Iterator[Problem]) -> Iterator[Problem]:
    """`problems`, and one more where the file cannot be read now, or something is in its place."""
    try:
        yield from problems
    except UserError as error:
        if not storage.has_gone(name):
            yield Problem(name, str(error), "verify again")


def _user_problems(storage: Storage) -> Iterator[Problem]:
    for name in users_of(storage)[1]:
        yield Problem(name, "not a readable record of a selection; `cache gc` refuses to guess", "remove it")


def _description_problems(storage: Storage, name: str, set_aside: bool) -> Iterator[Problem]:
    """What is wrong with a teacher.json or request.json: it must describe the folder it is in."""
    text = storage.read_text(name)
    if text is None:
        others = storage.find(name.rpartition("/")[0])
        if all(ASIDE in other or "/damaged/" in other or "/.tmp-" in other for other in others):
            return  # what it described has gone since it was listed
        yield Problem(name, "it is missing", "the next generate that asks this teacher writes it")
    elif not describes(name, text):
        moved = set_aside and _try_to(lambda: storage.move(name, name + ASIDE))
        yield Problem(name, "it does not describe its folder", "the next generate writes it anew", moved)


def _file_problems(storage: Storage, folder: RequestFolder, last: str, set_aside: bool) -> Iterator[Problem]:
    name = f"{folder.name}/{last}"
    if last == SKIPPED:
        lines = (storage.read_text(name) or "").split("\n")
        bad = sum(bool(line.strip()) and skipped_entry(line) is None for line in lines)
        if bad:
            yield Problem(name, f"{bad} of its lines are not entries and are ignored", "those rows are asked for again")
    elif last != "request.json" and not last.startswith("part-"):
        yield Problem(name, "it is not a file of the store and is ignored", "remove it, or leave it")
    elif last != "request.json":
        what = _shard_fault(storage, folder, name)
        if what and not storage.has_gone(name):  # `gc` removes shards, and `generate` sets them aside, at any time
            moved = set_aside and _try_to(lambda: folder.set_aside(last))
            yield Problem(name, what, "generate makes the rows again that no other shard has", moved)


def _shard_fault(storage: Storage, folder: RequestFolder, name: str) -> str | None:
    """What is wrong with a shard or its rows, or None. Raises UserError where it cannot be read now."""
    with _stored(storage, name) as path:
        try:
            check_shard(path, folder.teacher, folder.request)
        except Damaged as error:
            return str(error)
        faults = list(row_faults(path))
    more = f", and {len(faults) - 1} more rows" if len(faults) > 1 else ""
    return f"{faults[0]}{more}" if faults else None


@contextmanager
def _stored(storage: Storage, name: str) -> Iterator[Path]:
    """A file with the bytes that the store has, not with those of the mirror."""
    if not storage.remote:
        yield storage.path / name
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / name.rpartition("/")[2]
        with suppress(FileNotFoundError):
            storage.fetch(name, path)
        yield path


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a file of a selection; `movable` says whether setting the file aside mends it."""

    path: Path
    what: str
    movable: bool = True


def verify_selection(folder: Path, store: str | Path | None, set_aside: bool) -> Iterator[Problem]:
    """What is wrong with a selection: its manifest, its files, and its rows or those in the store.

    Files of rows that the manifest does not list are reported and set aside too: killed runs leave such files, and the
    selection is whole without them.
    """
    while True:
        before = seal_of(folder)
        faults = list(_selection_faults(folder, store))
        with locked(folder) if folder.is_dir() else nullcontext():  # nobody replaces it now
            if faults and seal_of(folder) != before:
                continue  # somebody did while it was looked at
            if all(fault.path.name != MANIFEST for fault in faults):
                unlisted = unlisted_files(folder, read_manifest(folder))
                faults += [_Fault(path, "manifest.json does not list it") for path in unlisted]
            for fault in faults:
                movable = set_aside and fault.movable and fault.path.is_file()
                moved = movable and _try_to(lambda path=fault.path: _move_aside(path))
                yield Problem(str(fault.path), fault.what, "generate (or score) writes the selection again", moved)
        return


def _selection_faults(folder: Path, store: str | Path | None) -> Iterator[_Fault]:
    try:
        manifest = read_manifest(folder)
        unlisted = unlisted_files(folder, manifest)
    except UserError as error:
        what = str(error).removeprefix(f"{folder / MANIFEST} ").removesuffix(f": {WRITE_AGAIN}")
        yield _Fault(folder / MANIFEST, f"it {what}" if what.startswith("is ") else what)
        return
    listed = {file["name"]: (file, part) for part in manifest["parts"].values() for file in part["files"]}
    faults = {name: fault for name, (file, _) in listed.items() if (fault := file_fault(folder, file))}
    others = []
    for name in faults:
        same_place = [path for path in unlisted if name.startswith(path.name[: path.name.index("-") + 6])]
        others += [p.name for p in [folder / name, *same_place] if _is_another(p, *listed[name], manifest)]
    if others:
        yield _Fault(folder / MANIFEST, f"it is stale: {', '.join(others)} are whole files of another selection")
        return
    for name, what in faults.items():
        yield _Fault(folder / name, what)
    if faults:
        return
    try:
        selection = Selection(folder, store)
    except UserError as error:
        yield _Fault(folder / MANIFEST, str(error), movable=False)
        return
    for name in selection.parts:
        try:
            if selection.manifest["materialized"]:
                yield from _row_faults(selection, name)
            else:
                selection.checked(name)
        except UserError as error:  # the store's fault: the selection may be whole
            yield _Fault(folder / MANIFEST, f"part {name}: {error}", movable=False)


def _is_another(path: Path, file: dict, part: dict, manifest: dict) -> bool:
    """Whether a file that does not fit the manifest is a whole file of another selection, and not a damaged one."""
    try:
        require_file(path)
        metadata, table = read_metadata(path), pq.read_table(path)
        keys = table.column("key").to_pylist() if "key" in table.column_names else []
    except (*UNREADABLE, OSError):
        return False
    of_another = any(metadata[entry] != manifest[entry] for entry in _OF_ALL)
    of_part = {key for each in part["keys"].values() for key in each}
    return of_another or len(keys) != file["rows"] or not of_part.issuperset(keys)


def _row_faults(selection: Selection, name: str) -> Iterator[_Fault]:
    """Files of a part with rows that differ from the manifest, or that the teacher cannot have said."""
    part, labels = selection.part(name), iter(labels_of(selection.part(name)))
    for file in part["files"]:
        path = selection.folder / file["name"]
        try:
            with selection.files.reader(path) as reader:
                metadata = checked_metadata(reader.schema_arrow)
            if any(metadata[entry] != selection.manifest[entry] for entry in _OF_ALL):
                yield _Fault(path, "it is of another teacher, k or support than manifest.json")
            told = (metadata[entry] for entry in ("k", "vocab_size", "support"))
            check = RowCheck(metadata["request"], part["request_identity"], *told)
            for row in selection.file_rows(file):
                label = next(labels, None)
                if label is None or (label.key, label.prompt_id, label.origin) != (row.key, row.prompt_id, row.origin):
                    here = label.key if label else "no row"
                    yield _Fault(path, f"it holds row {row.key} where manifest.json has {here}")
                    return
                if fault := check.fault(row):
                    yield _Fault(path, f"row {row.key} {fault}")
                    break
        except (*UNREADABLE, OSError) as error:
            yield _Fault(path, f"its rows cannot be read: {text_of(error)}")
            return


def _move_aside(path: Path) -> None:
    """Give a file a name that ends in `.aside`; nothing is replaced."""
    aside, numbers = path.with_name(f"{path.name}{ASIDE}"), itertools.count(1)
    while os.path.lexists(aside):
        aside = path.with_name(f"{path.name}.{next(numbers)}{ASIDE}")
    path.rename(aside)


def _try_to(move: Callable[[], None]) -> bool:
    """Make a move; returns whether that was possible. A store that can only be read stays as it is."""
    try:
        move()
    except (OSError, UserError):
        return False
    return True

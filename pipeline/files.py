"""Files that are either whole or absent: temporary name, fsync, atomic rename, directory fsync."""

import errno
import fcntl
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, in_one_line, shown

ASIDE = ".aside"  # ending of a damaged file that was moved aside and is no longer read


def require_file(path: Path) -> None:
    """Raises OSError for what is not a regular file: opening a pipe that nobody writes to would wait for ever."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        what = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "Is not a regular file"
        raise IsADirectoryError(errno.EISDIR, what, str(path))  # the same for readers: something is in the file's place


def advice_on(error: Exception, otherwise: str) -> str:
    """What to do about an error: what is in the place of a file or folder is for the user to move."""
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError) and error.filename:
        return f"Move what is at {nearest(Path(error.filename2 or error.filename))} out of the way"
    return otherwise


def cannot_read(path: Path, error: OSError) -> UserError:
    """The error about a file that may be whole but cannot be read now, or that something else is in the place of."""
    reason, advice = error.strerror or error, advice_on(error, "Mend that")
    return UserError(f"cannot read {path}: {reason}. {advice} and run the same command again")


def nearest(path: Path) -> Path:
    """The path where something is there, else the nearest of the folders it is in."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes. Raises OSError for what is not a regular file."""
    require_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, errors: str = "strict", characters: int = -1) -> str:
    """The text of a UTF-8 file, or its first `characters`. Raises OSError for what is not a regular file."""
    require_file(path)
    with open(path, encoding="utf-8", errors=errors) as file:
        return file.read(characters)


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def parse_json(text: str, what: str) -> Any:
    """The value of a JSON text. Raises UserError that begins with `what`, also for values that Python cannot hold."""
    with in_one_line(f"{what} is not JSON"):
        return json.loads(text)


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError that names the file where it cannot be read, or is not JSON."""
    with in_one_line(f"{path} cannot be read"):
        text = read_text(path)
    return parse_json(text, str(path))


def require_shape(value: Any, kind: type, what: str) -> None:
    """Raises UserError that begins with `what` where a value is not of type `kind` (a TypedDict or another type)."""
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise UserError(f"{what}: {where}{first['msg']}, found {shown(repr(first['input']))}") from None


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, hex; a lone surrogate counts as its own bytes."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def writing_to(folder: Path):
    """Make the folder, and turn OSErrors inside the block into UserErrors; what was there before stays."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        advice = advice_on(error, "Free space or make it writable")
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}. {advice} and run the same command again: everything "
            "written so far is kept"
        ) from error


def replace_file(path: Path, to: Path) -> None:
    """Rename a file, replacing one that is at `to`. Raises OSError where something else is there."""
    if to.exists():
        require_file(to)
    os.replace(path, to)


@contextmanager
def locked(folder: Path, wait: bool = True):
    """Lock a folder among this machine's processes, waiting for it; without a lock where locks are not supported.

    Without `wait`, raises OSError where another process has the lock, or where locks are not supported.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError) if wait else nullcontext():
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def write_atomically(folder: Path, write: Callable[[Path], None], name: str | Callable[[Path], str]) -> Path:
    """Let `write` fill a temporary file in `folder`, then move it to `name` (or to what `name(file)` returns).

    Raises UserError where the folder cannot be written (read-only, disk full).
    """
    temporary = folder / f".tmp-{uuid.uuid4().hex}"
    try:
        with writing_to(folder):
            write(temporary)
            sync(temporary)
            final = folder / (name if isinstance(name, str) else name(temporary))
            replace_file(temporary, final)
            sync(folder)
    finally:
        with suppress(OSError):
            temporary.unlink()
    return final


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(folder: Path) -> None:
    """Raises UserError where nothing can be written into `folder`, which is made where it is absent."""
    with writing_to(folder):
        probe = folder / f".tmp-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink(missing_ok=True)


def write_json_atomically(path: Path, value: Any) -> None:
    """Write readable JSON with the keys in their own order, whole or absent."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path.parent, lambda temporary: temporary.write_text(text, encoding="utf-8"), path.name)

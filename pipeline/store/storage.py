"""The files of a store: in a folder, or at any fsspec URL (s3://, gs://, abfs://, sftp://, ...).

A store at a URL is mirrored on this machine, shard by shard. Shards are named by their content and never change, so a
local copy is as good as the original. A new one waits in the mirror's outbox until the URL has it, so that nothing is
lost with the network.
"""

import os
import re
import uuid
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from pipeline.errors import UserError, reason_of
from pipeline.files import advice_on, digest, require_file, write_json_atomically, writing_to

_URL = re.compile(r"[A-Za-z][\w+.-]*(::[A-Za-z][\w+.-]*)*://")  # also of a chain, as in simplecache::s3://
# Here a put is whole or absent; elsewhere a file gets its name only after its last byte.
_ENDINGS = (".json", ".jsonl", ".parquet")  # of all files of a store
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory"}


@dataclass(frozen=True)
class StoredFile:
    """A file of a store: bytes, and seconds since 1970 at its last change where the file system knows."""

    size: int
    modified: float | None


class Storage:
    """A folder, or what a URL names. Names are relative to it, with `/` between folders."""

    def __init__(self, where: str | Path):
        text = str(where).rstrip("/")
        self.remote = bool(_URL.match(text)) and not text.startswith("file://")
        self.name = text if self.remote else str(Path(text.removeprefix("file://")).expanduser().absolute())
        self.path = _mirror(self.name) if self.remote else Path(self.name)  # where its files are read on this machine

    @cached_property
    def _target(self) -> tuple:
        """(file system, path in it). Raises UserError where the URL is not understood."""
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        if not self.remote:  # also for a name such as a::b, which would otherwise be a chain of URLs
            return LocalFileSystem(), self.name
        try:
            return fsspec.core.url_to_fs(self.name)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot use the store {self.name}: {error}") from error

    def _full(self, name: str) -> str:
        return "/".join(part for part in (self._target[1].rstrip("/"), name) if part)

    @contextmanager
    def _reaching(self, name: str):
        """Turn errors on the way into a UserError, except for a file that is absent."""
        try:
            yield self._target[0]
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # every file system has errors of its own
            kept = f" What was made is kept in {self.path}." if self.remote else ""
            raise UserError(
                f"cannot use {self.name}/{name}: {reason_of(error)}.{kept} {advice_on(error, 'Mend that')} and run the "
                "same command again"
            ) from error

    def find(self, folder: str = "") -> dict[str, StoredFile]:
        """Every file in and below a folder, by name."""
        if not self.remote:
            return self._find_here(folder)
        with self._reaching(folder) as fs:
            fs.invalidate_cache()
            try:
                files = fs.find(self._full(folder), detail=True)
            except FileNotFoundError:
                return {}
            base = len(self._target[1].rstrip("/")) + 1
            return {path[base:]: StoredFile(info["size"], _modified(info)) for path, info in sorted(files.items())}

    def _find_here(self, folder: str) -> dict[str, StoredFile]:
        """Follows links: a request may have moved to another disk. Raises UserError where it cannot look.

        Whatever is in a file's place is listed like one: a pipe, a device, a folder with a file's ending.
        """
        stored, seen, top = {}, set(), self.path / folder
        with self._reaching(folder):
            walk = os.walk(top, followlinks=True, onerror=_unless_absent)
            for inside, folders, files in walk if top.is_dir() else [(top.parent, [], [top.name])]:
                if (real := os.path.realpath(inside)) in seen:
                    folders.clear()
                    continue
                seen.add(real)
                in_the_way = [name for name in folders if name.endswith(_ENDINGS)]
                folders[:] = [name for name in folders if name not in in_the_way]
                for path in (Path(inside) / name for name in [*files, *in_the_way]):
                    if status := _status(path):
                        stored[path.relative_to(self.path).as_posix()] = StoredFile(status.st_size, status.st_mtime)
        return dict(sorted(stored.items()))

    @contextmanager
    def open(self, name: str):
        """The stored bytes as a file to read; at a URL only what is read is transferred."""
        with self._reaching(name) as fs:
            if not self.remote:
                require_file(self.path / name)
            with fs.open(self._full(name), "rb") as file:
                yield file

    def read_text(self, name: str) -> str | None:
        """A small text file; None where it is not there."""
        try:
            with self.open(name) as file:
                return file.read().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def has_gone(self, name: str) -> bool:
        """Whether a file that was listed is gone, with nothing else in its place."""
        if not self.remote:
            return not os.path.lexists(self.path / name)
        with self._reaching(name) as fs:
            fs.invalidate_cache()
            return not fs.exists(self._full(name))

    def fetch(self, name: str, to: Path) -> None:
        """Copy a file to this machine; it appears whole. Raises FileNotFoundError where the store does not have it."""
        temporary = to.parent / f".tmp-{uuid.uuid4().hex}"
        try:
            with writing_to(to.parent):
                temporary.touch()
            with self._reaching(name) as fs:
                fs.get_file(self._full(name), str(temporary))
            os.replace(temporary, to)
        finally:
            with suppress(OSError):
                temporary.unlink()

    def put(self, path: Path, name: str) -> None:
        """Copy a file of this machine into the store; it appears whole."""
        folder, _, last = name.rpartition("/")
        try:
            with self._reaching(name) as fs:
                protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
                if protocols & _OBJECT_STORES:
                    fs.put_file(str(path), self._full(name))
                else:
                    temporary = self._full(f"{folder}/.tmp-{uuid.uuid4().hex}-{last}")
                    fs.makedirs(self._full(folder), exist_ok=True)
                    fs.put_file(str(path), temporary)
                    fs.mv(temporary, self._full(name))
        except FileNotFoundError as error:
            if not path.exists():  # another process has handed it over
                raise
            raise UserError(
                f"cannot write to {self.name}: it does not exist ({error}). What was made is kept in {self.path}"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """A small readable file, whole or absent."""
        path = self.path / name
        write_json_atomically(path, value)
        if self.remote:
            self.put(path, name)

    def move(self, name: str, to: str) -> None:
        """Rename a file."""
        with self._reaching(name) as fs:
            fs.makedirs(self._full(to.rpartition("/")[0]), exist_ok=True)
            fs.mv(self._full(name), self._full(to))

    def remove(self, name: str) -> None:
        """Delete a file here and in the mirror; it may be gone already."""
        with self._reaching(name) as fs, suppress(FileNotFoundError):
            fs.rm_file(self._full(name))
        (self.path / name).unlink(missing_ok=True)

    def remove_empty(self, folders: Iterable[str]) -> None:
        """Remove those of the folders, and of the folders they are in, that are empty on this machine."""
        for folder in folders:
            inside = self.path / folder
            while inside != self.path:
                try:
                    inside.rmdir()
                except OSError:
                    break
                inside = inside.parent

    def outbox(self, folder: str) -> Path:
        """Where new shards of a folder are written before `push`; the folder itself where there is no URL."""
        return self.path / folder / "outbox" if self.remote else self.path / folder

    def push(self, folder: str) -> None:
        """Copy what waits in a folder's outbox to the URL; the mirror then has it as a file like any other."""
        for path in sorted(self.outbox(folder).glob("part-*.parquet")) if self.remote else ():
            with suppress(FileNotFoundError):  # another process may be handing over the same
                self.put(path, f"{folder}/{path.name}")
                os.replace(path, self.path / folder / path.name)


def _status(path: Path) -> os.stat_result | None:
    """Of a file, or of a link that leads nowhere; None for what has gone since it was listed."""
    with suppress(FileNotFoundError):
        try:
            return path.stat()
        except OSError:
            return path.lstat()
    return None


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _mirror(url: str) -> Path:
    """Where this machine keeps its copy of the store at a URL."""
    return Path(os.environ.get("XKD_MIRROR") or user_cache_path("xkd-pipeline") / "mirror") / digest(url)[:16]


def _modified(info: dict) -> float | None:
    for key in ("mtime", "LastModified", "updated", "created"):
        if isinstance(value := info.get(key), datetime):
            return value.replace(tzinfo=value.tzinfo or UTC).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None

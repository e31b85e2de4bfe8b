"""Parquet files that are read long after they were checked: kept open, so that replacing them changes nothing."""

import hashlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.files import require_file

_SHARE = 8  # take at most 1 / _SHARE of the files that a process may have open: a training reads several selections


class OpenFiles:
    """Files that stay what they were when they were added: a reader does not notice that one is removed or replaced.

    Files beyond the limit of open ones are opened anew each time, and so are all in a process that got a copy of this;
    they must then be the files that were added, by what the file system says or else by their content.
    """

    def __init__(self, lost: str):
        """lost: for the message where a file is gone or another one: what must have happened, and what to do."""
        self.lost = lost
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.room = limit // _SHARE if 0 < limit < 4096 else 512
        self._open: dict[Path, pa.NativeFile] = {}
        self._added: dict[Path, tuple[str, tuple]] = {}  # beginning of its content's digest, and its mark

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # in another process they are opened again

    def add(self, path: Path, sha256: str, check: bool = True) -> bool:
        """Whether the digest of a file's content begins with `sha256`; without `check`, taken as true.

        Raises OSError where there is no such file.
        """
        file = _open(path)
        if check and not _fits(file, sha256):
            file.close()
            return False
        self._added[path] = sha256, _mark(file)
        self._keep(path, file)
        return True

    @contextmanager
    def reader(self, path: Path) -> Iterator[pq.ParquetFile]:
        """A file to read from. Raises UserError where it was added and is gone or another one by now."""
        file = self._open.get(path) or (self._again(path) if path in self._added else _open(path))
        try:
            with pq.ParquetFile(file) as reader:
                yield reader
        finally:
            if path not in self._open:
                file.close()

    def _again(self, path: Path) -> pa.NativeFile:
        sha256, mark = self._added[path]
        try:
            file = _open(path)
        except FileNotFoundError as error:
            raise UserError(f"{path} is gone: {self.lost}") from error
        if _mark(file) != mark and not _fits(file, sha256):
            file.close()
            raise UserError(f"{path} is another file than before: {self.lost}")
        self._keep(path, file)
        return file

    def _keep(self, path: Path, file: pa.NativeFile) -> None:
        if len(self._open) < self.room:
            self._open[path] = file


def _open(path: Path) -> pa.NativeFile:
    require_file(path)
    return pa.OSFile(str(path))


def _mark(file: pa.NativeFile) -> tuple:
    """What the file system says of a file, and would not say of another one in its place."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _fits(file: pa.NativeFile, sha256: str) -> bool:
    hasher = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(2**20):
        hasher.update(chunk)
    return hasher.hexdigest().startswith(sha256)

"""Standard output whose errors name it, and that is given up after one: nothing is tried again at Python's end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class NamedOutput:
    """A text stream of a file descriptor, with what the system itself does not say of an error: where it was."""

    def __init__(self, stream: TextIO | None, name: str):
        """stream: None where it was closed from the start; then nothing is written."""
        self._stream, self._name = stream or open(os.devnull, "w"), name  # noqa: SIM115

    def __getattr__(self, attribute: str):
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise OSError(error.errno, error.strerror, self._name) from error

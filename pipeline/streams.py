"""The process's stdout and stderr, whose readers may go away before the process ends."""

import os
import sys
from contextlib import suppress


class Stream:
    """sys.stdout or sys.stderr as long as it can be written; what is written afterwards is dropped.

    `failure` says why it cannot be written any more. A reader that is gone is not an error of the run; the caller
    decides about other reasons.
    """

    def __init__(self, name: str):
        self.name = name
        self.failure: OSError | None = None

    @property
    def stream(self):
        stream = getattr(sys, self.name)
        return getattr(stream, "rich_proxied_file", stream)  # also while a progress bar wraps it

    def write(self, text: str) -> int:
        encoding = self.encoding or "utf-8"
        return self._unless_gone("write", text.encode(encoding, "backslashreplace").decode(encoding)) or 0

    def flush(self) -> None:
        self._unless_gone("flush")

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    @property
    def encoding(self) -> str | None:
        return getattr(self.stream, "encoding", None)

    def _unless_gone(self, method: str, *arguments):
        stream = self.stream
        if stream is None:  # the process was started without it
            return None
        try:
            return getattr(stream, method)(*arguments)
        except OSError as error:  # the reader of a pipe, or the terminal, is gone, or a disk is full
            self.failure = self.failure or error
            with suppress(OSError):  # libraries and the interpreter write there too
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


STDOUT, STDERR = Stream("stdout"), Stream("stderr")

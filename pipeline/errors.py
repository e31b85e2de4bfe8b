"""The one error a user should ever see: what was found, what was expected, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


def reason_of(error: BaseException) -> str:
    """An exception in one line of valid Unicode, of at most 300 characters."""
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


def printable(text: str) -> str:
    """The text with what no encoding can write (lone surrogates) as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


class UserError(Exception):
    """A slip of the user's or a fault of the environment; the command line prints its message without a traceback."""


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Turn whatever is raised inside the block into a UserError: `what`, then the reason.

    Only for a library's code that reads what a user gave: an error of our own code must stay what it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {reason_of(error)}") from error


class Interrupted(BaseException):
    """Somebody pressed Ctrl-C, or the system asked the process to end; raised where it was, so that work is kept."""

    def __init__(self, signal: int, kept: str):
        """kept: a sentence on what becomes of the work so far."""
        super().__init__(signal)
        self.signal, self.kept = signal, kept

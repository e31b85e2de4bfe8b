"""The one error a user should ever see: what was found, what was expected, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


def reason_of(error: BaseException) -> str:
    """An exception in one line of valid Unicode, at most 300 characters."""
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


def printable(text: str) -> str:
    """The text with lone surrogates, which no encoding can write, as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_printable(text: str) -> bool:
    """Whether a text is valid Unicode: without lone surrogates, which no file can hold."""
    return printable(text) == text


def shown(value: object) -> str:
    """A value of the user's for a message: one line of at most 80 characters."""
    text = " ".join(str(value).split())
    return printable(text if len(text) <= 80 else text[:77] + "...")


class UserError(Exception):
    """A mistake of the user's or a fault of the environment; the command line prints the message, no traceback."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@contextmanager
def in_one_line(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever is raised inside the block into a UserError: `what`, the reason, and what to do.

    Only for library code that reads a user's input: an error of our own code must stay what it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {reason_of(error)}{advice and f'. {advice}'}") from error


class Interrupted(BaseException):
    """Ctrl-C, or the system asked the process to end; raised where the process is, so that work can be kept."""

    def __init__(self, signal: int, kept: str):
        """kept: a sentence on what becomes of the work so far."""
        super().__init__(signal)
        self.signal, self.kept = signal, kept

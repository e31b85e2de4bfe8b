"""The one error a user should ever see: what was found, what was expected, what to do."""


def reason_of(error: BaseException) -> str:
    """An exception in one line, of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class UserError(Exception):
    """A slip of the user's or a fault of the environment; the command line prints its message without a traceback."""


class Interrupted(BaseException):
    """Somebody pressed Ctrl-C, or the system asked the process to end; raised where it was, so that work is kept."""

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal = signal

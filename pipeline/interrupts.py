"""SIGINT, SIGTERM and SIGHUP end a command once and in order.

Before `begin` a signal ends the process at once. From then on the first one raises `Interrupted` where the command is;
signals that come while that exception is handled are only noted, so that what is written because of it is not cut off.
`deferred` holds signals back from a block, `allowed` lets them in again for a part of it.
"""

import _thread
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipeline.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_saying = _thread.allocate_lock()  # held while an announcement is on its way to the terminal
NOTHING_KEPT = "This run has left nothing to go on from; run the same command again"


class _State:
    """The state of this process."""

    phase = "starting"  # starting: nothing was done yet; running; ended: nothing is to be interrupted any more
    noted: int | None = None  # the first signal that came
    depth = 0  # blocks around the current one that hold signals back
    kept = NOTHING_KEPT
    announcement = ""  # printed when a signal is held back
    installed = False


def is_command_line(name: str) -> bool:
    """Whether the module of this `__name__` is or was loaded by the process's own command, not by a test or a child."""
    command = getattr(sys.modules["__main__"], "__file__", None) or ""
    return name == "__main__" or os.path.basename(command) == "xkd-pipeline"


def install() -> None:
    """Handle the signals, also again after a library took them over. A SIGHUP that is ignored (nohup) stays ignored."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    if not _State.installed:
        _State.installed = True
        os.register_at_fork(after_in_child=_leave_to_the_parent)
        sys.unraisablehook = _raise_again


def begin() -> None:
    """From here on a signal raises `Interrupted`."""
    _State.phase = "running"


def begun() -> bool:
    """Whether this process is a command that is running."""
    return _State.phase == "running"


def end() -> None:
    """From here on nothing is interrupted: only the closing message and the interpreter's own end are left.

    A command that a signal has ended keeps its exit code, whatever other signals come.
    """
    _State.phase = "ended"
    for number in SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL if _State.noted is None else signal.SIG_IGN)


def noted() -> int | None:
    """The first signal that came, or None."""
    return _State.noted


def keeps(what: str) -> None:
    """From here on an interrupt's message says `what` about the work so far."""
    _State.kept = what


def interrupted() -> Interrupted:
    """The exception for the signal that was noted."""
    return Interrupted(_State.noted or signal.SIGINT, _State.kept)


def check() -> None:
    """Raise `Interrupted` if a signal waits for that: one that was held back, or that a library swallowed."""
    if _State.noted is not None and _may_raise():
        raise interrupted()


@contextmanager
def deferred(announcement: str = "") -> Iterator[None]:
    """Let the block run to its end: a signal that comes meanwhile is raised after it.

    An error of the block's own has precedence. announcement: printed at once when a signal comes.
    """
    before = _State.announcement
    _State.depth += 1
    _State.announcement = announcement or before
    try:
        yield
    finally:
        _State.announcement = before
        _State.depth -= 1
        if _State.noted is not None and _saying.acquire(timeout=1):  # let the announcement finish
            _saying.release()
    check()


@contextmanager
def allowed() -> Iterator[None]:
    """A part of a deferred block, without `yield` in it, that signals do interrupt; a waiting one does so at once."""
    depth = _State.depth
    _State.depth = 0
    try:
        check()
        yield
    finally:
        _State.depth = depth


def allowing(items) -> Iterator:
    """Yield the items; the wait for each of them may be interrupted."""
    source, none = iter(items), object()
    while True:
        with allowed():
            item = next(source, none)
        if item is none:
            return
        yield item


def _handle(number: int, frame: object) -> None:
    if _State.phase == "starting":
        with suppress(OSError):  # stderr may be closed
            os.write(2, b"warning: interrupted before anything was done\n")
        os._exit(128 + number)
    first = _State.noted is None
    if first:
        _State.noted = int(number)
    if _may_raise():
        raise interrupted()
    if first and _State.announcement and _saying.acquire(blocking=False):
        # In a thread, because this one may be in the middle of printing.
        _thread.start_new_thread(_announce, (_State.announcement,))


def _announce(what: str) -> None:
    from pipeline import console

    try:
        console.say(what)
    finally:
        _saying.release()


def _may_raise() -> bool:
    return _State.phase == "running" and _State.depth == 0 and not _is_being_handled()


def _is_being_handled() -> bool:
    """Whether an `Interrupted` is being handled: some block cleans up, or writes what is to be kept."""
    error, seen = sys.exc_info()[1], set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Interrupted):
            return True
        seen.add(id(error))
        error = error.__context__
    return False


def _raise_again(unraisable, before=sys.unraisablehook) -> None:
    """Send the signal again where an `Interrupted` was raised in a place that swallows it (`__del__`, a callback).

    Other errors in such places after a signal (a library's own clean-up) are not reported.
    """
    if isinstance(unraisable.exc_value, Interrupted):
        _thread.start_new_thread(_send_soon, (unraisable.exc_value.signal,))
    elif _State.noted is None:
        before(unraisable)


def _send_soon(number: int) -> None:
    time.sleep(0.02)
    os.kill(os.getpid(), number)


def _leave_to_the_parent() -> None:
    """In a forked child: the terminal's signals come to the whole group, and the parent decides when children end."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""Chat templates: programs that come with a model, run with bounds on their time, memory and text.

The sandbox of transformers keeps them from files and the network. It bounds neither loops nor `x ~ x`, and no Python
code around it can stop one operation in C (`"x" * 10**10`). So they run in a forked process, which the system's
limits end. Forking is safe here, whatever threads torch or tokenizers have: the child runs only Python and jinja, no
tensor and no tokenizer, leaves by `_exit`, and is ended by its timer should it ever wait for another thread's lock.
"""

import gc
import mmap
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import UserError, reason_of

SECONDS = 10  # for one rendering
TEXT = 2**20  # characters that a rendering may have beyond four times those of its messages
MEMORY = 2**29  # bytes that renderings may add to those of the process, and 64 per character of the longest chat
_HEADER = struct.Struct("!?Q")  # true: the text follows, false: the reason why there is none; its bytes
_PLACE = struct.Struct("!Q")
_BUFFER = 2**16  # bytes of the pipe
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)

Chat = list[dict[str, str]]


def prints_the_date(tokenizer, chat: Chat) -> bool:
    """Whether the template's text differs from day to day."""
    days = datetime(2001, 2, 3, 4, 5, 6), datetime(2024, 11, 25, 17, 58, 59)
    one, other = (render_chats(tokenizer, [chat], ["of no data"], strftime_now=day.strftime) for day in days)
    return one != other


def render_chats(tokenizer, chats: Sequence[Chat], names: Sequence[str], **variables) -> list[str]:
    """The text of each chat, as `apply_chat_template(chat, add_generation_prompt=True, tokenize=False)` gives it.

    names: of the chats' prompts, for errors; variables: what the template reads beside the messages. Raises
    UserError that names tokenizer and prompt where the template fails or exceeds the bounds. On systems without /proc
    only time and text are bounded.
    """
    if not chats:
        return []
    texts: list[str] = []
    answer: tuple[bool, bytes] | None = (True, b"")
    with mmap.mmap(-1, _PLACE.size) as place:
        process, pipe = _forked(lambda pipe: _answer_all(tokenizer, chats, variables, place, pipe))
        try:
            while len(texts) < len(chats) and (answer := _read_answer(pipe)) and answer[0]:
                texts.append(answer[1].decode())
        finally:
            pipe.close()
            os.kill(process, signal.SIGKILL)  # one that has ended keeps id and status until it is waited for
            _, status = os.waitpid(process, 0)
        if len(texts) == len(chats):
            return texts
        name = names[_PLACE.unpack(place)[0]]
    why = answer[1].decode() if answer else _why_it_ended(status)
    raise UserError(
        f"the chat template of {getattr(tokenizer, 'name_or_path', 'the tokenizer')} cannot render prompt '{name}': "
        f"{why}. Mend the template, or set chat to false"
    )


def _forked(work: Callable[[BinaryIO], None]) -> tuple[int, BinaryIO]:
    """A process that does `work` with the writing end of a pipe: its id, and the reading end.

    Signals are held back meanwhile: our handlers must not run in the child.
    """
    reading, writing = os.pipe()
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        process = os.fork()
        if process == 0:
            _run(work, reading, writing, held_back)
    except OSError as error:
        os.close(reading)
        raise UserError(f"cannot start a process to render chat templates in: {error.strerror}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        os.close(writing)
    return process, os.fdopen(reading, "rb", _BUFFER)


def _run(work: Callable[[BinaryIO], None], reading: int, writing: int, signals: set) -> None:
    """All that the child runs: never returns, and flushes nothing that the parent had buffered."""
    code = 1
    try:
        for number in _ENDING:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        os.close(reading)
        gc.freeze()  # no garbage collection of the parent's objects, which would copy their memory
        with os.fdopen(writing, "wb", _BUFFER) as pipe:
            work(pipe)
        code = 0
    except BrokenPipeError:  # the parent is gone
        pass
    except BaseException:
        os.write(sys.__stderr__.fileno(), traceback.format_exc().encode("utf-8", "backslashreplace"))
    finally:
        os._exit(code)


def _answer_all(tokenizer, chats: Sequence[Chat], variables: dict, place: mmap.mmap, pipe: BinaryIO) -> None:
    """Write the answers, up to the first failure. Every rendering has its own time limit.

    place: shared memory that says which chat is being rendered, so that many answers can be written at once.
    """
    sizes = [sum([len(message["content"]) for message in chat]) for chat in chats]
    _limit_memory(MEMORY + 64 * max(sizes))
    for number, (chat, size) in enumerate(zip(chats, sizes, strict=True)):
        _PLACE.pack_into(place, 0, number)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        is_text, text = _render(tokenizer, chat, variables, TEXT + 4 * size)
        pipe.write(_HEADER.pack(is_text, len(text)))
        pipe.write(text)
        if not is_text:
            return


def _limit_memory(more: int) -> None:
    statm = Path("/proc/self/statm")
    if statm.is_file():
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + more
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _render(tokenizer, chat: Chat, variables: dict, longest: int) -> tuple[bool, bytes]:
    """(True, the text) or (False, the reason why there is none)."""
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **variables)
        if len(text) > longest:
            return False, f"its text has {len(text):,} characters, more than {longest:,}".encode()
        return True, text.encode()
    except UnicodeEncodeError:
        return False, b"its text is not valid Unicode"
    except MemoryError:
        return False, b"it takes too much memory"
    except Exception as error:  # an error of the template's own, or of jinja
        return False, reason_of(error).encode()


def _read_answer(pipe: BinaryIO) -> tuple[bool, bytes] | None:
    """The next answer; None where the process ended before it."""
    header = pipe.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    is_text, size = _HEADER.unpack(header)
    text = pipe.read(size)
    return (is_text, text) if len(text) == size else None


def _why_it_ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return f"it takes longer than {SECONDS} s"
    if code < 0:
        return f"the process that it ran in was ended by {signal.Signals(-code).name}"
    raise RuntimeError(f"the process that renders chat templates ended with exit code {code}")

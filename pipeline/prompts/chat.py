"""Chat templates: programs that come with a model, run with bounds on their time, memory and text.

The sandbox of transformers keeps them from files and the network. It bounds neither loops nor `x ~ x`, and no Python
code around it can stop one operation in C (`"x" * 10**10`). So they run in a forked process, which the system's
limits end. Forking is safe here, whatever threads torch or tokenizers have: the child runs only Python and jinja, no
tensor and no tokenizer, and is ended by its timer should it ever wait for another thread's lock.
"""

import gc
import resource
import signal
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.errors import UserError, is_printable, reason_of

SECONDS = 10  # for one rendering
TEXT = 2**20  # characters that a rendering may have beyond four times those of its messages
MEMORY = 2**29  # bytes that renderings may add to those of the process, and 64 per character of the longest chat
_TEXT, _REASON = b"t", b"r"  # how an answer of the child begins
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
    reading, writing = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=_answer_all, args=(tokenizer, chats, variables, reading, writing))
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # our handlers must not run in the child
    try:
        process.start()
    except OSError as error:
        raise UserError(f"cannot start a process to render chat templates in: {error.strerror}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        writing.close()
    texts: list[str] = []
    why = ""
    try:
        while len(texts) < len(chats) and not why:
            answer = reading.recv_bytes()  # not `recv`, which would unpickle what the child made of a template
            if answer[:1] == _TEXT:
                texts.append(answer[1:].decode())
            else:
                why = answer[1:].decode(errors="replace")
    except (EOFError, OSError):  # the process ended
        process.join()
        why = _why_it_ended(process.exitcode)
    finally:
        process.kill()
        process.join()
        reading.close()
    if why:
        raise UserError(
            f"the chat template of {getattr(tokenizer, 'name_or_path', 'the tokenizer')} cannot render prompt "
            f"'{names[len(texts)]}': {why}. Mend the template, or set chat to false"
        )
    return texts


def _answer_all(tokenizer, chats: Sequence[Chat], variables: dict, reading: Connection, writing: Connection) -> None:
    """What the child does: sends the answers, up to the first failure. Every rendering has its own time limit."""
    reading.close()
    for number in _ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    gc.freeze()  # no garbage collection of the parent's objects, which would copy their memory
    sizes = [sum([len(message["content"]) for message in chat]) for chat in chats]
    _limit_memory(MEMORY + 64 * max(sizes))
    with suppress(BrokenPipeError):  # the parent is gone
        for chat, size in zip(chats, sizes, strict=True):
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            is_text, text = _render(tokenizer, chat, variables, TEXT + 4 * size)
            writing.send_bytes((_TEXT if is_text else _REASON) + text.encode())
            if not is_text:
                return


def _limit_memory(more: int) -> None:
    statm = Path("/proc/self/statm")
    if statm.is_file():
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + more
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _render(tokenizer, chat: Chat, variables: dict, longest: int) -> tuple[bool, str]:
    """(True, the text) or (False, the reason why there is none)."""
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **variables)
    except MemoryError:
        return False, "it takes too much memory"
    except Exception as error:  # an error of the template's own, or of jinja
        return False, reason_of(error)
    if len(text) > longest:
        return False, f"its text has {len(text):,} characters, more than {longest:,}"
    return (True, text) if is_printable(text) else (False, "its text is not valid Unicode")


def _why_it_ended(code: int) -> str:
    if code == -signal.SIGALRM:
        return f"it takes longer than {SECONDS} s"
    if code < 0:
        return f"the process that it ran in was ended by {signal.Signals(-code).name}"
    raise RuntimeError(f"the process that renders chat templates ended with exit code {code}")

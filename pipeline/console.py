"""What a person sees: results on stdout; messages, questions and progress on stderr; libraries kept quiet.

A result is what the command was asked for: its tables, its closing facts, its list. All else goes to stderr, so that a
pipe or a file gets the results alone. Without a terminal nothing is wrapped or redrawn, unless COLUMNS gives a width.
"""

import os
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Sequence
from contextlib import closing, contextmanager

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipeline import interrupts
from pipeline.errors import Interrupted
from pipeline.streams import STDERR, STDOUT, Stream

PLAIN = bool(os.environ.get("NO_COLOR"))  # no escape codes at all: no colours, no bold, nothing that is redrawn
_PATIENCE = 10  # seconds before the first line of progress where it cannot be redrawn: short runs only have a last line
_SILENCE = 30  # most seconds between two such lines
_NOTHING = Text()
_INDENT = 2  # of values below their names


def make_console(stream: Stream = STDERR, **options) -> Console:
    """A console on stdout or stderr."""
    plain = {"color_system": None, "force_terminal": False} if PLAIN else {}
    return Console(file=stream, stderr=stream is STDERR, highlight=False, **plain, **options)


console = make_console()  # messages
results = make_console(STDOUT)


def quiet_libraries() -> None:
    """Before the heavy imports: no banners, no foreign progress bars, no warnings that a user cannot act on."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|accelerate)\b")


@contextmanager
def muted():
    """Hide what libraries (C++ code included) write to the terminal; show it if the block fails."""
    STDOUT.flush()
    STDERR.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 1)
        os.dup2(captured.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        except Interrupted:
            failed = False
            raise
        finally:
            STDOUT.flush()
            STDERR.flush()
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
            if failed:
                captured.seek(0)
                say(captured.read().decode(errors="replace")[-4000:])


# Progress


@contextmanager
def progress(description: str, total: int):
    """Yields `advance(n=1, note=None)`. A bar on a terminal; else a line per tenth or half minute."""
    redrawn = console.is_terminal and not console.is_dumb_terminal
    with (_bar if redrawn else _lines)(description, total) as move:

        def advance(n: int = 1, note: str | None = None) -> None:
            interrupts.check()
            move(n, note)

        yield advance


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task):
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else _per_second(speed), style="dim")


@contextmanager
def _bar(description: str, total: int):
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(escape(description), total=total, note="")
        yield lambda n, note: bar.update(task, advance=n, **({} if note is None else {"note": escape(note)}))


class _Lines:
    """Progress as lines, for logs."""

    def __init__(self, description: str, total: int):
        self.description, self.total = description, total
        self.done, self.note = 0, ""
        self.before: int | None = None  # what an earlier run had done, reported by the first call
        self.started = time.monotonic()
        self.said, self.tenth = self.started, 0  # when the last line was printed, and at which tenth

    def move(self, n: int, note: str | None) -> None:
        if self.before is None:
            self.before = n if n > 1 else 0
            self.tenth = self._tenth(self.before)
        self.done += n
        self.note = self.note if note is None else note
        now = time.monotonic()
        due = self._tenth(self.done) > self.tenth or now - self.said >= _SILENCE
        if due and self.done < self.total and now - self.started >= _PATIENCE:
            self._say(now, closing=False)

    def close(self) -> None:
        self._say(time.monotonic(), closing=True)

    def _tenth(self, done: int) -> int:
        return done * 10 // max(self.total, 1)

    def _say(self, now: float, closing: bool) -> None:
        self.said, self.tenth = now, self._tenth(self.done)
        made, seconds = self.done - (self.before or 0), now - self.started
        parts = [f"{self.done:,}/{self.total:,}" + ("" if closing else f" ({100 * self.done // self.total} %)")]
        if made and seconds:
            parts.append(_per_second(made / seconds))
        if closing:
            parts.append(_duration(seconds))
        elif made:
            parts.append(f"about {_duration((self.total - self.done) * seconds / made)} left")
        say(f"{self.description}: {', '.join([*parts, *filter(None, [self.note])])}")


@contextmanager
def _lines(description: str, total: int):
    with closing(_Lines(description, total)) as lines:
        yield lines.move


def _per_second(speed: float) -> str:
    return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s" if speed >= 0.1 else f"{speed:.2g}/s"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


# Messages


def say(message: str) -> None:
    """One plain line; nothing in it is markup."""
    _print(console, message)


def warn(message: str) -> None:
    """One line that asks for attention, however long, so that it can be searched and copied."""
    console.print(f"[yellow]warning:[/yellow] {escape(message)}", soft_wrap=True)


def agrees(question: str) -> bool:
    """Whether somebody at a terminal says yes."""
    if not STDERR.isatty():
        return False
    console.print(f"{question} [y/N]: ", markup=False, end="")
    return sys.stdin is not None and sys.stdin.readline().strip().lower() in ("y", "yes")


# Results


def result(message: str, mark: str = "", style: str = "") -> None:
    """One line of results. mark: what stands before it, in that style; further lines are indented to the message."""
    _print(results, message, lead=Text(mark, style))


def write(text: str) -> None:
    """Write a text to stdout unchanged."""
    STDOUT.write(text)
    STDOUT.flush()


def facts(title: str, rows: Sequence[tuple[str, object]]) -> None:
    """A closing summary of names and values. Words are never broken; a path stays on one line, to be copied."""
    _print(results, title, style="bold")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        _print(results, value, lead=Text(f"  {name:{width}}  "))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], names: int = 1) -> None:
    """A table; the first `names` columns say which row it is and are left-aligned, the others right-aligned.

    No cell is ever broken. A table that is too wide becomes two tables with the names in each; if two are still too
    wide, the names get lines of their own, with the values below them.
    """
    cells = [list(columns), *([" ".join(str(cell).splitlines()) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    room, lead = _room(results) or sys.maxsize, sum(widths[:names]) + 3 * names
    groups = _groups(widths[names:], room - lead)
    stacked = len(groups) > 2 or max((sum(group) + 3 * len(group) for group in groups), default=0) > room - lead
    if stacked:
        groups = _groups(widths[names:], room - _INDENT)
    _print(results, title, style="bold")
    results.print()
    first = names
    for group in groups or [[]]:
        last = first + len(group)
        _draw([(row[:names], row[first:last]) for row in cells], (widths[:names], group), stacked, room)
        first = last


def size(count: float) -> str:
    """Bytes for people."""
    unit, name = pick_unit_and_suffix(int(count), ["bytes", "KiB", "MiB", "GiB", "TiB"], 1024)
    return f"{count / unit:,.{0 if unit == 1 else 1}f} {name}"


def _room(console: Console) -> int | None:
    """Columns of the terminal, or COLUMNS; None: unlimited."""
    is_set = os.environ.get("COLUMNS", "").isdigit()
    return console.width if is_set or console.file.isatty() else None


def _print(console: Console, value: object, lead: Text = _NOTHING, style: str = "") -> None:
    """Print a value after `lead`. Text is folded between words and indented; a path or a Text is never folded."""
    room = _room(console)
    lines: list[str | Text] = [value if isinstance(value, Text) else str(value)]
    if isinstance(value, str) and room and room - lead.cell_len >= 20:
        fold = textwrap.TextWrapper(room - lead.cell_len, break_long_words=False, break_on_hyphens=False)
        lines = [part for line in value.splitlines() or [""] for part in fold.wrap(line) or [""]]
    for number, line in enumerate(lines):
        start = Text(" " * lead.cell_len) if number else lead
        console.print(Text.assemble(start, (line, style) if isinstance(line, str) else line), soft_wrap=True)


def _groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """The widths in groups that fit into `room`, at least one in each."""
    groups: list[list[int]] = []
    for width in widths:
        if groups and sum(groups[-1]) + width + 3 * (len(groups[-1]) + 1) <= room:
            groups[-1].append(width)
        else:
            groups.append([width])
    return groups


def _draw(rows: Sequence[tuple], widths: tuple, stacked: bool, room: int) -> None:
    """Print rows of names and values, the headings first; widths: of both."""
    lines: list[str] = []
    fits = _INDENT + 2 + sum(widths[1]) < room  # else left-aligned, so that values begin where they can be seen
    for names, values in rows:
        left = "   ".join(_pad(name, width) for name, width in zip(names, widths[0], strict=True))
        right = "   ".join(_pad(value, width, right=fits) for value, width in zip(values, widths[1], strict=True))
        both = [f"  {left}", f"{' ' * _INDENT}  {right}"] if stacked else [f"  {left}   {right}"]
        lines += [line.rstrip() for line in both]
    headings = 2 if stacked else 1
    rule = "─" if (STDOUT.encoding or "").lower().startswith("utf") else "-"
    lines.insert(headings, " " + rule * min(max(map(cell_len, lines)), room - 1))
    for number, line in enumerate(lines):
        results.print(Text(line, "dim" if number <= headings else ""), soft_wrap=True)
    results.print()


def _pad(text: str, width: int, right: bool = False) -> str:
    return " " * (width - cell_len(text)) + text if right else set_cell_size(text, width)

"""What a person sees: one console, progress with rate and estimate, closing tables; libraries kept quiet."""

import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, suppress

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline import interrupts
from pipeline.errors import Interrupted

PLAIN = bool(os.environ.get("NO_COLOR"))  # no escape codes at all: no colours, no bold, nothing that is redrawn


class StandardError:
    """sys.stderr as long as somebody reads it. What is written afterwards goes nowhere: that is no error of the run."""

    @property
    def stream(self):
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # also while a progress bar stands before it

    def write(self, text: str) -> int:
        return self._unless_gone("write", text) or 0

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
        except OSError:  # the reader of a pipe, or the terminal, is gone: libraries and the interpreter write there too
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def make_console(**options) -> Console:
    """A console on stderr."""
    plain = {"color_system": None, "force_terminal": False} if PLAIN else {}
    return Console(file=StandardError(), stderr=True, highlight=False, **plain, **options)


console = make_console()


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
    """Keep what libraries (C++ code included) write to the terminal away from it; show it if the block fails."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 1)
        os.dup2(heard.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        except Interrupted:
            failed = False
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
            if failed:
                heard.seek(0)
                say(heard.read().decode(errors="replace")[-4000:])


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task):
        from rich.text import Text

        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s", style="dim")


@contextmanager
def progress(description: str, total: int):
    """A bar; yields `advance(n=1, **shown)`. On a terminal it is redrawn, in a log it leaves one closing line."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(escape(description), total=total, note="")

        def advance(n: int = 1, note: str | None = None) -> None:
            interrupts.check()
            bar.update(task, advance=n, **({} if note is None else {"note": escape(note)}))

        yield advance


def say(message: str) -> None:
    """One plain line; nothing in it is markup."""
    console.print(message, markup=False)


def warn(message: str) -> None:
    """One line that asks for attention, however long, so that it can be searched and copied."""
    console.print(f"[yellow]warning:[/yellow] {escape(message)}", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], whole: bool = False) -> None:
    """A closing table; first column left, the others right.

    whole: no cell is broken, however narrow the terminal, so that names can be copied.
    """
    console.print(f"[bold]{escape(title)}[/bold]")
    drawn = Table(header_style="dim", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        drawn.add_column(escape(column), justify="right" if number else "left", no_wrap=whole)
    for row in rows:
        drawn.add_row(*(escape(str(cell)) for cell in row))
    if whole:  # wider than the terminal if need be, which then breaks the lines itself
        natural = Measurement.get(console, console.options.update(max_width=1000), drawn).maximum
        console.width = max(natural, console.width)
    console.print(drawn)


def facts(title: str, rows: Sequence[tuple[str, object]]) -> None:
    """A closing summary of names and values; paths stay on one line so that they can be copied."""
    console.print(f"[bold]{escape(title)}[/bold]")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"  {name:{width}}  {value}", markup=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes for people."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1024 and power + 1 < len(units):
        count, power = count / 1024, power + 1
    return f"{count:,.{min(power, 1)}f} {units[power]}"

"""`xkd-pipeline` in processes of its own that start at once: forked from one that has imported the heavy libraries.

Each is a real process with its own signals, environment and files, and can be killed for real.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pipeline.cli.app", "stages.generate", "stages.distill", "pipeline.engines.hf"])


def _run(
    arguments: list, environment: dict[str, str], cwd: str, log: str, function: Callable | None, errors: str | None
) -> None:
    os.setsid()
    for descriptor, file in ((0, os.devnull), (1, log), (2, errors or log)):
        os.dup2(os.open(file, os.O_CREAT | os.O_RDWR | os.O_APPEND), descriptor)
    os.environ.clear()  # the forkserver's own, which is as old as the first test that needed it
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["xkd-pipeline", *map(str, arguments)]
    import torch

    from pipeline import console
    from pipeline.cli import app
    from pipeline.streams import STDOUT

    width = int(environment.get("COLUMNS", 200))
    console.console, console.results = console.make_console(width=width), console.make_console(STDOUT, width=width)
    console.quiet_libraries()
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGHUP):  # which may be ignored where the tests were started
        signal.signal(number, signal.SIG_DFL)
    function(*arguments) if function else app.main()


@dataclass
class Run:
    """A started command."""

    process: multiprocessing.Process
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, as a shell counts: 128 + the signal that ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.output}"
        code = self.process.exitcode
        return 128 - code if code < 0 else code

    def send(self, *numbers: signal.Signals, group: bool = False) -> None:
        """Send signals, one at once after the other. group: also to its child processes, as a terminal does."""
        for number in numbers:
            with suppress(ProcessLookupError):  # it may be over
                (os.killpg if group else os.kill)(self.process.pid, number)

    def storm(self, *numbers: signal.Signals) -> None:
        """Send signals over and over until it is over."""
        while self.process.is_alive():
            self.send(*numbers)
            time.sleep(0.001)

    def wait_for(self, happened, seconds: float = 60) -> None:
        """Return as soon as `happened()`, which must be before the command ends."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.is_alive(), f"it ended too soon: {self.output}"
            assert time.monotonic() < deadline, self.output
            time.sleep(0.002)


def start(
    *arguments: object,
    log: Path,
    cwd: Path = ROOT,
    function: Callable | None = None,
    errors: Path | None = None,
    **environment: str,
) -> Run:
    """Start `xkd-pipeline ARGUMENTS`; what it prints is appended to `log`, or to `errors` where it goes to stderr.

    function: called in place of it.
    """
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = _CONTEXT.Process(
        target=_run, args=([*arguments], own, str(cwd), str(log), function, errors and str(errors))
    )
    process.start()
    return Run(process, log)


def run(*arguments: object, log: Path, **options) -> tuple[int, str]:
    """Run `xkd-pipeline ARGUMENTS` to its end; exit code, and what it printed."""
    started = start(*arguments, log=log, **options)
    before = len(started.output)
    return started.wait(), started.output[before:]


def finished(*arguments: object, **options) -> subprocess.CompletedProcess:
    """`xkd-pipeline ARGUMENTS` run to its end, as `subprocess.run` would tell it."""
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        code = start(*arguments, log=log, errors=errors, **options).wait(280)
        return subprocess.CompletedProcess(arguments, code, log.read_text(), errors.read_text())


def whole_checkpoints(runs: Path) -> list[Path]:
    """Checkpoints that are written to their end: a kill while the last file of one is written leaves it half."""

    def is_whole(state: Path) -> bool:
        with suppress(json.JSONDecodeError, FileNotFoundError):
            json.loads(state.read_text())
            return True
        return False

    folders = [Path(folder) for folder, _, _ in os.walk(runs)]  # which may be removed meanwhile
    return [folder for folder in folders if is_whole(folder / "trainer_state.json")]

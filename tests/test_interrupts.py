"""What holds when a command is interrupted, or whoever reads what it says goes away: real processes, real signals."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT, make_prompts
from tests.processes import start

NOTHING = "interrupted. This run has left nothing to go on from; run the same command again"
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")


def fresh(*arguments: object, entry: tuple = (sys.executable, "-m", "pipeline.cli"), **options) -> subprocess.Popen:
    """The command in a process of its own from the first instruction on, with default signals."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **options.pop("env", {})}

    handlers = {number: signal.SIG_DFL for number in ENDING} | options.pop("signals", {})

    def handle():
        for number, handler in handlers.items():
            signal.signal(number, handler)

    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*map(str, [*entry, *arguments])], env=environment, preexec_fn=handle, **options)


def wait_until(happened: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    """Until `happened()`, which must be before the process ends."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, f"it ended too soon: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for this signal."""
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


def script(tmp_path: Path) -> tuple:
    """What `pip install` makes of the entry point."""
    path = tmp_path / "xkd-pipeline"
    path.write_text(
        "import sys\nfrom pipeline.cli.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    return sys.executable, path


# The start


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
@pytest.mark.parametrize("entry", ["module", "script"])
def test_a_signal_during_the_start_ends_it_with_one_line(tmp_path, number, entry):
    """While typer is imported, which takes its time here."""
    reached = tmp_path / "reached"
    slow = f"import pathlib, time\npathlib.Path({str(reached)!r}).touch()\ntime.sleep(60)\n"
    (tmp_path / "typer.py").write_text(slow)
    entries = {"entry": script(tmp_path)} if entry == "script" else {}
    process = fresh("params", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, **entries)
    wait_until(reached.exists, process)
    process.send_signal(number)
    said = process.communicate(timeout=50)
    assert (process.returncode, said) == (128 + number, ("", "warning: interrupted before anything was done\n"))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("library", ["libtorch_cpu", "libarrow", "tokenizers"])
def test_a_signal_while_libraries_are_imported_ends_it_with_one_line(tmp_path, library):
    process = fresh("distill", "--selection", tmp_path / "absent")
    wait_until(lambda: library in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)
    assert (process.returncode, said[0]) == (130, "")
    assert said[1].splitlines() == [f"warning: {NOTHING}"]


# One interrupt, and only one


def python(code: str, **options) -> subprocess.CompletedProcess:
    """A small command that uses `pipeline.interrupts`."""
    begin = (
        "import os, signal, time\nfrom pipeline import interrupts\nfrom pipeline.errors import Interrupted\n"
        "interrupts.install(); interrupts.begin()\n"
        "def send(number=signal.SIGINT):\n    os.kill(os.getpid(), number)\n    time.sleep(0.01)\n"
    )
    process = fresh("-c", begin + code, entry=(sys.executable,), **options)
    said = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def test_what_runs_because_of_an_interrupt_is_not_interrupted():
    done = python("""
class Releases:
    def __exit__(self, *error): send(); print("released")
    def __enter__(self): pass
def answers():
    try: yield
    finally: send(); print("closed")
try:
    with Releases():
        found = answers(); next(found)
        try: send(signal.SIGTERM)
        finally:
            found.close(); send()
            try: raise OSError
            except OSError: send(signal.SIGHUP); print("flushed")
except Interrupted as error:
    print(error.signal)
""")
    assert done.stdout.split() == ["closed", "flushed", "released", "15"], done


def test_a_deferred_block_runs_to_its_end_and_its_allowed_parts_do_not():
    done = python("""
try:
    with interrupts.deferred():
        with interrupts.deferred(): send()
        print("whole")
    print("never")
except Interrupted: print("after")
interrupts._State.noted = None
try:
    with interrupts.deferred():
        with interrupts.allowed():
            send(); print("never")
except Interrupted: print("within")
interrupts._State.noted = None
try:
    with interrupts.deferred():
        send(); print("held back")
        with interrupts.allowed(): print("never")
except Interrupted: print("at once")
""")
    assert done.stdout.split("\n")[:-1] == ["whole", "after", "within", "held back", "at once"], done


def test_an_error_of_a_deferred_block_goes_first():
    done = python("""
try:
    with interrupts.deferred():
        send(); raise OSError
except OSError: print("error")
""")
    assert done.stdout == "error\n", done


@pytest.mark.parametrize(
    "swallow",
    [
        "class Last:\n    def __del__(self): send()\nLast()",
        "import weakref\nclass Last: pass\nheld = Last()\nlast = weakref.ref(held, lambda _: send())\ndel held",
        "import ctypes\nctypes.CFUNCTYPE(None)(send)()",
    ],
    ids=["__del__", "weak reference", "C callback"],
)
def test_an_interrupt_where_nothing_can_be_raised_comes_soon_after(swallow):
    done = python(f"""
try:
    exec('''{swallow}''')
    time.sleep(30)
except Interrupted as error: print("raised", error.signal)
""")
    assert (done.stdout, done.stderr, done.returncode) == ("raised 2\n", "", 0)


def test_an_interrupt_that_a_library_swallows_is_raised_at_the_next_step_or_signal():
    done = python("""
def swallow():
    try: send()
    except BaseException: pass
swallow()
try:
    from pipeline import console
    with console.progress("steps", 2) as advance: advance()
except Interrupted: print("at the next step")
swallow()
try: send(signal.SIGTERM)
except Interrupted as error: print("at the next signal", error.signal)
""")
    assert done.stdout.splitlines() == ["at the next step", "at the next signal 2"], done


def test_forked_children_leave_the_terminals_signals_to_the_parent():
    done = python("""
child = os.fork()
if not child:
    names = ("SIGINT", "SIGHUP", "SIGTERM")
    print(*(signal.Handlers(signal.getsignal(getattr(signal, name))).name for name in names), flush=True)
    send(); os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), interrupts.noted())
""")
    assert done.stdout.splitlines() == ["SIG_IGN SIG_IGN SIG_DFL", "7 None"], done


def test_a_hangup_that_is_ignored_stays_ignored():
    """As under nohup."""
    code = "import signal\nfrom pipeline import interrupts\ninterrupts.install()\nsignal.raise_signal(signal.SIGHUP)"
    process = fresh("-c", code, entry=(sys.executable,), signals={signal.SIGHUP: signal.SIG_IGN})
    assert (process.communicate(timeout=60), process.returncode) == (("", ""), 0)


def test_a_library_that_takes_the_signals_over_is_undone_by_installing_again():
    done = python("""
signal.signal(signal.SIGTERM, lambda *_: print("theirs"))
interrupts.install()
try: send(signal.SIGTERM)
except Interrupted: print("ours")
""")
    assert done.stdout == "ours\n", done


# What the message says


@needs_proc
@pytest.mark.slow
def test_a_stage_that_keeps_nothing_does_not_say_that_it_does(tmp_path):
    out = "--out", tmp_path / "prompts.parquet", "--tokenizer", tmp_path / "tokenizer"
    sizes = [option for split in ("teach", "train") for option in ("--set", f"prepare.{split}=100000")]
    process = start("prepare", *out, *sizes, "--params", os.devnull, log=tmp_path / "log")
    process.wait_for(lambda: catches(process.process.pid, signal.SIGHUP))
    process.storm(signal.SIGINT)
    assert process.wait() == 130
    assert process.output.splitlines() == [f"warning: {NOTHING}"] and not (tmp_path / "tokenizer").exists()


def rows_in(store: Path) -> int:
    return sum(pq.read_metadata(shard).num_rows for shard in store.glob("*/*/part-*.parquet"))


def generate(teacher: Path, folder: Path, samples: int = 64) -> tuple:
    prompts = make_prompts(folder / "prompts.parquet", train=100)
    return (
        "generate", "--teacher", teacher, "--prompts", prompts, "--out", folder / "out", "--store", folder / "store",
        "--engine", "hf", "--template", "{prompt}", "--samples", samples, "--max-tokens", 40, "--params", os.devnull,
        "--set", "generate.rows_per_shard=100",
    )  # fmt: skip


# Nobody reads it any more


class Terminal:
    """The other end of a terminal that a process has to itself."""

    def __init__(self):
        self.ours, self.theirs = pty.openpty()

    def start(self, *arguments: object, **options) -> subprocess.Popen:
        ends = {"stdin": self.theirs, "stdout": self.theirs, "stderr": self.theirs, "text": False}
        process = fresh(*arguments, start_new_session=True, **ends | options)
        os.close(self.theirs)
        return process

    def read(self) -> bytes:
        """All that is said until nobody speaks any more."""
        heard = b""
        while True:
            try:
                part = os.read(self.ours, 65536)
            except OSError:  # how a terminal ends on Linux
                return heard
            if not part:
                return heard
            heard += part


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["hangup", "nohup"])
def test_a_terminal_that_goes_away(teacher, tmp_path, ignored):
    """With SIGHUP it ends and keeps what was made; where that is ignored the run goes on without a reader."""
    command, terminal = generate(teacher, tmp_path, samples=16), Terminal()
    process = terminal.start(*command, signals={signal.SIGHUP: signal.SIG_IGN} if ignored else {})
    wait_until(lambda: rows_in(tmp_path / "store") > 0, process)
    os.close(terminal.ours)
    if not ignored:
        process.send_signal(signal.SIGHUP)
    assert process.wait(120) == (0 if ignored else 129)
    if ignored:
        assert (tmp_path / "out" / "manifest.json").is_file()
    assert rows_in(tmp_path / "store") > 100


@pytest.mark.slow
def test_a_reader_of_stderr_that_ends_is_no_error_of_the_run(teacher, tmp_path):
    ours, theirs = os.pipe()
    process = fresh(*generate(teacher, tmp_path, samples=2), stderr=theirs)
    os.close(theirs)
    os.close(ours)
    assert process.communicate(timeout=120)[0].startswith("teacher cached\n") and process.returncode == 0
    assert (tmp_path / "out" / "manifest.json").is_file() and rows_in(tmp_path / "store") == 200
    ours, theirs = os.pipe()
    process = fresh("distill", "--selection", tmp_path / "absent", stderr=theirs)
    os.close(theirs)
    os.close(ours)
    assert process.communicate(timeout=120)[0] == "" and process.returncode == 2, "its own exit code stays"


def test_a_reader_of_stdout_that_ends_is_no_traceback():
    for command in (("params", "--params", os.devnull), ("--version",)):  # more than a pipe holds at once, and less
        ours, theirs = os.pipe()
        os.close(ours)
        process = fresh(*command, stdout=theirs, env={"PYTHONUNBUFFERED": ""})
        os.close(theirs)
        assert (process.communicate(timeout=60)[1], process.returncode) == ("", 1), command
    ours, theirs = os.pipe()
    os.close(ours)
    process = fresh("params", "--params", os.devnull, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert process.wait(60) == 0, "the reader of both has seen enough"


@pytest.mark.slow
def test_a_reader_of_stdout_that_ends_is_no_error_of_a_stage(teacher, tmp_path):
    """Its files are whole, and DVC would take another exit code for a failure."""
    ours, theirs = os.pipe()
    os.close(ours)
    process = fresh(*generate(teacher, tmp_path, samples=2), stdout=theirs)
    os.close(theirs)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "Traceback" not in said and "sampling" in said
    assert (tmp_path / "out" / "manifest.json").is_file() and rows_in(tmp_path / "store") == 200


# Escape codes


@pytest.mark.slow
def test_with_no_color_there_is_no_escape_code(tmp_path):
    """On a terminal, in help, in errors of the command line, in our own, and in what a stage says."""
    small = [f"--set=prepare.{split}=5" for split in ("teach", "train", "validation", "test")]
    commands = {
        ("--help",): 0, ("prepare", "--help"): 0, ("prepare", "--nonsense"): 2, ("distill", "--selection", "absent"): 2,
        ("prepare", *small, "--params", os.devnull, "--out", tmp_path / "prompts.parquet", "--tokenizer",
         tmp_path / "tokenizer"): 0,
    }  # fmt: skip
    for command, code in commands.items():
        terminal = Terminal()
        process = terminal.start(*command, env={"NO_COLOR": "1", "TERM": "xterm-256color", "FORCE_COLOR": "1"})
        said = terminal.read()
        assert process.wait(60) == code and said.strip() and b"\x1b" not in said, (command, said)
    terminal = Terminal()
    process = terminal.start("--help", env={"NO_COLOR": "", "TERM": "xterm-256color"})
    assert b"\x1b[1m" in terminal.read() and process.wait(60) == 0, "empty is as if it were not there"


@pytest.mark.parametrize(
    ("terminal", "variables", "bold"),
    [(True, {}, True), (True, {"NO_COLOR": "1"}, False), (False, {}, False)],
    ids=["terminal", "NO_COLOR", "no terminal"],
)
def test_the_set_up_is_bold_on_a_terminal_only(tmp_path, terminal, variables, bold):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to("/bin/true")
    variables |= {"XKD_VENV": str(tmp_path / "venv"), "XKD_ENGINE": "nonsense"}
    if terminal:
        screen = Terminal()
        process = screen.start("setup", entry=(ROOT / "xkd",), env={"NO_COLOR": "", **variables})
        said = screen.read()
    else:
        process = fresh("setup", entry=(ROOT / "xkd",), env={"NO_COLOR": "", **variables}, text=False)
        said = process.communicate(timeout=60)[1]
    assert process.wait(60) == 2 and b"XKD_ENGINE is 'nonsense'" in said
    assert (b"\x1b" in said) == bold, said

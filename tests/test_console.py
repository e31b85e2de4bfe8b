"""What holds for what is printed: where it goes, that it is readable at any width, and that progress can be logged."""

import io
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import console
from pipeline.errors import Interrupted
from tests.conftest import ROOT, run_cli

NAMES = ["baseline-forward-kl-seed-0", "x-forward-kl-frozen-reward-seed-0", "x-reverse-kl-joint-seed-0"]
COLUMNS = ("model", "greedy", "sampled", "KL, nats a token", "distinct-1", "Self-BLEU")
ROWS = [(name, "77.5 [73.5, 81.8]", "48.8 [44.0, 53.3]", "0.041 [0.031, 0.051]", "0.51", "12.3") for name in NAMES]


@pytest.fixture
def table(monkeypatch, capsys):
    """What a table of this width looks like, line by line."""

    def draw(width: int | None, *table, **options) -> list[str]:
        monkeypatch.delenv("COLUMNS", raising=False)
        if width:
            monkeypatch.setenv("COLUMNS", str(width))
        console.table(*table, **options)
        said = capsys.readouterr()
        assert said.err == ""
        return said.out.splitlines()

    return draw


def test_results_are_on_stdout_and_words_on_stderr(capsys):
    console.result("all is well")
    console.facts("made", [("model", Path("a/b"))])
    console.say("loading")
    console.warn("careful")
    with console.progress("steps", 1) as advance:
        advance()
    said = capsys.readouterr()
    assert said.out.splitlines() == ["all is well", "made", "  model  a/b"]
    assert said.err.splitlines()[:2] == ["loading", "warning: careful"] and "steps: 1/1" in said.err


# Width


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_is_no_wider_than_the_terminal_and_no_cell_is_broken(table, width):
    lines = table(width, "scores", COLUMNS, ROWS)
    assert max(map(len, lines)) <= width
    for row in ROWS:
        for cell in row:
            assert any(re.search(rf"(^|  ){re.escape(cell)}($|  )", line) for line in lines), cell
    for heading in COLUMNS:
        assert any(heading in line for line in lines)


def test_a_wide_table_becomes_two_with_the_names_in_each(table):
    few = COLUMNS[:4], [row[:4] for row in ROWS]
    lines = table(80, "scores", *few)
    starts = [line.split()[0] for line in lines if line.startswith("  ")]
    assert starts == ["model", *NAMES] * 2
    lines = table(100, "scores", ("result", *few[0]), [("data", *row) for row in few[1]], names=2)
    assert [line.split()[:2] for line in lines if line.startswith("  ")] == [
        ["result", "model"], *(["data", name] for name in NAMES)
    ] * 2  # fmt: skip


def test_where_two_do_not_do_the_values_stand_below_the_names(table):
    assert table(80, "scores", COLUMNS, ROWS[:2]) == [
        "scores",
        "",
        "  model",
        "               greedy             sampled       KL, nats a token   distinct-1",
        " " + "─" * 77,
        "  baseline-forward-kl-seed-0",
        "    77.5 [73.5, 81.8]   48.8 [44.0, 53.3]   0.041 [0.031, 0.051]         0.51",
        "  x-forward-kl-frozen-reward-seed-0",
        "    77.5 [73.5, 81.8]   48.8 [44.0, 53.3]   0.041 [0.031, 0.051]         0.51",
        "",
        "  model",
        "    Self-BLEU",
        " " + "─" * 35,
        "  baseline-forward-kl-seed-0",
        "         12.3",
        "  x-forward-kl-frozen-reward-seed-0",
        "         12.3",
        "",
    ]


def test_what_fits_is_one_table_and_without_a_terminal_everything_fits(table):
    few = [row[:3] for row in ROWS]
    assert len(table(80, "scores", COLUMNS[:3], few)) == len(few) + 5
    assert len(table(None, "scores", COLUMNS, ROWS)) == len(ROWS) + 5
    assert max(map(len, table(None, "x" * 90, ("a", "b"), [("y" * 200, "z" * 200)]))) == 2 + 200 + 3 + 200 + 1


def test_names_that_are_wider_than_the_terminal_stay_whole(table):
    name = "/home/somebody/" + "x" * 80
    lines = table(80, "files", ("file", "size", "why"), [(name, "1.0 KiB", "nothing refers to it"), ("b", "2", "c")])
    assert lines[2:] == [
        "  file",
        "       size                    why",
        " " + "─" * 79,
        f"  {name}",
        "    1.0 KiB   nothing refers to it",
        "  b",
        "          2                      c",
        "",
    ]


def test_values_that_are_wider_than_the_terminal_begin_where_they_can_be_seen(table):
    lines = table(80, "files", ("file", "why"), [("a", "x" * 90), ("b", "short")])
    assert lines[2:] == ["  file", "    why", " " + "─" * 79, "  a", "    " + "x" * 90, "  b", "    short", ""]


def test_wide_characters_and_line_breaks_do_not_shift_columns(table):
    lines = table(80, "t", ("name", "n"), [("日本語", 1), ("ab", 22), ("a\nb", 3)])
    assert lines[4:7] == ["  日本語    1", "  ab       22", "  a b       3"]


def test_facts_fold_between_words_and_never_in_a_path(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    path = Path("a folder/" * 9)
    console.facts("facts", [("length", "the mean of all the responses in the store"), ("page", path)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  length  the mean of all the responses",
        "          in the store",
        f"  page    {path}",
    ]


def test_a_stream_of_another_encoding_gets_escapes_and_no_error(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.table("t ‖", ("name",), [("é",)])
    console.result("\udc80")
    sys.stdout.flush()
    assert raw.getvalue().decode("ascii").splitlines() == [
        r"t \u2016", "", "  name", " " + "-" * 6, r"  \xe9", "", r"\udc80",
    ]  # fmt: skip


# Progress without a terminal


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when they are told to."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(console, "time", clock)
    return clock


def walk(clock, total: int, seconds: float, each: int = 1, before: int = 0) -> None:
    """Progress of `total` steps that take `seconds` each."""
    with console.progress("steps", total) as advance:
        if before:
            advance(before)
        for _ in range(before, total, each):
            clock.now += seconds * each
            advance(each, note="loss 1.5")


def test_a_short_run_has_its_closing_line_alone(clock, capsys):
    walk(clock, 40, 0.2)
    assert capsys.readouterr().err.splitlines() == ["steps: 40/40, 5.0/s, 8.0 s, loss 1.5"]


def test_a_long_run_has_a_line_at_each_tenth(clock, capsys):
    walk(clock, 400, 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "steps: 40/400 (10 %), 2.0/s, about 3 min left, loss 1.5"
    assert [line.split("(")[1][:4] for line in lines[:-1]] == [f"{tenth}0 %" for tenth in range(1, 10)]
    assert lines[-1] == "steps: 400/400, 2.0/s, 3 min, loss 1.5"


def test_a_slow_run_has_a_line_each_half_minute(clock, capsys):
    walk(clock, 10_000, 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "steps: 30/10,000 (0 %), 1.0/s, about 2 h 46 min left, loss 1.5"
    counts = [0, *(int(line.split()[1].split("/")[0].replace(",", "")) for line in lines)]
    assert max(b - a for a, b in pairwise(counts)) == 30 and 1000 in counts


def test_what_was_done_before_counts_for_no_rate_and_no_line(clock, capsys):
    walk(clock, 100, 1.0, before=55)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "steps: 65/100 (65 %), 1.0/s, about 35 s left, loss 1.5"
    assert lines[-1].startswith("steps: 100/100, 1.0/s, 45 s")


def test_a_run_that_fails_says_how_far_it_came_and_a_signal_is_raised_at_a_step(clock, capsys, monkeypatch):
    monkeypatch.setattr(console.interrupts._State, "phase", "running")
    with pytest.raises(Interrupted), console.progress("steps", 100) as advance:
        advance(1)
        monkeypatch.setattr(console.interrupts._State, "noted", 2)
        advance(1)
    assert capsys.readouterr().err.startswith("steps: 1/100")


def test_nothing_to_do_is_no_error(clock, capsys):
    walk(clock, 0, 1.0)
    assert capsys.readouterr().err == "steps: 0/0, 0.0 s\n"


# Streams that end


def test_a_full_disk_under_stdout_is_said_and_changes_the_exit_code():
    command = [sys.executable, "-m", "pipeline.cli", "params"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (
        done.returncode == 1
        and done.stderr == "warning: could not print everything on stdout: No space left on device\n"
    )


def test_a_process_without_stdout_or_stderr_is_none_that_fails():
    command = f"cd {ROOT} && exec {sys.executable} -m pipeline.cli params"
    for closed, code in ((">&-", 0), ("2>&-", 0)):
        done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_a_command_prints_no_escape_code_where_there_is_no_terminal():
    done = run_cli("params", "--set", "seed=x")
    assert "\x1b" not in done.stdout + done.stderr and done.returncode == 2

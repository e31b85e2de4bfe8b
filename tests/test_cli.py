"""What holds for the command line: quick help with examples, and short errors that say what to do."""

import json
import re
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, WORDS, make_model, make_prompts, run_cli

COMMANDS = ("params", "prepare", "teach", "generate", "reward", "distill", "evaluate")
HEAVY = ("torch", "transformers", "vllm", "pyarrow", "polars", "numpy", "datasets")


def test_help_imports_nothing_heavy_and_is_quick():
    code = f"import sys, pipeline.cli; print([m for m in {HEAVY} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
    started = time.monotonic()
    shown = run_cli("--help")
    assert time.monotonic() - started < 5 and shown.returncode == 0
    assert all(command in shown.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(command):
    shown = run_cli(command, "--help").stdout
    assert "Examples" in shown and f"xkd-pipeline {command}" in shown
    assert "Traceback" not in shown


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert run_cli("--version").stdout.strip() == version("xkd-pipeline")


def refused(*arguments, cwd=ROOT) -> str:
    """The message of a run that must fail shortly and politely."""
    found = run_cli(*arguments, cwd=cwd)
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr and len(found.stderr.splitlines()) <= 6
    return re.sub(r"\s+", " ", found.stderr)


@pytest.mark.slow
def test_unknown_objectives_and_typos_are_refused(tmp_path):
    assert "'skew_rkl' or 'tvd', found 'klx'" in refused("distill", "--set", "distill.objective=klx")
    (tmp_path / "params.yaml").write_text("distil: {objective: fkl}\n")
    message = refused("prepare", cwd=tmp_path)
    assert "params.yaml" in message and "distil: unknown parameter; did you mean 'distill'?" in message
    assert "'arithmetic', 'translation', 'summarisation' or 'gsm8k'" in refused(
        "prepare", "--set", "prepare.task=poetry"
    )
    assert "--model nonsense: expected NAME=FOLDER" in refused("evaluate", "--model", "nonsense")


def test_bad_prompts_are_refused_by_file_and_row(teacher, tmp_path):
    path = tmp_path / "prompts.jsonl"
    for text, message in (
        ('{"question": "x"}', "row 1 has no column 'prompt'; found question"),
        ('{"prompt": "x"}\n{"prompt": ""}', "row 2 has an empty prompt"),
    ):
        path.write_text(text)
        found = refused("generate", "--teacher", teacher, "--prompts", path, "--out", tmp_path / "out")
        assert message in found and "prompts.jsonl" in found


@pytest.mark.slow
def test_paths_that_do_not_exist_are_refused(tmp_path, teacher):
    absent = tmp_path / "absent"
    assert f"no prompt file at {absent}" in refused("generate", "--teacher", teacher, "--prompts", absent, cwd=tmp_path)
    prompts = make_prompts(tmp_path / "p.parquet", train=1)
    assert f"no model at {absent}" in refused("generate", "--teacher", absent, "--prompts", prompts, cwd=tmp_path)
    assert "no cached teacher at" in refused("distill", "--selection", absent, cwd=tmp_path)
    assert "no cached teacher at" in refused("reward", "--selection", absent, cwd=tmp_path)
    assert "no parameter file at" in refused("params", "--params", absent)
    assert f"no prompt file at {absent}" in refused(
        "teach", "teacher", "--prompts", absent, "--tokenizer", teacher, cwd=tmp_path
    )
    assert "no tokenizer at data/tokenizer" in refused("teach", "teacher", "--prompts", prompts, cwd=tmp_path)


@pytest.mark.slow
def test_a_prompt_longer_than_the_model_is_left_out_with_the_reason(teacher, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "long", "prompt": " ".join(WORDS * 2)}) + '\n{"prompt": "w1"}\n')
    found = run_cli("generate", "--teacher", teacher, "--prompts", path, "--out", tmp_path / "out", "--engine", "stub")
    message = re.sub(r"\s+", " ", found.stderr)
    assert found.returncode == 3 and "Traceback" not in message
    assert "prompt 'long' left out" in message and "exceed the model's context of 64: shorten the prompt" in message


@pytest.mark.slow
def test_a_student_with_another_tokenizer_is_refused(teacher, tmp_path):
    prompts = make_prompts(tmp_path / "p.parquet", train=2)
    made = run_cli(
        "generate", "--teacher", teacher, "--prompts", prompts, "--out", tmp_path / "out", "--engine", "stub"
    )
    assert made.returncode == 0, made.stderr
    stranger = make_model(tmp_path / "stranger", seed=0, words=WORDS[::-1])
    paths = ("--selection", tmp_path / "out", "--student", stranger)
    assert "is not the teacher's" in refused("distill", *paths, cwd=tmp_path)


@pytest.mark.slow
def test_libraries_are_kept_quiet(teacher, tmp_path):
    """Nothing but our own lines on the terminal, with transformers running the teacher."""
    prompts = make_prompts(tmp_path / "p.parquet", train=6, validation=2)
    found = run_cli("generate", "--teacher", teacher, "--prompts", prompts, "--out", tmp_path / "out", "--engine", "hf")
    assert found.returncode == 0 and found.stdout == ""
    ours = re.compile(r"loading the teacher|sampling|scoring|teacher cached|  \S|\s*$")
    assert [line for line in found.stderr.splitlines() if not ours.match(line)] == []


@pytest.mark.slow
def test_nothing_from_a_file_is_taken_for_markup(teacher, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "[red]x[/red] [/oops]", "prompt": " ".join(WORDS * 2)}) + '\n{"prompt": "w1"}\n')
    found = run_cli("generate", "--teacher", teacher, "--prompts", path, "--out", tmp_path / "out", "--engine", "stub")
    assert "[red]x[/red] [/oops]" in found.stderr

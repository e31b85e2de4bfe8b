"""What holds for the command line: quick help with examples, and short errors that say what to do."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from pipeline.params.file import load_params
from tests.conftest import ROOT, WORDS, make_model, make_prompts, run_cli

COMMANDS = ("params", "prepare", "teach", "generate", "reward", "distill", "evaluate")
HEAVY = ("torch", "transformers", "vllm", "pyarrow", "polars", "numpy", "datasets")


def test_help_imports_nothing_heavy_and_is_quick():
    code = f"import sys, pipeline.cli.app; print([m for m in {HEAVY} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
    started = time.monotonic()
    shown = run_cli("--help", fresh=True)
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["--version"], ["params"]], ids=" ".join)
def test_output_that_cannot_be_written_is_one_line(arguments):
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    with open("/dev/full", "w") as full:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        found = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert found.returncode == 1
    assert found.stderr == "warning: could not print everything on stdout: No space left on device\n"


def test_a_command_without_a_standard_output_ends_as_ever():
    command = f"{sys.executable} -m pipeline.cli params >&-"
    found = subprocess.run(["bash", "-c", command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def refused(*arguments, cwd=ROOT) -> str:
    """The message of a run that must fail shortly and politely."""
    found = run_cli(*arguments, cwd=cwd)
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr and len(found.stderr.splitlines()) <= 6
    return re.sub(r"\s+", " ", found.stderr)


def test_the_parameter_file_is_written_over_the_one_that_was_read(tmp_path):
    path = tmp_path / "params.yaml"
    assert run_cli("params", "--out", "params.yaml", "--set", "seed=3", cwd=tmp_path).returncode == 0
    done = run_cli("params", "--set", "distill.objective=jsd", "--out", path, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"{path} written\n")
    assert load_params(path) == load_params(None, ["seed=3", "distill.objective=jsd"])
    assert path.read_text() == run_cli("params", cwd=tmp_path).stdout
    (tmp_path / "link.yaml").symlink_to(path)
    assert run_cli("params", "--set", "seed=4", "--out", "link.yaml", cwd=tmp_path).returncode == 0
    assert load_params(path).seed == 4 and (tmp_path / "link.yaml").is_symlink()
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("text", ["services: {web: {image: x}}", "seed: [", "notes on the run", "seed: one"])
def test_a_file_that_holds_no_parameters_is_not_replaced_by_them(tmp_path, text):
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    assert f"{path} is not what xkd-pipeline writes" in refused("params", "--out", path, cwd=tmp_path)
    assert path.read_text() == text
    assert "is a folder" in refused("params", "--out", tmp_path, cwd=tmp_path)
    assert "is not what xkd-pipeline writes" in refused("params", "--out", "/dev/null", cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "mark", "ends_well"),
    [
        ("", ">", False),
        ("--set seed=2", ">", False),
        ("--params params.yaml", ">", False),
        ("--params link.yaml", ">", False),
        ("", ">>", False),
        ("--params other.yaml", ">", True),
        ("--params /dev/null", ">", True),
    ],
)
def test_output_into_the_file_that_is_read_is_refused(tmp_path, arguments, mark, ends_well):
    (tmp_path / "params.yaml").write_text("seed: 5\n")
    (tmp_path / "other.yaml").write_text("seed: 6\n")
    (tmp_path / "link.yaml").symlink_to("params.yaml")
    command = f"{sys.executable} -m pipeline.cli params {arguments} {mark} params.yaml"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    if ends_well:
        assert done.returncode == 0 and load_params(tmp_path / "params.yaml").seed == (6 if "other" in arguments else 0)
    else:
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and re.search(r"use --out (params|link)\.yaml$", line)


def test_json_and_csv_are_for_what_prints_a_table():
    assert "give one of them" in refused("generate", "--dry-run", "--json", "--csv")
    assert "print what a dry run finds: add --dry-run" in refused("generate", "--json")


@pytest.mark.slow
def test_unknown_objectives_and_typos_are_refused(tmp_path):
    assert "Input should be 'sft', 'seqkd'" in refused("distill", "--set", "distill.objective=klx")
    (tmp_path / "params.yaml").write_text("distil: {objective: fkl}\n")
    message = refused("prepare", cwd=tmp_path)
    assert "params.yaml" in message and "distil: unknown parameter; did you mean 'distill'?" in message
    assert "Input should be 'arithmetic', 'translation', 'summarisation'" in refused(
        "prepare", "--set", "prepare.task=poetry"
    )
    assert "--model nonsense: expected NAME=FOLDER" in refused("evaluate", "--model", "nonsense")


def test_bad_parameters_are_refused_before_anything_heavy_is_imported():
    """Of every command that reads parameters, in one process."""
    commands = [*COMMANDS, "score", "report", "generate --dry-run"]
    code = f"""
import sys
from pipeline.cli.__main__ import main
for command in {commands}:
    name, *flags = command.split()
    sys.argv = ["xkd-pipeline", name, *["teacher"] * (name == "teach"), *flags, "--set", "distill.objective=foo"]
    try:
        main()
    except SystemExit as ended:
        print(command, ended.code, [module for module in {HEAVY} if module in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{command} 2 []" for command in commands]
    assert done.stderr.count("found 'foo'") == len(commands)


@pytest.mark.slow
def test_a_template_with_characters_beyond_the_basic_plane_is_taken(teacher, tmp_path):
    prompts = make_prompts(tmp_path / "p.parquet", train=1)
    arguments = ("--teacher", teacher, "--prompts", prompts, "--engine", "stub", "--out", tmp_path / "out")
    found = run_cli("generate", *arguments, "--template", "\U0001f600 {prompt}")
    assert found.returncode == 0, found.stderr


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
    arguments = ("--teacher", teacher, "--prompts", prompts, "--engine", "hf", "--template", "{prompt}")
    found = run_cli("generate", *arguments, "--out", tmp_path / "out")
    assert found.returncode == 0
    words, results = (
        re.compile(r"loading the teacher|sampling|scoring|warning: (the 16 tokens kept|\d+% of the teacher's)"),
        re.compile(r"teacher cached|  \S"),
    )
    assert [line for line in found.stderr.splitlines() if not words.match(line)] == []
    assert [line for line in found.stdout.splitlines() if not results.match(line)] == []


@pytest.mark.slow
def test_nothing_from_a_file_is_taken_for_markup(teacher, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "[red]x[/red] [/oops]", "prompt": " ".join(WORDS * 2)}) + '\n{"prompt": "w1"}\n')
    found = run_cli("generate", "--teacher", teacher, "--prompts", path, "--out", tmp_path / "out", "--engine", "stub")
    assert "[red]x[/red] [/oops]" in found.stderr

"""What holds for `compare`: any set of results in one table, and a warning where they do not compare."""

import csv
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.cli.comparison import compare
from pipeline.errors import UserError
from pipeline.layout import Layout
from tests.conftest import ROOT, run_cli


def interval(value: float) -> dict:
    return {"value": value, "low": value - 1, "high": value + 1}


def write(folder: Path, distilled: float, objective: str, prompts: str = "p") -> Path:
    """The files of one experiment, as far as they are read."""
    metrics = {
        model: {
            "greedy": {"rouge2": interval(score)},
            "sampled": {"rouge2": interval(score / 2)},
            "heldout": {"kl": interval(1 / score), "reverse_kl": interval(2 / score)},
            "diversity": {"distinct_1": 0.5, "distinct_2": 0.7, "self_bleu": 10.0},
        }
        for model, score in (("teacher", 50.0), ("distilled", distilled))
    }
    provenance = {"task": {"name": "summarisation"}, "prompts": prompts, "teacher": "t"}
    provenance |= {"models": {"teacher": "m", "distilled": objective}}
    results = {"metrics": metrics, "candidate": "distilled", "higher_is_better": {"rouge2": True}}
    for name, value in (("evaluation", results | {"provenance": provenance}), ("distill", {"objective": objective})):
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps(value))
    return folder


def test_folders_and_files_are_put_side_by_side_and_a_shared_model_is_shown_once(tmp_path, capsys):
    one, two = write(tmp_path / "one", 30.0, "fkl"), write(tmp_path / "two", 40.0, "x-rkl (frozen)")
    rows = compare([str(one), str(two / "evaluation")], Layout()).records()
    assert [(row["model"], row["objective"], row["rouge2"]) for row in rows] == [
        ("teacher", None, 50.0),
        ("distilled", "fkl", 30.0),
        ("distilled", "x-rkl (frozen)", 40.0),
    ]
    assert [rows[-1][key] for key in ("kl", "kl_low", "kl_high")] == [0.025, -0.975, 1.025]
    said = capsys.readouterr()
    assert "do not compare" not in said.err
    shown = [re.split(r"\s{2,}", line.strip()) for line in said.out.splitlines() if "distilled" in line]
    assert [row[2:] for row in shown] == [
        [
            "fkl",
            "30.0 [29.0, 31.0]",
            "15.0 [14.0, 16.0]",
            "0.033 [-0.967, 1.033]",
            "0.067 [-0.933, 1.067]",
            "-",
            "-",
            "10.0",
        ],
        [
            "x-rkl (frozen)",
            "40.0 [39.0, 41.0]",
            "20.0 [19.0, 21.0]",
            "0.025 [-0.975, 1.025]",
            "0.050 [-0.950, 1.050]",
            "-",
            "-",
            "10.0",
        ],
    ]


def test_results_on_other_prompts_are_shown_with_a_warning(tmp_path, capsys):
    one, two = write(tmp_path / "one", 30.0, "fkl"), write(tmp_path / "two", 40.0, "rkl", prompts="q")
    assert len(compare([str(one), str(two)], Layout()).rows) == 4
    assert "do not compare" in capsys.readouterr().err


def test_results_of_two_tasks_have_the_columns_of_both(tmp_path, capsys):
    one, two = write(tmp_path / "one", 30.0, "fkl"), write(tmp_path / "two", 40.0, "rkl")
    path = two / "evaluation" / "results.json"
    path.write_text(path.read_text().replace("rouge2", "bleu").replace("summarisation", "translation"))
    rows = compare([str(one), str(two)], Layout()).records()
    assert [(row["rouge2"], row["bleu"], row["bleu_low"]) for row in rows if row["model"] == "distilled"] == [
        (30.0, None, None), (None, 40.0, 39.0),
    ]  # fmt: skip


LONG = ("baseline-forward-kl-seed-0", "x-forward-kl-frozen-reward-seed-0", "x-skewed-reverse-kl-joint-reward-seed-0")


@pytest.mark.parametrize("width", [80, 120])
def test_three_models_with_long_names_are_readable_in_a_terminal(tmp_path, monkeypatch, capsys, width):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    for number, name in enumerate(LONG):
        write(tmp_path / name, 60.0 + number, f"x-skew_rkl(0.{number}) (frozen)")
    records = compare(list(LONG), Layout()).records()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for name, record in zip(LONG, [row for row in records if row["model"] == "distilled"], strict=True):
        own = " ".join(  # the lines of its names, and those below
            f"{line} {below}" for line, below in pairwise(lines) if line.split()[:2] == [name, "distilled"]
        )
        assert record["objective"] in own and f"{record['rouge2']:.1f} [" in own and f"{record['kl']:.3f} [" in own


def test_programs_get_numbers_and_nothing_else(tmp_path):
    one, two = write(tmp_path / "one", 30.0, "fkl"), write(tmp_path / "two", 40.0, "rkl", prompts="q")
    done = run_cli("compare", one, two, "--csv")
    assert done.returncode == 0 and "do not compare" in done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [(row["result"], float(row["rouge2"]), float(row["kl_low"])) for row in rows if row["objective"]] == [
        (str(one), 30.0, 1 / 30 - 1),
        (str(two), 40.0, 1 / 40 - 1),
    ]
    found = json.loads(run_cli("compare", one, two, "--json").stdout)
    assert [list(row) for row in found] == [list(row) for row in rows]
    assert found[0]["rouge2"] == 50.0 and found[0]["objective"] is None
    refused = run_cli("compare", one, "--json", "--csv")
    assert refused.returncode == 2 and refused.stdout == "" and "give one of them" in refused.stderr


@pytest.mark.skipif(shutil.which("column") is None, reason="needs the command column")
def test_csv_can_be_put_into_columns(tmp_path):
    write(tmp_path / "one", 30.0, "fkl")
    command = f"{sys.executable} -m pipeline.cli compare {tmp_path / 'one'} --csv | column -s, -t"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and len(lines) == 3
    assert {line.index(text) for line, text in zip(lines, ("model", "teacher", "distilled"), strict=True)} == {
        lines[0].index("model")
    }


def test_git_revisions_are_read_from_their_own_files(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=tmp_path, check=True)

    git("init", "-q", "-b", "main")
    write(tmp_path / "data", 30.0, "fkl")
    subprocess.run(["dvc", "init", "-q"], cwd=tmp_path, check=True)
    git("add", "-A")
    git("commit", "-qm", "first")
    git("tag", "first")
    shutil.rmtree(tmp_path / "data")
    write(tmp_path / "data", 45.0, "jsd(0.1)")
    monkeypatch.chdir(tmp_path)
    rows = compare(["first", "data"], Layout()).records()
    assert [(r["result"], r["objective"], r["rouge2"]) for r in rows if r["model"] == "distilled"] == [
        ("first", "fkl", 30.0),
        ("data", "jsd(0.1)", 45.0),
    ]
    with pytest.raises(UserError, match="nothing-here is neither a folder with results nor an experiment"):
        compare(["nothing-here"], Layout())


def test_a_folder_without_results_and_a_file_of_another_kind_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        compare([str(tmp_path)], Layout())
    (tmp_path / "results.json").write_text('{"metrics": {}}')
    with pytest.raises(UserError, match=r"results\.json holds no results"):
        compare([str(tmp_path)], Layout())


@pytest.mark.slow
def test_a_dvc_experiment_is_read_by_its_name(tmp_path, monkeypatch):
    """Its results are outputs in DVC's cache and not in git; the workspace has moved on since."""

    def sh(*command: str) -> None:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    for name, score in (("fkl", 30.0), ("rkl", 40.0)):
        write(tmp_path / "made" / name, score, name)
    (tmp_path / "params.yaml").write_text("objective: fkl\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  make:\n    cmd: rm -rf data && cp -r made/${objective} data\n    deps: [made]\n"
        "    params: [objective]\n    outs: [data/evaluation/results.json, data/distill/results.json]\n"
    )
    for command in (
        ("git", "init", "-q"), ("git", "config", "user.email", "t@t"), ("git", "config", "user.name", "t"),
        ("dvc", "init", "-q"), ("dvc", "repro", "-q"), ("git", "add", "-A"), ("git", "commit", "-qm", "first"),
        ("dvc", "exp", "run", "-q", "-n", "other", "-S", "objective=rkl"), ("git", "checkout", "-q", "."),
        ("dvc", "checkout", "-q", "--force"),
    ):  # fmt: skip
        sh(*command)
    monkeypatch.chdir(tmp_path)
    rows = [row for row in compare(["data", "other"], Layout()).records() if row["model"] == "distilled"]
    assert [(row["result"], row["objective"]) for row in rows] == [("data", "fkl"), ("other", "rkl")]


def test_what_the_cache_does_not_keep_and_what_was_cut_is_shown(tmp_path, capsys):
    one = write(tmp_path / "one", 30.0, "fkl")
    path = one / "evaluation" / "results.json"
    more = {
        "kept_mass": {"k": 32, "mean": 0.66, "worst_tenth": 0.2},
        "answers": {"distilled": {"greedy": {"tokens": 12.5, "cut": 0.25}, "sampled": {"tokens": 13.0, "cut": 0.5}}},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    record = compare([str(one)], Layout()).records()[-1]
    assert (record["kept_mass"], record["cut"], record["tokens"]) == (0.66, 0.25, 12.5)
    said = capsys.readouterr()
    assert "66% of the teacher's probability" in said.err
    assert any("0.660" in line and "25%" in line for line in said.out.splitlines() if "distilled" in line)

"""What holds for `compare`: any set of results in one table, and a warning where they do not compare."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import UserError
from stages.comparison import compare


def interval(value: float) -> dict:
    return {"value": value, "low": value - 1, "high": value + 1}


def write(folder: Path, distilled: float, objective: str, prompts: str = "p") -> Path:
    """The files of one experiment, as far as they are read."""
    metrics = {
        model: {
            "greedy": {"rouge2": interval(score)},
            "sampled": {"rouge2": interval(score / 2)},
            "heldout": {"kl_to_teacher": interval(1 / score)},
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
    rows = compare([str(one), str(two / "evaluation")], Path("data"))
    assert [(row["model"], row["objective"], row["rouge2"]) for row in rows] == [
        ("teacher", "-", "50.0 [49.0, 51.0]"),
        ("distilled", "fkl", "30.0 [29.0, 31.0]"),
        ("distilled", "x-rkl (frozen)", "40.0 [39.0, 41.0]"),
    ]
    assert rows[-1]["KL"] == "0.025 [-0.975, 1.025]"
    said = capsys.readouterr().err
    assert "do not compare" not in said and "x-rkl" in said


def test_results_on_other_prompts_are_shown_with_a_warning(tmp_path, capsys):
    one, two = write(tmp_path / "one", 30.0, "fkl"), write(tmp_path / "two", 40.0, "rkl", prompts="q")
    assert len(compare([str(one), str(two)], Path("data"))) == 4
    assert "do not compare" in capsys.readouterr().err


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
    rows = compare(["first", "data"], Path("data"))
    assert [(r["result"], r["objective"], r["rouge2"][:4]) for r in rows if r["model"] == "distilled"] == [
        ("first", "fkl", "30.0"),
        ("data", "jsd(0.1)", "45.0"),
    ]
    with pytest.raises(UserError, match="nothing-here is neither a folder with results nor an experiment"):
        compare(["nothing-here"], Path("data"))


def test_a_folder_without_results_and_a_file_of_another_kind_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        compare([str(tmp_path)], Path("data"))
    (tmp_path / "results.json").write_text('{"metrics": {}}')
    with pytest.raises(UserError, match=r"results\.json holds no results"):
        compare([str(tmp_path)], Path("data"))


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
    rows = [row for row in compare(["data", "other"], Path("data")) if row["model"] == "distilled"]
    assert [(row["result"], row["objective"]) for row in rows] == [("data", "fkl"), ("other", "rkl")]

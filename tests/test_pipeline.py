"""What holds for the pipeline under DVC, at smoke size: a clone of the committed files, run as a user would."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(560)]


def sh(folder: Path, *command: str) -> str:
    """Run a command in `folder` with the project's own interpreter first on the path; its output, or a failure."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    environment |= {"DVC_NO_ANALYTICS": "1", "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t"}
    environment |= {"GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t", "XKD_STORE": str(folder.parent / "store")}
    environment.pop("PYTHONPATH", None)
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, f"{command}\n{found.stdout[-3000:]}\n{found.stderr[-3000:]}"
    return found.stdout + found.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project's files in a git repository of their own, with smoke parameters, after `dvc repro`.

    `.ci/run` names the folder of its own run in XKD_SMOKE, which is waited for; else one is made here, in which
    transformers runs the teacher, which starts faster than vLLM.
    """
    if smoke := os.environ.get("XKD_SMOKE"):
        return finished(Path(smoke))
    clone = tmp_path_factory.mktemp("smoke") / "project"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    smoke = ("--params", ROOT / "tests" / "smoke.yaml", "--set", "generate.engine=hf")
    (clone / "params.yaml").write_text(run_cli("params", *smoke).stdout)
    sh(clone, "git", "init", "-q")
    sh(clone, "git", "add", "-A")
    sh(clone, "git", "commit", "-qm", "smoke")
    (clone.parent / "repro.log").write_text(sh(clone, "dvc", "repro"))
    return clone


def finished(smoke: Path) -> Path:
    """The project in the folder, once `.ci/run` has written how its run ended."""
    ended, limit = smoke / "ended", time.monotonic() + 500
    while not ended.exists():
        assert time.monotonic() < limit, f"no {ended}"
        time.sleep(1)
    assert ended.read_text().strip() == "0", "dvc repro at smoke size failed: see its output"
    return smoke / "project"


def would_run(project: Path, *settings: str) -> set[str]:
    """Stages that `dvc repro` would run with changed parameters."""
    original = (project / "params.yaml").read_text()
    options = [option for setting in settings for option in ("--set", setting)]
    try:
        (project / "params.yaml").write_text(run_cli("params", "--params", project / "params.yaml", *options).stdout)
        lines = sh(project, "dvc", "status", "--json")
        return {stage.removeprefix("dvc.yaml:") for stage in json.loads(lines)}
    finally:
        (project / "params.yaml").write_text(original)


def test_it_ends_with_four_models_side_by_side(project):
    results = json.loads((project / "data" / "evaluation" / "results.json").read_text())
    assert list(results["metrics"]) == ["teacher", "undistilled", "plain", "distilled"] and results["kl"] == "live"
    assert "accuracy of distilled minus that of" in (project.parent / "repro.log").read_text()
    manifest = json.loads((project / "data" / "teacher" / "manifest.json").read_text())
    assert {name: part["rows"] for name, part in manifest["parts"].items()} == {
        "train": 60,
        "validation": 20,
        "scored": 60,
    }


def test_a_second_run_does_nothing(project):
    assert "Data and pipelines are up to date." in sh(project, "dvc", "repro")
    assert would_run(project) == set()


def test_a_new_objective_reruns_nothing_before_distill(project):
    """Only stages whose own inputs changed are listed; evaluate follows when the student has."""
    changed = ("distill.objective=jsd", "distill.nll_weight=0.5", "distill.lam=0.03")
    assert would_run(project, *changed) == {"distill", "plain"}
    assert would_run(project, "evaluate.samples=3") == {"generate", "evaluate"}  # the teacher's answers are part of it
    assert would_run(project, "evaluate.bootstrap=3") == {"evaluate"}
    assert would_run(project, "reward.sigma_min=0.5") == {"reward", "distill"}


def test_a_new_student_reruns_no_generation(project):
    assert would_run(project, "teach.student.model.width=64", "teach.student.model.heads=2") == {"teach@student"}
    depends = sh(project, "dvc", "dag", "generate")
    assert "teach@teacher" in depends and "teach@student" not in depends


def test_an_experiment_in_a_workspace_of_its_own_reuses_the_store(project):
    """`dvc exp run --temp` runs its own copy of the code; the objective changes, the teacher is not asked again."""
    store = project.parent / "store"
    shards = {path: path.stat().st_mtime_ns for path in store.glob("*/*/*.parquet")}
    said = sh(project, "dvc", "exp", "run", "--temp", "-n", "other", "-S", "distill.objective=rkl", "-S", "seed=0",
              "distill")  # fmt: skip
    assert "Running stage 'distill'" in said and "Running stage 'generate'" not in said
    assert {path: path.stat().st_mtime_ns for path in store.glob("*/*/*.parquet")} == shards and shards
    shown = sh(project, "dvc", "exp", "show", "--csv")
    assert "rkl" in shown and "other" in shown


def test_metrics_plots_and_the_graph_can_be_shown(project):
    metrics = json.loads(sh(project, "dvc", "metrics", "show", "--json"))
    shown = metrics[""]["data"]["data/evaluation/metrics.json"]["data"]
    assert list(metrics[""]["data"]) == ["data/evaluation/metrics.json"]
    assert sum(map(len, shown.values())) <= 12 and shown["plain"].keys() == shown["distilled"].keys() == {
        "accuracy",
        "kl",
    }
    sh(project, "dvc", "plots", "show")
    page = (project / "dvc_plots" / "index.html").read_text()
    for title in ("Quality on the test prompts", "Distillation, training loss", "Reward posteriors"):
        assert title in page
    assert "evaluate" in sh(project, "dvc", "dag")


def test_the_outputs_leave_the_git_tree_as_it_was(project):
    assert sh(project, "git", "status", "--porcelain").split() == ["??", "dvc.lock"]


def test_a_colleague_distils_from_what_was_pushed_without_teacher_or_store(project):
    sh(project, "dvc", "remote", "add", "-f", "-d", "team", str(project.parent / "remote"))
    sh(project, "dvc", "push")
    sh(project, "git", "add", "-f", "dvc.lock", ".dvc/config")
    sh(project, "git", "commit", "-qm", "push")
    colleague = project.parent / "colleague" / "clone"
    sh(project, "git", "clone", "-q", str(project), str(colleague))
    sh(colleague, "dvc", "pull", "data/teacher", "data/scored", "data/reward", "data/models/student", "data/answers",
       "data/prompts")  # fmt: skip
    assert not (colleague / "data" / "models" / "teacher").exists()
    command = ("distill", "--set", "distill.objective=jsd", "--set", "distill.reward=frozen", "--out", "mine")
    found = run_cli(*command, cwd=colleague, env={"XKD_STORE": str(colleague / "empty")})
    assert found.returncode == 0, found.stderr
    assert (colleague / "mine" / "model.safetensors").is_file() and not (colleague / "empty").exists()
    models = ("--model", "teacher=data/models/teacher", "--model", "mine=mine")
    found = run_cli(
        "evaluate", *models, "--out", "compared", cwd=colleague, env={"XKD_STORE": str(colleague / "empty")}
    )
    assert found.returncode == 0 and "no exact KL" in found.stderr, found.stderr
    theirs = json.loads((project / "data" / "evaluation" / "results.json").read_text())["metrics"]["teacher"]
    own = json.loads((colleague / "compared" / "results.json").read_text())["metrics"]
    assert own["teacher"]["greedy"] == theirs["greedy"] and own["mine"]["heldout"].keys() == {
        "kl_estimate",
        "cross_entropy",
    }
    assert not (colleague / "empty").exists()

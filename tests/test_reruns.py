"""What holds for what DVC runs again: to observe a run is not to redo it, and a stage follows only code that it runs.

No stage runs here: DVC is told that stand-ins for their outputs are the results of the files as they are.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from pipeline.params import OBSERVING, X_TERM, Distill
from tests.conftest import ROOT, run_cli
from tests.test_layering import definition


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project's code and parameters in a repository of their own, every stage done."""
    folder = tmp_path_factory.mktemp("project") / "clone"
    for name in ("pipeline", "stages", "dvc.yaml", "params.yaml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        folder.mkdir(exist_ok=True)
        copy(ROOT / name, folder / name)
    for stage in yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]:
        for out in [*definition(stage)["outs"], *definition(stage).get("metrics", ())]:
            for item in ("teacher", "student"):
                path = folder / out.replace("${item}", item)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "commit", "-f", "-q")
    return folder


def dvc(folder: Path, *arguments: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"DVC_NO_ANALYTICS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr


def changed(project: Path) -> set[str]:
    """Stages whose own inputs are not those they last ran with: what `dvc status` names."""
    from dvc.repo import Repo

    with Repo(str(project)) as repo:
        return {stage.rpartition("dvc.yaml:")[2] for stage in repo.status()}


@contextmanager
def edited(path: Path, text: str) -> Iterator[None]:
    original = path.read_text()
    path.write_text(text)
    yield
    path.write_text(original)


def changed_by_comment(project: Path, file: str) -> set[str]:
    with edited(project / file, (project / file).read_text() + "\n# A remark.\n"):
        return changed(project)


def changed_by_parameters(project: Path, *settings: str) -> set[str]:
    options = [option for setting in settings for option in ("--set", setting)]
    with edited(project / "params.yaml", run_cli("params", "--params", project / "params.yaml", *options).stdout):
        return changed(project)


RERUNS = re.findall(r"^\| `([\w/.]+)`[^|]*\| (.+) \|$", (ROOT / "docs" / "reruns.md").read_text(), re.M)


@pytest.mark.parametrize(("file", "said"), RERUNS, ids=[file for file, _ in RERUNS])
def test_an_edit_reruns_what_the_table_says(project, file, said):
    expected = set() if said == "nothing" else {name.strip("`") for name in said.split(", ")}
    assert changed(project) == set()
    assert changed_by_comment(project, file) == expected


def test_the_table_has_edits_of_every_room():
    assert len(RERUNS) >= 8


def test_to_observe_a_run_is_not_to_redo_it(project):
    values = {"log_every": 7, "report_to": "[tensorboard]", "workers": 2, "chunk": 64}
    assert {*values, "plain"} == OBSERVING
    assert changed_by_parameters(project, *(f"distill.{name}={value}" for name, value in values.items())) == set()
    assert changed_by_parameters(project, "distill.plain=false") == {"plain"}


def test_every_other_parameter_of_distillation_redoes_it(project):
    every = Distill.model_fields.keys() - OBSERVING
    for stage, expected in (("distill", every), ("plain", every - X_TERM | {"plain"})):
        params = definition(stage)["params"]
        listed = [name.removeprefix("distill.") for name in params if name.startswith("distill.")]
        assert sorted(listed) == sorted(expected)
    for setting in ("distill.lora.rank=2", "distill.window=4"):
        assert changed_by_parameters(project, setting) == {"distill", "plain"}


def test_the_x_term_does_not_redo_the_plain_student(project):
    values = {"lam": 0.1, "reward": "zero", "td": "soft", "kl_weight": 2, "residual.gamma": 0.9}
    assert {name.partition(".")[0] for name in values} == X_TERM
    for name, value in values.items():
        assert changed_by_parameters(project, f"distill.{name}={value}") == {"distill"}

"""What holds for the code's shape: imports run one way, and DVC knows the code that each stage runs."""

import ast
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.provenance import code_of, has_no_code, imports
from tests.conftest import ROOT

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Imports run downwards: a file's room is the first that its path begins with.
ROOMS = (
    ("pipeline/cli/",),
    ("stages/",),
    ("pipeline/results.py",),
    ("pipeline/learning/",),
    ("pipeline/teacher/",),
    ("pipeline/engines/",),
    ("pipeline/upkeep/",),
    ("pipeline/store/",),
    ("pipeline/objectives/",),
    ("pipeline/models/", "pipeline/prompts/", "pipeline/tasks/"),
    ("pipeline/params/",),
    ("pipeline/",),
)


def files(*folders: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def definition(stage: str) -> dict:
    return DVC[stage].get("do", DVC[stage])


def module_of(stage: str) -> str:
    """The module in `stages` that a stage of dvc.yaml runs."""
    command = definition(stage)["cmd"]
    assert command.startswith("python -m pipeline.cli ")
    return command.split()[3]


def room(file: str) -> int:
    return next(number for number, paths in enumerate(ROOMS) if file.startswith(paths))


def test_stages_holds_the_stages_of_dvc_and_nothing_else():
    entries = {Path(file).parts[1].removesuffix(".py") for file in files("stages")}
    assert entries - {"__init__"} == set(map(module_of, DVC))


def test_imports_run_downwards_and_no_stage_imports_another():
    for file in files("pipeline", "stages"):
        for other in imports(file):
            assert room(other) >= room(file) or has_no_code(other), f"{file} imports {other}"
            if room(file) == room(other) == ROOMS.index(("stages/",)) and not has_no_code(other):
                assert Path(file).parts[1].removesuffix(".py") == Path(other).parts[1].removesuffix(".py")


def test_the_objectives_import_torch_alone():
    for file in files("pipeline/objectives"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names
                ours = all(name.startswith("pipeline.objectives") for name in names)
                assert tops <= {"torch"} or ours, f"{file} imports {names}"


@pytest.mark.parametrize("name", DVC)
def test_dvc_lists_the_code_that_a_stage_runs_and_no_other(name):
    """A folder stands for all of its files; so it is listed only where all of them are run."""
    needed = code_of(f"stages.{module_of(name)}")
    listed = [dep for dep in definition(name)["deps"] if not dep.startswith("data/")]
    covered = [file for dep in listed for file in ([dep] if dep.endswith(".py") else files(dep))]
    covered = [file for file in covered if not has_no_code(file)]
    assert sorted(set(covered)) == sorted(needed)
    assert len(covered) == len(set(covered)), "listed twice"

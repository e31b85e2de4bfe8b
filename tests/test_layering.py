"""What holds for the code's shape: imports run one way, and DVC knows the code that each stage runs."""

import ast
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

STAGES = ("prepare", "teach", "generate", "score", "reward", "distill", "evaluate", "report")
# What every stage runs and no result depends on: changing it reruns nothing.
EVERYWHERE = {
    f"pipeline/{name}.py"
    for name in ("__init__", "console", "errors", "interrupts", "outputs", "params_file", "provenance", "streams")
}
EVERYWHERE |= {f"pipeline/params/{name}.py" for name in ("__init__", "base", "data", "hints", "student", "teacher")}
EVERYWHERE |= {"stages/__init__.py"}


def module_file(name: str) -> str | None:
    path = Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate.as_posix()
    return None


def packages(file: str) -> set[str]:
    """The `__init__` of every package that a file lies in: whoever imports the file runs them first."""
    return {f"{folder.as_posix()}/__init__.py" for folder in Path(file).parents if folder.name}


@cache
def imported(file: str) -> frozenset[str]:
    """Files of ours that a file imports, also inside functions, with the packages they lie in."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {module_file(name) for name in names if name.split(".")[0] in ("pipeline", "stages")}
    found.discard(None)
    return frozenset(found.union(*map(packages, found)))


@cache
def says_nothing(file: str) -> bool:
    """A docstring and no code: no result depends on it."""
    return all(isinstance(node, ast.Expr) for node in ast.parse((ROOT / file).read_text()).body)


def closure(file: str) -> set[str]:
    seen, waiting = set(), [file]
    while waiting:
        if (current := waiting.pop()) not in seen:
            seen.add(current)
            waiting += imported(current)
    return seen


def files(*folders: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def definition(stage: str) -> dict:
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    return found.get("do", found)


@pytest.mark.parametrize("name", yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
def test_dvc_lists_the_code_that_a_stage_runs_and_no_other(name):
    """A folder stands for all of its files; so it is listed only where all of them are run."""
    stage = definition(name)["cmd"].removeprefix("python -m pipeline.cli ").split()[0]
    assert stage in STAGES
    needed = {file for file in closure(f"stages/{stage}.py") - EVERYWHERE if not says_nothing(file)}
    listed = [dep for dep in definition(name)["deps"] if not dep.startswith("data/")]
    covered = [file for dep in listed for file in ([dep] if dep.endswith(".py") else files(dep))]
    covered = [file for file in covered if not says_nothing(file)]
    assert sorted(set(covered)) == sorted(needed)
    assert len(covered) == len(set(covered)), "listed twice"


def test_no_stage_imports_another_and_pipeline_imports_no_stage():
    for stage in STAGES:
        assert not imported(f"stages/{stage}.py") & {f"stages/{other}.py" for other in STAGES}
    for file in files("pipeline"):
        stages = {found for found in imported(file) if found.startswith("stages/")}
        assert file in ("pipeline/cli.py", "pipeline/tools.py") or not stages, file
        assert "pipeline/cli.py" not in imported(file)


def test_the_objectives_import_nothing_of_ours_but_what_a_support_is():
    supports = {"pipeline/__init__.py", "pipeline/supports.py"}
    for file in [*files("stages/objectives"), "pipeline/supports.py"]:
        others = {found for found in imported(file) if not found.startswith("stages/objectives/")} - supports
        assert all(map(says_nothing, others)), file

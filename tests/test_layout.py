"""What holds for an experiment's folder: every path is spelled once, and two experiments lie beside each other."""

import ast
import json
import re
from pathlib import Path

import pytest

from pipeline.layout import Layout
from pipeline.params.file import load_params
from tests.conftest import ROOT, make_prompts, run_cli
from tests.test_layering import DVC, definition, files

PLACES = [value for value in vars(Layout()).values() if value != Path()]


def outputs() -> set[str]:
    """All that dvc.yaml says the stages write."""
    found: set[str] = set()
    for name, stage in DVC.items():
        outs = [*definition(name)["outs"], *definition(name).get("metrics", ())]
        found |= {out.replace("${item}", item) for out in outs for item in stage.get("foreach", [""])}
    return found


def test_what_dvc_keeps_is_where_the_layout_says():
    layout = Layout()
    folders = {*map(str, vars(layout).values())} | {str(layout.results(stage)) for stage in DVC}
    folders.add(str(layout.prompts.parent))
    folders |= {str(layout.results("teach", role)) for role in ("teacher", "student")} | {"data/plain-metrics"}
    for out in outputs():
        assert {out, *map(str, Path(out).parents)} & (folders - {".", "data"}), out


def test_the_page_about_data_names_every_folder_that_the_stages_write():
    page = (ROOT / "data" / "README.md").read_text()
    for out in outputs():
        below = Path(out).relative_to("data").parts
        assert f"`{'/'.join(below[:2])}" in page or f"`{below[0]}" in page, out


def test_no_other_module_joins_a_path_of_the_layout():
    """Neither `data/...` in one text nor a folder of ours behind a slash; a stage's checkpoints have its name."""
    folders = {place.parts[1] for place in PLACES if place.parts[0] == "data" and len(place.parts) > 1} - {"models"}
    for file in files("pipeline", "stages"):
        if file == "pipeline/layout.py" or file.startswith(("pipeline/store/", "pipeline/upkeep/")):
            continue  # the store has folders of its own
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            joined = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
            if joined and isinstance(node.right, ast.Constant) and ast.unparse(node.left) != "runs":
                assert node.right.value not in folders, f"{file}:{node.lineno} joins {node.right.value}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Path":
                texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
                assert not [text for text in texts if str(text).startswith("data")], f"{file}:{node.lineno}"


@pytest.fixture(scope="module")
def roots(tmp_path_factory, teacher) -> Path:
    """Two experiments beside each other, with different parameters."""
    place = tmp_path_factory.mktemp("roots")
    for name, k in (("one", 8), ("two", 4)):
        layout = Layout(place / name)
        make_prompts(layout.prompts, train=4, validation=2)
        layout.teacher.parent.mkdir(parents=True)
        layout.teacher.symlink_to(teacher)
        parameters = {"max_tokens": 6, "template": "{prompt}", "generate": {"engine": "hf", "k": k, "support": "topk"}}
        layout.params.write_text(json.dumps(parameters))
    return place


def test_two_experiments_in_two_folders_share_the_store_alone(roots, tmp_path):
    store = ("--store", tmp_path / "store")
    done = {name: run_cli("generate", "--root", name, *store, cwd=roots) for name in ("one", "two")}
    assert {name: each.returncode for name, each in done.items()} == {"one": 0, "two": 0}, done
    for name, k in (("one", 8), ("two", 4)):
        layout = Layout(roots / name)
        assert json.loads((layout.selection / "manifest.json").read_text())["k"] == k
        assert layout.results("generate").is_file() and layout.answers.is_dir()
    assert {path.name for path in roots.iterdir()} == {"one", "two"}
    second = json.loads(Layout(roots / "two").results("generate").read_text())["cost"]
    assert second["rows_made"] == 0 and second["rows_found"] > 0
    verified = run_cli("cache", "verify", "--root", "two", *store, cwd=roots)
    assert verified.returncode == 0 and "two/data/teacher" in verified.stdout and "one/data" not in verified.stdout


def test_the_root_decides_the_parameter_file_and_the_teacher_of_no_name(roots):
    shown = run_cli("params", "--root", "two", cwd=roots).stdout
    (roots / "shown.yaml").write_text(shown)
    assert load_params(roots / "shown.yaml").generate.k == 4
    (roots / "shown.yaml").unlink()
    refused = run_cli("generate", "--root", "three", cwd=roots)
    assert refused.returncode == 2 and "three/data/prompts/prompts.parquet" in re.sub(r"\s+", "", refused.stderr)


def every_command() -> list[str]:
    from typer.main import get_command

    from pipeline.cli.app import app

    found = []
    for name, command in get_command(app).commands.items():
        found += [f"{name} {inner}" for inner in command.commands] if hasattr(command, "commands") else [name]
    return found


@pytest.mark.parametrize("command", every_command())
def test_every_command_takes_a_root(command):
    assert "--root" in run_cli(*command.split(), "--help").stdout

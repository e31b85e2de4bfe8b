"""What holds for the documentation: its code runs, its commands and parameters exist."""

import inspect
import re
import shlex
from importlib import import_module
from operator import attrgetter

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.cli.app import app
from pipeline.cli.cache import cache as cache_app
from pipeline.learning.batches import collate
from pipeline.learning.divergence import Divergence
from pipeline.learning.learner import StudentLearner
from pipeline.learning.terms import Likelihood
from pipeline.learning.trainer import held_out
from pipeline.params import Params
from pipeline.store.selection import Selection
from pipeline.teacher.cost import GIB, Need, bytes_per_token
from tests.conftest import ROOT, run_cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_loop_for_your_own_trainer_learns_from_the_cache(cache, student, tmp_path, monkeypatch):
    (tmp_path / "data" / "models").mkdir(parents=True)
    (tmp_path / "data" / "teacher").symlink_to(cache / "selection")
    (tmp_path / "data" / "models" / "student").symlink_to(student)
    monkeypatch.chdir(tmp_path)
    loop, loader = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-trainer.md").read_text(), re.S)
    names: dict = {}
    exec(loop, names)
    exec(loader, names)
    assert names["state"] == {"epoch": 0, "batches": 1} and len(names["batch"]) == 8
    rows = list(Selection(cache / "selection").rows("train"))
    batch = collate(rows)

    def kl(model) -> float:
        learner = StudentLearner(model, [Likelihood(0), Divergence("fkl")])
        return held_out(learner, [batch], torch.device("cpu"))["kd"]

    assert kl(names["student"]) < 0.8 * kl(AutoModelForCausalLM.from_pretrained(student))


def keys(section, prefix="") -> set[str]:
    found = set()
    for name in type(section).model_fields:
        value = getattr(section, name)
        found.add(prefix + name)
        if hasattr(value, "model_fields"):
            found |= keys(value, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_parameters_that_are_named_exist(page):
    text = page.read_text()
    commands = {command.name or command.callback.__name__ for command in app.registered_commands} | {"cache"}
    assert set(re.findall(r"xkd-pipeline ([a-z]+)\b", text)) <= commands
    of_cache = {command.name or command.callback.__name__ for command in cache_app.registered_commands}
    assert set(re.findall(r"xkd-pipeline cache ([a-z]+)\b", text)) <= of_cache
    known = keys(Params())
    for name in re.findall(r"(?:-S|--set) ([a-z_.]+)=", text):
        assert name in known, name
    for section in ("prepare", "teach", "generate", "score", "reward", "distill", "evaluate", "report"):
        for name in re.findall(rf"`({section}\.[a-z_.]+[a-z])[`:=]", text):
            assert name in known, name


def test_every_symbol_that_the_derivation_points_to_has_the_code_that_is_shown():
    text = (ROOT / "docs" / "x-kd.md").read_text()
    pointers = re.findall(r"\| \[`([\w.]+)`\]\(\.\./([\w/]+)\.py\) \| `(.+)` \|$", text, re.M)
    assert len(pointers) == text.count(".py) |") > 20
    for symbol, file, code in pointers:
        found = attrgetter(symbol)(import_module(file.replace("/", ".")))
        assert code in inspect.getsource(found), f"{symbol} of {file}.py: {code}"


def test_every_step_from_a_prompt_to_a_loss_is_where_the_page_says():
    text = (ROOT / "docs" / "walk.md").read_text()
    steps = re.findall(r"^\d+\. \[`", text, re.M)
    pointers = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+)\.py\)", text)
    assert len(steps) == 10 and len(pointers) == text.count(".py)") > 20
    for symbol, file in pointers:
        module = import_module(file.removesuffix("/__init__").replace("/", "."))
        found = attrgetter(symbol)(module)
        assert getattr(found, "__module__", module.__name__) == module.__name__, f"{symbol} is not made in {file}.py"


COST = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")


def rows_under(heading: str) -> list[list[float]]:
    """The numbers of the table under a heading of the page."""
    section = COST.split(heading, 1)[1].split("\n#", 1)[0]
    lines = re.findall(r"^\| [\d,]+ \|.*$", section, re.M)
    assert len(lines) >= 3
    return [[float(cell.replace(",", "")) for cell in line.split("|")[1:-1]] for line in lines]


def test_the_cost_page_shows_what_its_command_prints(tmp_path):
    config, command, shown = (
        re.search(rf"```{language}\n(.*?)```", COST, re.S)[1] for language in ("json", "bash", "text")
    )
    (tmp_path / "qwen2.5-7b").mkdir()
    (tmp_path / "qwen2.5-7b" / "config.json").write_text(config)
    program, *arguments = shlex.split(command)
    done = run_cli(*arguments, cwd=tmp_path)
    assert program == "xkd-pipeline" and done.returncode == 0, done.stderr
    lines = ([line.rstrip() for line in text.splitlines() if line.strip()] for text in (done.stdout, shown))
    assert next(lines) == next(lines)


def test_the_tables_of_the_cost_page_follow_from_its_assumptions():
    for k, _, *of_supports in rows_under("### If k is another one"):
        for support, (measured, line, gib) in zip(("sampled", "topk"), (of_supports[:3], of_supports[3:]), strict=True):
            expected = bytes_per_token(int(k), support)
            assert line == round(expected, 1) and gib == round(expected * 1e9 / GIB, 1)
            assert line == pytest.approx(measured, rel=0.02)
    need = Need(1, 0, 1e9, 0)
    for rate, hours, on_64 in rows_under("### If the rate is another one"):
        assert hours == round(need.gpu_hours(rate), 1) and on_64 == round(need.gpu_hours(rate) / 64, 1)
    once, scoring = need.gpu_hours(2500), need.gpu_hours(4 * 2500)
    for experiments, *hours in rows_under("## Against an online teacher"):
        assert hours == [round(h, 1) for h in (once, once + experiments * scoring, experiments * once)]
    shard = 1024 * 512 * bytes_per_token(32, "sampled")
    assert f"about {1_953_125 / 1024:,.0f} shards of {shard / 2**20:.0f} MiB" in COST
    assert f"{1024 * 512 / 2500 / 60:.1f} minutes at this rate" in COST


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_of_prose_are_short(page):
    """Tables and code are as wide as what they show."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    assert [line for line in text.splitlines() if len(line) > 140 and not line.startswith("|")] == []


def test_the_readme_is_finished_by_its_readers():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1200

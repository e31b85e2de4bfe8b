"""What holds for the documentation: its code runs, its commands and parameters exist."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.caching import cache as cache_app
from pipeline.cli import app
from pipeline.params import Params
from pipeline.shards.selection import Selection
from stages.batches import collate, from_rows
from stages.students import StudentLearner
from stages.training import held_out
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_loop_for_your_own_trainer_learns_from_the_cache(cache, student, tmp_path, monkeypatch):
    (tmp_path / "data" / "models").mkdir(parents=True)
    (tmp_path / "data" / "teacher").symlink_to(cache / "selection")
    (tmp_path / "data" / "models" / "student").symlink_to(student)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-trainer.md").read_text(), re.S)
    names: dict = {}
    exec(code, names)
    rows = list(Selection(cache / "selection").rows("train"))
    batch = collate(from_rows(rows, topk=True))

    def kl(model) -> float:
        return held_out(StudentLearner(model, objective="fkl", nll_weight=0), [batch], torch.device("cpu"))["kd"]

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
    for section in ("prepare", "teach", "generate", "reward", "distill", "evaluate", "report"):
        for name in re.findall(rf"`({section}\.[a-z_.]+[a-z])[`:=]", text):
            assert name in known, name


def test_every_line_of_code_that_the_derivation_points_to_says_what_it_claims():
    text = (ROOT / "docs" / "x-kd.md").read_text()
    pointers = re.findall(r"\]\(\.\./([\w/]+\.py)#L(\d+)\) \| `(.+)` \|$", text, re.M)
    assert len(pointers) == text.count("](../stages") > 20
    for file, number, code in pointers:
        lines = (ROOT / file).read_text().split("\n")
        places = [place for place, line in enumerate(lines, start=1) if code in line]
        assert int(number) in places, f"{file}#L{number}: {code} is in lines {places}"

"""What holds for stores and selections of version 1 of the schema: read, verified, served and exported as they are."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from pipeline.params import Params
from pipeline.params.file import load_params
from pipeline.store.identity import Request, Sampling, sample_key, score_key
from pipeline.store.requests import RequestFolder
from pipeline.store.schema import row_digest
from pipeline.store.selection import Selection
from pipeline.store.storage import Storage
from pipeline.store.training_rows import TeacherRows
from pipeline.teacher.teacher import Teacher, sampling_request, scoring_request
from pipeline.upkeep.catalogue import catalogue
from pipeline.upkeep.export import export, splits_of_request, splits_of_selection
from pipeline.upkeep.verify import verify_selection, verify_store
from stages.generate import generate
from tests.conftest import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "version1"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
SELECTIONS = {"materialised": 4, "in-store": 8, "scored": 4, "text": 0, "text-in-store": 0}  # and their k


@pytest.fixture
def old(tmp_path) -> Path:
    return shutil.copytree(FIXTURE, tmp_path / "old")


def params_of(old: Path, *overrides: str) -> Params:
    given = [f"generate.teacher={old / 'model'}", "generate.engine=hf", "generate.support=topk"]
    return load_params(None, [*given, "template={prompt}", "max_tokens=6", *overrides])


def rows_of(name: str, part: str) -> dict[str, str]:
    """Key of every row, and its digest."""
    return EXPECTED[name]["parts"][part]["rows"]


def test_requests_and_rows_have_the_identities_that_they_had(old):
    params = params_of(old)
    teacher = Teacher.of(params.generate)
    assert teacher.description["identity"] == EXPECTED["materialised"]["teacher"]
    drawn = sampling_request(params, teacher, temperature=1.0, top_p=1.0)
    given = scoring_request(params, teacher)
    parts = EXPECTED["materialised"]["parts"]
    assert drawn.identity == parts["train"]["request"] == parts["validation"]["request"]
    assert given.identity == parts["scored"]["request"]
    assert drawn == Request("sample", "{prompt}", 1, 0, Sampling(1.0, 1.0, 6, (2,)))
    for row in Selection(old / "materialised").rows("train"):
        assert sample_key(drawn, row.prompt_ids, row.sample) == row.key
    for row in Selection(old / "materialised").rows("scored"):
        assert score_key(row.prompt_ids, row.response_ids) == row.key


def test_every_row_is_found_under_its_key(old):
    for expected in EXPECTED.values():
        for part in expected["parts"].values():
            folder = RequestFolder(old / "store", expected["teacher"], part["request"])
            index = folder.index()
            assert index.keys() >= part["rows"].keys() and not folder.damaged
            assert all(any(each.k >= expected["k"] for each in index[key]) for key in part["rows"])


def test_the_prompts_are_served_without_a_teacher(old, tmp_path, monkeypatch):
    """No weights are loaded, and the selection has the rows that it had."""

    def refuse(*_):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr("pipeline.teacher.session.open_engine", refuse)
    summary = generate(params_of(old, "generate.k=4"), old / "prompts.parquet", tmp_path / "out", old / "store")
    assert summary.made == 0 and summary.cached == sum(
        len(part["rows"]) for part in EXPECTED["materialised"]["parts"].values()
    )
    selection = Selection(tmp_path / "out", old / "store")
    for part in EXPECTED["materialised"]["parts"]:
        assert {row.key: row_digest(row).hex() for row in selection.rows(part)} == rows_of("materialised", part)


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_read_with_the_content_that_they_had(old, name):
    selection = Selection(old / name, old / "store")
    assert selection.manifest["k"] == SELECTIONS[name] and selection.parts.keys() == EXPECTED[name]["parts"].keys()
    for part in selection.parts:
        rows = list(selection.rows(part))
        assert {row.key: row_digest(row).hex() for row in rows} == rows_of(name, part)
        loaded = TeacherRows(selection, part)
        assert [row_digest(row) for row in loaded.__getitems__(range(len(rows)))] == [row_digest(row) for row in rows]
        assert all(row.tau is None and row.tail is None for row in rows)
        assert all((row.logprobs is None) == name.startswith("text") for row in rows)
    assert {len(row.response_ids) for row in Selection(old / "scored").rows("train")} == {0, 2}


def test_nothing_is_wrong_with_them(old):
    assert list(verify_store(Storage(old / "store"), "", True, lambda: None)) == []
    for name in SELECTIONS:
        assert list(verify_selection(old / name, old / "store", True)) == []
    requests = list(catalogue(Storage(old / "store")))
    assert sorted(info.ks for info in requests) == [[0], [4, 8], [4, 8]]
    assert all(not info.unreadable for info in requests)


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_exported(old, tmp_path, name):
    export(*splits_of_selection(Selection(old / name, old / "store")), tmp_path / "out")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    assert {part: set(split["key"]) for part, split in loaded.items()} == {
        part: set(found["rows"]) for part, found in EXPECTED[name]["parts"].items()
    }
    assert "weights" not in loaded["train"].column_names
    said = "as text alone" if name.startswith("text") else f"of the {SELECTIONS[name]} likeliest tokens"
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_all_rows_of_a_request_are_exported(old, tmp_path):
    expected = EXPECTED["materialised"]
    name = f"{expected['teacher']}/{expected['parts']['train']['request']}"
    teacher, splits = splits_of_request(Storage(old / "store"), name)
    assert export(teacher, splits, tmp_path / "out") == {"train_k4": 6, "train_k8": 8}

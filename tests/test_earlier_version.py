"""What holds for experiments of the version before: all but checkpoints is read, and no teacher is asked anew."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.layout import Layout
from pipeline.learning.forward import per_row, score_tokens
from pipeline.learning.posterior import load_posterior
from pipeline.models import load_lm
from pipeline.params import Params
from pipeline.params.file import load_params
from pipeline.store.identity import sample_key, score_key
from pipeline.store.requests import RequestFolder
from pipeline.store.schema import row_digest
from pipeline.store.selection import Selection
from pipeline.store.storage import Storage
from pipeline.teacher.teacher import Teacher, sampling_request, scoring_request
from pipeline.upkeep.verify import verify_selection, verify_store
from stages.distill import distill
from stages.evaluate import evaluate
from stages.generate import generate
from stages.report import report
from stages.score import score
from tests.conftest import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "version2"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
SELECTIONS = tuple(EXPECTED["selections"])


@pytest.fixture
def old(tmp_path) -> Path:
    return shutil.copytree(FIXTURE, tmp_path / "old")


def params_of(old: Path, *overrides: str) -> Params:
    given = [
        f"generate.teacher={old / 'teacher'}", "template={prompt}", "max_tokens=6", "generate.engine=hf",
        "generate.k=4", "prepare.task=translation", "score.validation_samples=4", "distill.optimisation.steps=6",
        "distill.evaluate_every=3", "distill.optimisation.batch_size=8", "evaluate.samples=2", "evaluate.bootstrap=20",
    ]  # fmt: skip
    return load_params(None, [*given, *overrides])


def test_requests_and_rows_have_the_identities_that_they_had(old):
    params, told = params_of(old), EXPECTED["selections"]
    teacher = Teacher.of(params.generate)
    assert teacher.identity == told["selection"]["teacher"]
    drawn, scored = sampling_request(params, teacher, 1.0), scoring_request(params, teacher)
    assert drawn.identity == told["selection"]["parts"]["train"]["request"]
    assert scored.identity == told["scored"]["parts"]["references"]["request"]
    assert sampling_request(params, teacher, 0.0).identity == told["answers"]["parts"]["greedy"]["request"]
    for row in Selection(old / "selection").rows("train"):
        assert sample_key(drawn, row.prompt_ids, row.sample) == row.key
    for row in Selection(old / "scored").rows("negatives"):
        assert score_key(row.prompt_ids, row.response_ids) == row.key


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_and_the_store_hold_the_rows_that_they_held(old, name):
    told, selection = EXPECTED["selections"][name], Selection(old / name, old / "store")
    assert selection.parts.keys() == told["parts"].keys() and selection.k == told["k"]
    for part, expected in told["parts"].items():
        assert {row.key: row_digest(row).hex() for row in selection.rows(part)} == expected["rows"]
        assert (
            RequestFolder(old / "store", told["teacher"], expected["request"]).index().keys() >= expected["rows"].keys()
        )
    assert list(verify_selection(old / name, old / "store", True)) == []
    assert list(verify_store(Storage(old / "store"), "", True, lambda: None)) == []


def test_the_teacher_is_asked_nothing_and_the_selections_come_out_the_same(old, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.teacher.session.open_engine", lambda *_: pytest.fail("a teacher was loaded"))
    prompts, store = old / "prompts.parquet", old / "store"
    summary = generate(params_of(old), prompts, tmp_path / "new", store, answers=tmp_path / "answers")
    assert summary.made == 0
    for before, after in (("selection", "new"), ("answers", "answers")):
        files = {path.name: path.read_bytes() for path in (tmp_path / after).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (old / before).iterdir()}


def test_of_what_was_scored_only_new_samples_of_the_student_are_scored_anew(old, tmp_path):
    """They are drawn by the store's own seeds now, so they are others than those of then."""
    summary = score(params_of(old), old / "prompts.parquet", old / "start", tmp_path / "new", old / "store")
    references = [row for row in Selection(tmp_path / "new").rows("references")]
    assert {row.key: row_digest(row).hex() for row in references} == EXPECTED["selections"]["scored"]["parts"][
        "references"
    ]["rows"]
    assert summary.cached >= 8 + 8 and summary.made <= 8 + 4 * 4


def test_students_say_what_they_said(old):
    rows = list(Selection(old / "selection", old / "store").rows("validation"))
    for name, expected in EXPECTED["students"].items():
        model = load_lm(old / name)
        scores = per_row(rows, lambda batch, model=model: [score_tokens(model, batch).logprob])
        for row, (logprobs,) in zip(rows, scores, strict=True):
            np.testing.assert_allclose(logprobs, expected[row.key], atol=1e-5)


def test_rewards_are_read_and_give_every_token_the_reward_that_it_had(old):
    rows = {row.key: row for part in ("train", "validation") for row in Selection(old / "selection").rows(part)}
    for td in ("sarsa", "soft"):
        posterior = load_posterior(old / "reward" / td, old / "start")
        table = pq.read_table(old / "reward" / td / "rewards.parquet").to_pydict()
        known = [rows[key] for key in table["key"] if key in rows]
        values = per_row(known, lambda batch, posterior=posterior: posterior.eval()(batch))
        told = {key: (mu, sigma) for key, mu, sigma in zip(table["key"], table["mu"], table["log_sigma"], strict=True)}
        assert len(known) > 10
        for row, found in zip(known, values, strict=True):
            for value, expected in zip(found, told[row.key], strict=True):
                np.testing.assert_allclose(value, expected, atol=1e-5)


def test_an_experiment_goes_on_from_them_to_the_page(old, tmp_path):
    """Trained with the old reward on the old selection, compared with the old student, shown with the old results."""
    params = params_of(old)
    trained = distill(
        params, old / "selection", old / "start", old / "reward", tmp_path / "student", tmp_path / "metrics",
        tmp_path / "runs", old / "store",
    )  # fmt: skip
    before = json.loads((old / "distill" / "results.json").read_text())
    assert trained["objective"] == before["objective"]
    assert trained["heldout_kd"] == pytest.approx(before["heldout_kd"], abs=1e-4)
    models = {"teacher": old / "teacher", "before": old / "student", "now": tmp_path / "student"}
    prompts = old / "prompts.parquet"
    found = evaluate(params, prompts, models, old / "selection", tmp_path / "out", old / "store", old / "answers")
    kls = {name: modes["heldout"]["kl"]["value"] for name, modes in found["metrics"].items()}
    assert kls["now"] == pytest.approx(kls["before"], abs=1e-4)
    report(params.report, Layout(data=old), tmp_path / "page.html", old / "store", also=[str(tmp_path / "out")])
    page = (tmp_path / "page.html").read_text()
    assert before["objective"] in page and "The recovered reward" in page

"""What holds for rows of sampled tokens on their way into training: batches, the learner, the stage's settings."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import UserError
from pipeline.learning.batches import IGNORED, collate
from pipeline.learning.consistency import Consistency, GivenReward, ZeroReward
from pipeline.learning.divergence import Divergence
from pipeline.learning.forward import score_tokens, teacher_of
from pipeline.learning.job import Job, Training
from pipeline.learning.learner import StudentLearner
from pipeline.learning.residuals import Scaled
from pipeline.learning.terms import Likelihood
from pipeline.learning.trainer import held_out, run
from pipeline.models import load_lm
from pipeline.objectives.divergences import DIVERGENCES
from pipeline.objectives.sparse import sparse_divergence
from pipeline.objectives.supports import systematic
from pipeline.params import Optimisation
from pipeline.params.student import Distill
from pipeline.store.schema import SCHEMA, Columns, to_table
from pipeline.store.training_rows import Rows
from stages.distill.training import name_of, require_tokens
from tests.store.test_shards import make_row

VOCABULARY, K = 44, 8


def answered(model, count: int, support: str, seed: int = 0) -> list:
    """Rows of random prompts and responses as a teacher judges them."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        prompt, response = (rng.integers(4, VOCABULARY, 1 + number % size).astype(np.int32) for size in (3, 6))
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        logprobs, said = torch.log_softmax(logits, -1), torch.from_numpy(response.astype(np.int64))[:, None]
        if support == "sampled":
            places, tau = systematic(logprobs.exp(), K, torch.from_numpy(rng.random(len(response))))
            tail = None
        else:
            places, tau = logprobs.topk(K).indices, None
            tail = logprobs.exp().scatter(-1, places, 0).sum(-1).numpy()
        rows.append(replace(
            make_row(number), prompt_ids=prompt, response_ids=response, lse=logits.logsumexp(-1).numpy(),
            logprobs=logprobs.gather(-1, said)[:, 0].numpy(), topk_ids=places.numpy().astype(np.int32),
            topk_logprobs=logprobs.gather(-1, places).numpy().astype(np.float16),
            tau=None if tau is None else tau.numpy(), tail=tail,
        ))  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def model(teacher):
    return load_lm(teacher).eval()


@pytest.fixture(scope="module", params=["sampled", "topk"])
def rows(request, model):
    return answered(model, 6, request.param)


def decoded(rows) -> Rows:
    """The rows as out of a file that tells of thresholds and tails."""
    values = pa.list_(pa.float32())
    columns = [field for field in SCHEMA if field.name not in ("tau", "tail")]
    schema = pa.schema([*columns, ("tau", values), ("tail", values)])
    return Rows([Columns(to_table(rows, schema))] * len(rows), range(len(rows)))


def test_a_batch_holds_what_the_rows_say_beside_their_tokens(rows):
    batch = collate(rows)
    said, teacher = batch["labels"] != IGNORED, teacher_of(batch)
    columns = {name: [getattr(row, name) for row in rows] for name in ("tau", "tail", "logprobs")}
    sampled = rows[0].tau is not None
    for name, column in (("tau", "tau"), ("tail", "tail"), ("own", "logprobs")):
        if sampled == (name == "tail"):
            assert name not in batch and getattr(teacher, name) is None
            continue
        assert batch[name].shape == said.shape and (batch[name][~said] == 0).all()
        expected = torch.from_numpy(np.concatenate(columns[column]))
        assert torch.equal(batch[name][said], expected) and torch.equal(getattr(teacher, name), expected)
    assert teacher.ids.shape == teacher.logprobs.shape == (int(said.sum()), K)


def test_rows_are_batched_alike_however_they_come(rows):
    empty = {name: getattr(rows[0], name)[:0] for name in ("response_ids", "logprobs", "lse", "topk_ids")}
    empty |= {"topk_logprobs": rows[0].topk_logprobs[:0]}
    empty |= {name: None if getattr(rows[0], name) is None else np.empty(0, np.float32) for name in ("tau", "tail")}
    for some in (rows, [*rows, replace(rows[0], **empty)]):
        batches = [collate(some), collate(some, True), collate(decoded(some), True)]
        for batch in batches[1:]:
            assert batch.keys() == batches[0].keys()
            assert all(torch.equal(batch[name], batches[0][name]) for name in batch)
    nothing = [replace(rows[0], **empty)]
    names = [set(collate(some, True)) for some in (rows, nothing, decoded(nothing))]
    assert names[0] == names[1] == names[2]
    plain = collate(rows, topk=False)
    assert not plain.keys() & {"topk_ids", "topk_logprobs", "tau", "tail", "own"}


def test_a_tail_that_a_file_does_not_tell_is_taken_from_its_values(model):
    """Version 1 has none; a batch may have rows of both versions."""
    rows = answered(model, 6, "topk")
    old = [replace(row, tail=None) for row in rows]
    assert "tail" not in collate(old, True)
    assert "tail" not in collate(Rows([Columns(to_table(old, _without(SCHEMA)))] * 6, range(6)), True)
    for some in ([*rows[:3], *old[3:]], decoded([*rows[:3], *old[3:]])):
        batch = collate(some, True)
        said = batch["labels"] != IGNORED
        known = np.concatenate([row.tail for row in rows])
        torch.testing.assert_close(batch["tail"][said], torch.from_numpy(known), atol=2e-3, rtol=0)
        first = said[:3].sum()
        assert torch.equal(batch["tail"][said][:first], torch.from_numpy(known)[:first])
    above = replace(old[0], topk_logprobs=np.full_like(old[0].topk_logprobs, np.log(1 / K) + 0.01))
    assert (collate([rows[0], above], True)["tail"][1] > 0).all()  # although its values sum to more than 1


def _without(schema):
    return pa.schema([field for field in schema if field.name not in ("tau", "tail")])


def test_rows_that_keep_no_tokens_make_batches_without_a_teacher(model):
    rows = [
        replace(row, topk_ids=row.topk_ids[:, :0], topk_logprobs=row.topk_logprobs[:, :0], tail=np.ones_like(row.tail))
        for row in answered(model, 4, "topk")
    ]
    for batch in (collate(rows, True), collate(rows), collate(decoded(rows), True)):
        assert "topk_ids" not in batch and teacher_of(batch) is None
        assert score_tokens(model, batch).logprob.isfinite().all()


def by_origin(rows, *origins) -> list:
    return [replace(row, origin=origin) for row, origin in zip(rows, origins, strict=True)]


def test_a_batch_says_what_the_teacher_thinks_of_the_tokens_of_student_s_samples_alone(model):
    """A plain top k with it, -inf for other rows; a batch without samples of a student is as it was."""
    rows = by_origin(answered(model, 4, "topk"), "teacher", "student", "reference", "student")
    for some in (rows, decoded(rows)):
        batch = collate(some)
        own, said = batch["own"], batch["labels"] != IGNORED
        assert own.dtype == torch.float32 and (own[~said] == 0).all()
        for number, row in enumerate(rows):
            known = row.logprobs if row.origin == "student" else np.full_like(row.logprobs, -np.inf)
            assert torch.equal(own[number][said[number]], torch.from_numpy(known))
        assert torch.equal(teacher_of(batch).own, own[said])
        others = collate([rows[0], rows[2]])
        assert batch["given"].tolist() == [True, False, True, False]
        assert "own" not in others and others.keys() == batch.keys() - {"own", "given"}
        assert "own" not in collate(some, topk=False)
    unknown = replace(rows[1], logprobs=None)
    assert torch.isneginf(teacher_of(collate([unknown])).own).all()
    none = [replace(row, topk_ids=row.topk_ids[:, :0], topk_logprobs=row.topk_logprobs[:, :0]) for row in rows]
    assert "own" not in collate(none)
    drawn = answered(model, 2, "sampled")
    before, after = collate(drawn), collate(by_origin(drawn, "student", "teacher"))
    assert before.keys() == after.keys() - {"given"} and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_rows_of_a_teacher_are_scored_alike_beside_samples_of_a_student(name, model, student):
    """To the bit; those samples come closer to the divergence of the whole distributions than k and the rest."""
    rows, pupil = answered(model, 40, "topk"), load_lm(student).eval()
    mixed = by_origin(rows, *["teacher", "student"] * 20)
    found, before = (
        score_tokens(pupil, collate(some), sparse_divergence(name, 0.3)).divergence for some in (mixed, rows)
    )
    by_student = torch.cat([torch.full((len(row.response_ids),), row.origin == "student") for row in mixed])
    assert torch.equal(found[~by_student], before[~by_student])
    full = dense_divergence(name, model, pupil, rows)
    assert (before - 2e-3 <= found).all() and (found <= full + 2e-3).all()
    assert name == "tvd" or found[by_student].mean() > before[by_student].mean() + 1e-4


def dense_divergence(name, model, pupil, rows) -> torch.Tensor:
    """Of the whole logits of both, at all response tokens."""
    found = []
    for row in rows:
        ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64))[None]
        with torch.no_grad():
            t, s = (torch.log_softmax(m(ids).logits[0, len(row.prompt_ids) - 1 : -1], -1) for m in (model, pupil))
        found.append(DIVERGENCES[name](t, s, 0.3))
    return torch.cat(found)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_scores_of_cached_rows_are_those_of_the_model_s_whole_logits(name, model, student):
    """On average over all positions, as close to the dense value as the draw of the tokens allows."""
    rows, pupil = answered(model, 200, "sampled"), load_lm(student).eval()
    batch = collate(rows, True)
    found = score_tokens(pupil, batch, sparse_divergence(name, 0.3, "sampled")).divergence
    error = found - dense_divergence(name, model, pupil, rows)
    if name == "rkl":
        assert (error < 1e-3).all() and error.mean() < 0
    else:
        assert error.mean().abs() < 4 * error.std() / len(error) ** 0.5


@pytest.mark.parametrize("objective", ["fkl", "rkl"])
def test_x_distillation_learns_from_sampled_tokens(objective, model, student, tmp_path):
    """The divergence of the whole distributions falls; the loss on held-out rows estimates it (`rkl`: from below).

    The loss on the rows it learned is none: a student learns which tokens were drawn too, if it sees few rows often.
    """
    rows, other = answered(model, 400, "sampled"), answered(model, 200, "sampled", seed=1)
    residuals = {row.key: np.zeros(len(row.response_ids), np.float32) for row in rows}
    reward = partial(collate, extras={"mu": residuals, "log_sigma": residuals})
    scaled, x = Scaled("sarsa", Distill().residual, 1.0, 0.0), Consistency(GivenReward(), 0.01)
    terms = [Likelihood(0), Divergence(objective, tail="sampled")]
    learner = StudentLearner(load_lm(student), [*terms, x], scaled)
    before = dense_divergence(objective, model, learner.student.eval(), other).mean().item()
    optimisation = Optimisation(steps=75, batch_size=16, learning_rate=0.01)
    job = Job(what="t", make="", optimisation=optimisation, run=tmp_path / "run", seed=0, log_every=20)
    run(job, Training(learner, rows, collate=reward))
    after = dense_divergence(objective, model, learner.student.eval(), other).mean().item()
    learner = StudentLearner(learner.student, [*terms, Consistency(ZeroReward(), 0.01)], scaled)
    found = held_out(learner, [collate(other, True)], "cpu")
    assert after < 0.8 * before and found["td_nll"] > 0
    assert 0 < found["kd"] < after if objective == "rkl" else found["kd"] == pytest.approx(after, abs=0.1)


def test_names_tell_a_tail_that_is_not_the_usual_one():
    tails = {
        (tail, sampled): name_of(Distill(tail=tail, reward="none"), sampled)
        for tail in ("auto", "sampled", "bucket", "renorm")
        for sampled in (False, True)
    }
    assert tails == {
        ("auto", False): "fkl", ("auto", True): "fkl", ("bucket", False): "fkl", ("bucket", True): "fkl bucket",
        ("sampled", False): "fkl sampled", ("sampled", True): "fkl", ("renorm", False): "fkl renorm",
        ("renorm", True): "fkl renorm",
    }  # fmt: skip
    assert name_of(Distill(objective="seqkd", tail="renorm"), True) == "x-seqkd (frozen)"


def test_what_a_cache_does_not_keep_is_said_before_training():
    def selection(k: int):
        return SimpleNamespace(k=k, folder="data/teacher")

    require_tokens(Distill(), selection(8), sampled=False)
    require_tokens(Distill(tail="sampled"), selection(8), sampled=True)
    with pytest.raises(UserError, match=r"fkl .* data/teacher keeps none .*generate\.k"):
        require_tokens(Distill(), selection(0), sampled=False)
    with pytest.raises(UserError, match=r"distill\.tail: sampled .* plain top k .*distill\.tail=auto"):
        require_tokens(Distill(tail="sampled"), selection(8), sampled=False)

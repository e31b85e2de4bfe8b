"""What holds for responses of no tokens: they teach nothing and break nothing, alone in a batch or among others."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from pipeline.learning.batches import collate
from pipeline.learning.closeness import HeldOut, LogitSource
from pipeline.learning.consistency import Consistency, GivenReward, JointReward, ScratchReward, ZeroReward
from pipeline.learning.divergence import Divergence
from pipeline.learning.forward import per_row, score_tokens
from pipeline.learning.learner import StudentLearner, count
from pipeline.learning.posterior import RewardPosterior
from pipeline.learning.residuals import Scaled
from pipeline.learning.terms import Likelihood
from pipeline.learning.trainer import held_out
from pipeline.models import load_lm
from pipeline.objectives.sparse import sparse_divergence
from pipeline.params import Residual
from pipeline.store.schema import Row, from_table, to_table
from pipeline.store.selection import Selection
from stages.reward.fit import RewardLearner
from tests.conftest import make_seq2seq_model

POSTERIORS = ("action", "separate"), ("state", "own")


@pytest.fixture(scope="module", params=["causal", "t5"])
def model_path(request, student, tmp_path_factory):
    if request.param == "causal":
        return student
    return make_seq2seq_model(tmp_path_factory.mktemp("t5") / "model", seed=0)


@pytest.fixture(scope="module")
def rows(cache):
    """Cached rows, every other one with an empty response, as a store would give them."""
    nothing = {
        "response_ids": np.empty(0, np.int32),
        "logprobs": np.empty(0, np.float32),
        "lse": np.empty(0, np.float32),
        "tau": np.empty(0, np.float32),
    }
    nothing |= {"topk_ids": np.empty((0, 8), np.int32), "topk_logprobs": np.empty((0, 8), np.float16), "response": ""}
    found = list(Selection(cache / "selection").rows("validation"))
    mixed = [replace(row, **nothing) if number % 2 else row for number, row in enumerate(found)]
    return from_table(to_table(mixed))


def learners(model_path):
    """Every source of a reward, and the reward alone."""
    for kind in ("none", "given", "zero", "scratch", "joint"):
        for head, encoder in (
            (("action", "separate"), ("state", "own")) if kind in ("scratch", "joint") else ((None,) * 2,)
        ):
            posterior = RewardPosterior.from_student(model_path, head, encoder, 0.3) if head else None
            terms = [Likelihood(), Divergence("fkl")]
            rewards = {
                "given": GivenReward, "zero": ZeroReward, "scratch": partial(ScratchReward, posterior, 1.0),
                "joint": partial(JointReward, posterior, 0.1),
            }  # fmt: skip
            if kind != "none":
                terms.append(Consistency(rewards[kind](), 0.1))
            residual = Residual(q_source="logits", gamma=1.0, terminal="zero")
            yield StudentLearner(
                load_lm(model_path), terms, None if kind == "none" else Scaled("sarsa", residual, 1.0, 0.0)
            )
    for head, encoder in POSTERIORS:
        yield RewardLearner(RewardPosterior.from_student(model_path, head, encoder, 0.3), 0.1, "zero")


def batch_of(rows):
    extras = {
        name: {row.key: np.ones(len(row.response_ids), np.float32) for row in rows} for name in ("mu", "log_sigma")
    }
    return collate(rows, True, extras | {"delta": extras["mu"]})


def loss_and_gradients(learner, batch):
    learner.zero_grad()
    loss, sums = learner(count(batch, learner.terminal), **batch)
    loss.backward()
    gradients = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    return loss.detach(), sums, gradients


def test_a_batch_of_nothing_but_empty_responses_has_no_loss_and_no_gradient(model_path, rows):
    batch = batch_of([row for row in rows if not len(row.response_ids)])
    assert batch["labels"].shape == (4, 0) and count(batch, "zero").tolist() == [0, 0, 0, 0]
    for learner in learners(model_path):
        loss, sums, gradients = loss_and_gradients(learner, batch)
        assert loss == 0 and all(value == 0 for value in sums.values())
        assert all((gradient == 0).all() for gradient in gradients.values())
        assert set(held_out(learner, [batch], "cpu").values()) == {0.0}


def test_an_empty_response_among_others_changes_nothing(model_path, rows):
    """In float64: batches of other shapes are added up in another order, which float32 shows."""
    both, alone = batch_of(rows), batch_of([row for row in rows if len(row.response_ids)])
    assert len(both["labels"]) == 2 * len(alone["labels"])
    for learner in learners(model_path):
        found, expected = (loss_and_gradients(learner.double(), batch) for batch in (both, alone))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        assert held_out(learner, [both], "cpu")["loss"] == pytest.approx(held_out(learner, [alone], "cpu")["loss"])


def test_references_may_be_empty_too(model_path):
    """What `teach` learns: batches without a teacher's top k."""
    empty = Row.bare(np.array([5, 6, 7]), np.empty(0, np.int32))
    loss, _, gradients = loss_and_gradients(
        StudentLearner(load_lm(model_path), [Likelihood()]), collate([empty, empty], topk=False)
    )
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())


def test_each_row_gets_its_own_share_of_what_is_scored(model_path, rows):
    model, kl = load_lm(model_path), sparse_divergence("fkl")
    for size in (1, 2, 128):  # an empty one alone, beside another, all together
        found = list(per_row(rows, lambda b: [score_tokens(model, b, kl).divergence], topk=True, batch_size=size))
        assert [len(values) for (values,) in found] == [len(row.response_ids) for row in rows]
        assert all(np.isfinite(values).all() for (values,) in found)


def test_a_prompt_whose_answers_are_all_empty_does_not_count_for_the_divergence(model_path, rows):
    model = load_lm(model_path)
    teacher = LogitSource(load_lm(model_path), "the teacher")
    for sums in HeldOut(rows, teacher, 3).of(LogitSource(model, "the model")).values():
        assert np.isfinite(sums).all() and (sums[:, 1] > 0).all() and len(sums) == len(rows) // 2
    empty = [row for row in rows if not len(row.response_ids)]
    found = HeldOut(empty, teacher, 3).of(LogitSource(model, "the model"))
    assert found.keys() == {"kl", "reverse_kl", "cross_entropy"}  # nothing is kept of no positions
    assert all(sums.shape == (0, 2) for sums in found.values())


def test_rows_are_batched_alike_however_they_come(rows):
    one, other = collate(rows, True), collate(rows)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

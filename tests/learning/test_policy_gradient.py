"""What holds for the policy-gradient term: the plain formula's loss and gradient, whatever the chunk and the batch."""

from functools import partial

import numpy as np
import pytest
import torch

from pipeline.learning.batches import collate
from pipeline.learning.divergence import Divergence
from pipeline.learning.job import Training
from pipeline.learning.learner import StudentLearner, count
from pipeline.learning.policy_gradient import PolicyGradient
from pipeline.learning.terms import Likelihood
from pipeline.learning.trainer import run
from pipeline.models import load_lm
from tests.conftest import make_seq2seq_model
from tests.learning.test_training import make_job, make_rows

EPS = 0.3


@pytest.fixture(params=["causal", "encoder-decoder"])
def model(request, student, tmp_path):
    return load_lm(student if request.param == "causal" else make_seq2seq_model(tmp_path / "t5", seed=1))


def logprobs_of(model, row) -> torch.Tensor:
    """[T, V] of one row alone, over the whole vocabulary, differentiable."""
    prompt, response = (torch.tensor(ids)[None].long() for ids in (row.prompt_ids, row.response_ids))
    if model.config.is_encoder_decoder:
        return model(input_ids=prompt, labels=response).logits[0].log_softmax(-1)
    logits = model(input_ids=torch.cat([prompt, response], 1)).logits[0]
    return logits[prompt.shape[1] - 1 : -1].log_softmax(-1)


@torch.no_grad()
def own_logprobs(model, row) -> np.ndarray:
    """[T] of the response's own tokens."""
    return logprobs_of(model, row)[range(len(row.response_ids)), row.response_ids].numpy()


def drawn(model, rows, weighted: bool = True) -> dict:
    """Extras: an earlier student, near enough for half of the tokens to be inside the range, advantages and weights."""
    rng, extras = np.random.default_rng(3), {"old": {}, "advantage": {}, "weight": {}}
    for row in rows:
        own = own_logprobs(model, row)
        extras["old"][row.key] = own + rng.normal(0, 0.4, len(own))
        extras["advantage"][row.key] = rng.normal(0, 2, len(own))
        extras["weight"][row.key] = rng.uniform(0.7, 1.25, len(own))
    return extras if weighted else {name: extras[name] for name in ("old", "advantage")}


def plain_formula(model, rows, extras) -> tuple[torch.Tensor, int]:
    """The mean loss over all response tokens, and of how many the ratio is outside the range."""
    losses, outside = [], 0
    for row in rows:
        logprobs = logprobs_of(model, row)
        for t, token in enumerate(row.response_ids):
            ratio = (logprobs[t, token] - extras["old"][row.key][t]).exp()
            if "weight" in extras:
                ratio = ratio * extras["weight"][row.key][t]
            advantage = extras["advantage"][row.key][t]
            losses.append(-torch.min(ratio * advantage, ratio.clip(1 - EPS, 1 + EPS) * advantage))
            outside += not 1 - EPS <= ratio.item() <= 1 + EPS
    return torch.stack(losses).mean(), outside


@pytest.mark.parametrize("weighted", [True, False], ids=["minillm", "opd"])
def test_loss_and_gradient_are_those_of_the_plain_formula(model, weighted):
    rows = make_rows(9)
    extras = drawn(model, rows, weighted)
    learner = StudentLearner(model, [PolicyGradient("minillm" if weighted else "opd", EPS)], chunk=5)
    batch = collate(rows, topk=False, extras=extras)
    counts = count(batch, learner.terminal)
    loss, sums = learner(counts, **batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters)
    expected, outside = plain_formula(model, rows, extras)
    torch.testing.assert_close(loss.detach(), expected.detach().float(), atol=1e-5, rtol=1e-5)
    assert 0.2 < outside / counts[0] < 0.8 and sums["clipped"] == outside
    for one, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_it_adds_to_other_terms(student):
    """Each finds its own inputs and means."""
    rows, model = make_rows(6), load_lm(student)
    batch = collate(rows, extras=drawn(model, rows))
    terms = PolicyGradient("minillm", EPS), Divergence("rkl"), Likelihood(0.5)
    learner = StudentLearner(model, terms, chunk=4)
    counts = count(batch, learner.terminal)
    loss, sums = learner(counts, **batch)
    means = {name: value / counts[0] for name, value in sums.items()}
    assert means.keys() == {"pg", "clipped", "kd", "nll"}
    torch.testing.assert_close(loss.detach(), means["pg"] + means["kd"] + 0.5 * means["nll"])
    expected = plain_formula(model, rows, drawn(model, rows))[0]
    torch.testing.assert_close(means["pg"], expected.detach().float(), atol=1e-5, rtol=1e-5)


def test_training_makes_tokens_with_an_advantage_likelier_and_others_less_likely(student, tmp_path):
    """An advantage of 1 for odd tokens and -1 for even ones; the first step begins at a ratio of 1."""
    rows, model = make_rows(16), load_lm(student)
    old = {row.key: own_logprobs(model, row) for row in rows}
    advantage = {row.key: np.where(row.response_ids % 2, 1.0, -1.0) for row in rows}
    make_batch = partial(collate, topk=False, extras={"old": old, "advantage": advantage})
    training = Training(StudentLearner(model, [PolicyGradient("opd")]), rows, collate=make_batch)
    history = run(make_job(tmp_path / "run", steps=20, rate=0.003, batch_size=16), training).history
    clipped = [entry["clipped"] for entry in history if "clipped" in entry]
    assert clipped[0] == 0 and 0 < clipped[-1] <= 1
    change = np.concatenate([own_logprobs(model, row) - old[row.key] for row in rows])
    odd = np.concatenate([row.response_ids % 2 == 1 for row in rows])
    assert change[odd].mean() > 0.1 and change[~odd].mean() < -0.1

"""What holds for losses on sampled tokens: unbiased and exact, in value and gradient, and finite whatever comes."""

import math

import pytest
import torch

from stages.objectives.divergences import DIVERGENCES
from stages.objectives.logprobs import TopK
from stages.objectives.outcomes import dense
from stages.objectives.sampled import SUMMANDS
from stages.objectives.sparse import sparse_divergence
from tests.references import every_support, random_logits, sparse_logprobs

every_estimate = pytest.mark.parametrize("name", SUMMANDS)
INF = math.inf


def rows_of(teacher, ids, tau, label=0):
    """A sampled teacher at M positions: log-probabilities [V] of which ids [M, k] are kept, and the label's own."""
    kept = (ids == label).any(-1)
    own = teacher[label].expand(len(ids)).masked_fill(kept, -INF)
    return TopK(ids, teacher[ids], tau.expand(len(ids)), own=own)


def estimates(name, teacher, ids, tau, student, weight=0.3, label=0, tail="sampled"):
    """[M] for logits [V] of a student, and log-probabilities [V] of a teacher of which ids [M, k] are kept."""
    student = sparse_logprobs(student.expand(len(ids), -1), ids, torch.full((len(ids),), label))
    return sparse_divergence(name, weight, tail)(rows_of(teacher, ids, tau, label), student)


# name -> teacher's logits [V], student's logits [V], k
HARD = {
    "random": (random_logits(0)[0], random_logits(1)[0], 4),
    "k is one": (random_logits(0)[0], random_logits(1)[0], 1),
    "k is the vocabulary": (random_logits(0)[0], random_logits(1)[0], 12),
    "k is all but one": (random_logits(0)[0], random_logits(1)[0], 11),
    "k is more than the vocabulary": (random_logits(0)[0], random_logits(1)[0], 20),
    "identical": (random_logits(0)[0], random_logits(0)[0], 4),
    "flat": (random_logits(0, scale=0.1)[0], random_logits(1)[0], 4),
    "uniform": (torch.zeros(12).double(), random_logits(1)[0], 4),
    "ties": (torch.tensor([2.0, 2, 2, 0, 0, 0, 0, 0, 0, 1, 1, 1]).double(), random_logits(1)[0], 5),
    "far apart": (random_logits(0, scale=30)[0], random_logits(1, scale=30)[0], 4),
    "peaked": (random_logits(0, scale=12)[0], random_logits(1)[0], 4),
    "one-hot teacher": (torch.full((12,), -INF).double().index_fill(0, torch.tensor(3), 0.0), random_logits(1)[0], 4),
    "ids that the teacher excludes": (random_logits(0)[0].index_fill(0, torch.arange(8), -INF), random_logits(1)[0], 6),
}


@every_estimate
@pytest.mark.parametrize("weight", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("case", HARD)
def test_the_mean_over_all_supports_is_the_dense_value_and_its_gradient(name, weight, case):
    teacher, student, k = HARD[case]
    teacher, student = torch.log_softmax(teacher, -1), student.clone().requires_grad_()
    often, ids, tau = every_support(teacher.exp(), k)
    mean = often @ estimates(name, teacher, ids, tau, student, weight)
    expected = DIVERGENCES[name](*dense(teacher, student), weight)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)
    smooth = name != "tvd" or case != "identical"  # |T - S| has a corner at equality
    if smooth:
        gradients = (torch.autograd.grad(x, student)[0] for x in (mean, expected))
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)

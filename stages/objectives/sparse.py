"""A divergence to a teacher of k tokens a position: one of `divergences` over the outcomes that a tail mode leaves."""

import torch
from torch import Tensor

from stages.objectives.divergences import DIVERGENCES
from stages.objectives.head import Divergence
from stages.objectives.logprobs import SparseLogprobs, at_least_float32
from stages.objectives.outcomes import TAILS, outside_too


def sparse_divergence(name: str, weight: float = 0.5, tail: str = "bucket") -> Divergence:
    """A divergence of DIVERGENCES between teacher log-probabilities [N, k] and a student's SparseLogprobs -> [N].

    weight: of its mixture, where it has one; tail: what is made of the mass outside the teacher's top k, of TAILS.
    Ids of probability 0 belong to that mass: those that the teacher excludes, and those that the student does not have.
    Zero, with no gradient, where nothing is left of the teacher because the student has none of its k ids.
    """
    divergence, outcomes = DIVERGENCES[name], TAILS[tail]

    def of(teacher: Tensor, student: SparseLogprobs) -> Tensor:
        teacher = at_least_float32(teacher).to(student.inside.dtype)
        impossible = torch.isneginf(teacher)
        if not impossible.any():
            return divergence(*outcomes(teacher, student), weight)
        silent = impossible.all(-1, keepdim=True)
        sides = outcomes(teacher, outside_too(student, impossible))
        return divergence(*(side.masked_fill(silent, -torch.inf) for side in sides), weight)

    return of

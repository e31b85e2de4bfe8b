"""A divergence to a teacher of k tokens a position: one of `divergences` over the outcomes that a tail mode leaves."""

import torch
from torch import Tensor

from stages.objectives.divergences import DIVERGENCES
from stages.objectives.head import Divergence
from stages.objectives.logprobs import SparseLogprobs, at_least_float32
from stages.objectives.outcomes import TAILS


def sparse_divergence(name: str, weight: float = 0.5, tail: str = "bucket") -> Divergence:
    """A divergence of DIVERGENCES between teacher log-probabilities [N, k] and a student's SparseLogprobs -> [N].

    weight: of its mixture, where it has one; tail: what is made of the mass outside the teacher's top k, of TAILS.
    Zero, with no gradient, where nothing is left of the teacher because the student has none of its k ids.
    """
    divergence, outcomes = DIVERGENCES[name], TAILS[tail]

    def of(teacher: Tensor, student: SparseLogprobs) -> Tensor:
        sides = outcomes(at_least_float32(teacher).to(student.inside.dtype), student)
        silent = torch.isneginf(teacher).all(-1, keepdim=True)
        if silent.any():
            sides = tuple(side.masked_fill(silent, -torch.inf) for side in sides)
        return divergence(*sides, weight)

    return of

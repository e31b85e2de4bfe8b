"""A divergence to a teacher of k tokens per position: over the outcomes that a tail mode leaves, or estimated."""

import torch
from torch import Tensor

from pipeline.objectives.divergences import DIVERGENCES
from pipeline.objectives.head import Divergence
from pipeline.objectives.logprobs import SparseLogprobs, TopK, at_least_float32
from pipeline.objectives.outcomes import TAILS, outside_too
from pipeline.objectives.sampled import sampled_divergence


def sparse_divergence(name: str, weight: float = 0.5, tail: str = "bucket") -> Divergence:
    """A divergence of DIVERGENCES between a teacher's TopK and a student's SparseLogprobs -> [N].

    weight: of its mixture, where it has one; tail: what is made of the mass outside the teacher's ids, of TAILS, or
    `sampled`, which gives unbiased estimates of the full divergence and raises ValueError for a plain top k.
    Ids of probability 0 belong to that mass: those that the teacher excludes, and those that the student does not have.
    Zero, with no gradient, where nothing is left of the teacher because the student has none of its k ids.
    """
    if tail == "sampled":
        return _in_one_type(sampled_divergence(name, weight))
    divergence, outcomes = DIVERGENCES[name], TAILS[tail]

    def of(teacher: TopK, student: SparseLogprobs) -> Tensor:
        impossible = torch.isneginf(teacher.logprobs)
        if not impossible.any():
            return divergence(*outcomes(teacher, student), weight)
        silent = impossible.all(-1, keepdim=True)
        sides = outcomes(teacher, outside_too(student, impossible))
        return divergence(*(side.masked_fill(silent, -torch.inf) for side in sides), weight)

    return _in_one_type(of)


def _in_one_type(divergence: Divergence) -> Divergence:
    """The same for a teacher of any floating type: in at least float32, and in the student's."""

    def of(teacher: TopK, student: SparseLogprobs) -> Tensor:
        logprobs = at_least_float32(teacher.logprobs).to(student.inside.dtype)
        return divergence(teacher._replace(logprobs=logprobs), student)

    return of

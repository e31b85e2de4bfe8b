"""A divergence to a teacher of k tokens per position: over the outcomes that a tail mode leaves, or estimated."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.objectives.divergences import DIVERGENCES
from pipeline.objectives.head import Divergence
from pipeline.objectives.logprobs import SparseLogprobs, TopK, at_least_float32
from pipeline.objectives.outcomes import TAILS, bucket, outside_too, own_apart
from pipeline.objectives.sampled import sampled_divergence


def sparse_divergence(name: str, weight: float = 0.5, tail: str = "bucket") -> Divergence:
    """A divergence of DIVERGENCES between a teacher's TopK and a student's SparseLogprobs -> [N].

    weight: of its mixture, where it has one; tail: what is made of the mass outside the teacher's ids, of TAILS, or
    `sampled`, which gives unbiased estimates of the full divergence and raises ValueError for a plain top k.
    Ids of probability 0 belong to that mass: those that the teacher excludes, and those that the student does not have.
    Zero, with no gradient, where nothing is left of the teacher because the student has none of its k ids.
    With `bucket` and a plain top k, the response's own token is an outcome beside the rest where the teacher has `own`.
    """
    if tail == "sampled":
        return _in_one_type(sampled_divergence(name, weight))
    over = partial(_over, DIVERGENCES[name], weight)
    return _in_one_type(_bucket(over(bucket), over(own_apart)) if tail == "bucket" else over(TAILS[tail]))


def _bucket(plain: Divergence, apart: Divergence) -> Divergence:
    """`plain`, and `apart` at positions of a plain top k that say what the teacher thinks of the response's own token.

    A token that the student cannot say is no outcome of its own.
    """

    def of(teacher: TopK, student: SparseLogprobs) -> Tensor:
        value = plain(teacher, student)
        if teacher.own is None or teacher.tau is not None:
            return value
        own = teacher.own.masked_fill(torch.isneginf(student.label), -torch.inf)
        said = ~torch.isneginf(own)
        return torch.where(said, apart(teacher._replace(own=own), student), value) if said.any() else value

    return of


def _over(divergence: Callable, weight: float, outcomes: Callable) -> Divergence:
    """A divergence over the outcomes that a function of TAILS, or `own_apart`, makes of both sides."""

    def of(teacher: TopK, student: SparseLogprobs) -> Tensor:
        impossible = torch.isneginf(teacher.logprobs)
        if not impossible.any():
            return divergence(*outcomes(teacher, student), weight)
        silent = impossible.all(-1, keepdim=True)
        sides = outcomes(teacher, outside_too(student, impossible))
        return divergence(*(side.masked_fill(silent, -torch.inf) for side in sides), weight)

    return of


def _in_one_type(divergence: Divergence) -> Divergence:
    """The same for a teacher of any floating type: in at least float32, and in the student's."""

    def of(teacher: TopK, student: SparseLogprobs) -> Tensor:
        logprobs = at_least_float32(teacher.logprobs).to(student.inside.dtype)
        return divergence(teacher._replace(logprobs=logprobs), student)

    return of

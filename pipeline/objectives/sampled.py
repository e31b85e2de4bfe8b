"""Divergences to a teacher whose tokens are sampled (see supports): unbiased estimates of those to all its tokens.

The part of D = sum_i p_i f(s_i / p_i) that grows linearly with s_i is taken out through sum_i s_i = 1. What is left is
sum_i p_i g(s_i / p_i), where g (of SUMMANDS) grows like a logarithm, so that the sum over the kept tokens with their
weights w = max(p, tau) in place of p has the same mean and little variance. g(1) = 0: where student and teacher agree,
every estimate is 0. Elsewhere an estimate can be negative; its mean is not.
"""

import torch
from torch import Tensor

from pipeline.objectives.divergences import SUMMANDS, Differentiated, Summand, reverse_kl
from pipeline.objectives.head import Divergence
from pipeline.objectives.logprobs import SparseLogprobs, TopK
from pipeline.objectives.outcomes import outside_too, own_apart
from pipeline.objectives.supports import weighted


def sampled_divergence(name: str, weight: float = 0.5) -> Divergence:
    """The estimate of a divergence of DIVERGENCES, [N]; of `rkl`, and of `jsd` at beta = 1, a lower bound.

    weight: of its mixture, where it has one. The teacher's log-probabilities are of the student's type. Tokens of
    probability 0 count for nothing: where a row has some, because the student does not have these tokens, the rest
    stands for the whole. Zero, with no gradient, where no token is left. Raises ValueError for a plain top k.
    """
    if name == "jsd" and weight in (0, 1):
        name = "rkl" if weight else "fkl"
    estimate = _reverse_kl if name == "rkl" else _estimate(SUMMANDS[name], weight)

    def of(teacher: TopK, student: SparseLogprobs) -> Tensor:
        if teacher.tau is None:
            raise ValueError("tail: sampled needs rows of sampled tokens, and these have a plain top k")
        return estimate(teacher, student)

    return of


def _estimate(summand: Summand, weight: float) -> Divergence:
    def of(teacher: TopK, student: SparseLogprobs) -> Tensor:
        with torch.no_grad():
            logprobs, w = weighted(teacher.logprobs, teacher.tau)
            log_ratio = (student.inside - logprobs).masked_fill_(w == 0, 0)
            value, derivative = summand(log_ratio, weight)
            value, derivative = value.mul_(w).sum(-1), derivative.mul_(w)
        return Differentiated.apply(student.inside, value, derivative)

    return of


def _reverse_kl(teacher: TopK, student: SparseLogprobs) -> Tensor:
    """KL(S || T) over the kept tokens, the response's own where it is not kept, and the rest.

    r log r of a ratio r grows faster than linearly, so there is no estimate of little variance.
    """
    if teacher.own is None:
        raise ValueError("rkl on sampled tokens needs the teacher's log-probability of the response's own token")
    impossible = torch.isneginf(teacher.logprobs)
    silent = impossible.all(-1, keepdim=True)
    student = outside_too(student, impossible) if impossible.any() else student
    return reverse_kl(*(side.masked_fill(silent, -torch.inf) for side in own_apart(teacher, student)))

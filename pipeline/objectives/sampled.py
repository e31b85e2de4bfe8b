"""Divergences to a teacher whose tokens are sampled (see supports): unbiased estimates of those to all its tokens.

The part of D = sum_i p_i f(s_i / p_i) that grows linearly with s_i is taken out through sum_i s_i = 1. What is left is
sum_i p_i g(s_i / p_i), where g grows like a logarithm, so that the sum over the kept tokens with their weights
w = max(p, tau) in place of p has the same mean and little variance. g(1) = 0: where student and teacher agree, every
estimate is 0. Elsewhere an estimate can be negative; its mean is not.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.objectives.divergences import Differentiated, reverse_kl
from pipeline.objectives.head import Divergence
from pipeline.objectives.logprobs import SparseLogprobs, TopK
from pipeline.objectives.outcomes import log_total, outside_too, tail_mass
from pipeline.objectives.supports import weighted

# log(s / p), the weight of the mixture -> g and its derivative for log s, elementwise
Summand = Callable[[Tensor, float], tuple[Tensor, Tensor]]
_LEAST, _MOST = -80.0, 50.0  # log x, beyond which x log(1 + c / x) is 0 or c in float64 too


def _forward_kl(log_ratio: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """log p - log s."""
    return -log_ratio, torch.full_like(log_ratio, -1)


def _jsd(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta (log p - log m) - (1 - beta) (log(1 - beta) + s / p log(1 + beta p / ((1 - beta) s))).

    m = beta p + (1 - beta) s.
    """
    shift = math.log1p(-beta) - math.log(beta)
    of_teacher = logsigmoid(-(log_ratio + shift)) - math.log(beta)
    of_student = _linear_in_the_student(log_ratio, shift)
    return (1 - beta) * (of_student - math.log1p(-beta)) + beta * of_teacher, (1 - beta) * of_student


def _skew_forward_kl(log_ratio: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """log p - log m, m = alpha p + (1 - alpha) s."""
    share = log_ratio + (math.log1p(-alpha) - math.log(alpha))
    return logsigmoid(-share) - math.log(alpha), -torch.sigmoid(share)


def _skew_reverse_kl(log_ratio: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """-log alpha - s / p log(1 + (1 - alpha) p / (alpha s))."""
    shift = math.log(alpha) - math.log1p(-alpha)
    of_student = _linear_in_the_student(log_ratio, shift)
    bounded = log_ratio.clamp(_LEAST, _MOST)
    return of_student - math.log(alpha), of_student + bounded.exp() * torch.sigmoid(-(bounded + shift))


def _linear_in_the_student(log_ratio: Tensor, shift: float) -> Tensor:
    """-x log(1 + exp(-shift) / x) of x = s / p, between -exp(-shift) and 0."""
    bounded = log_ratio.clamp(_LEAST, _MOST)
    return bounded.exp() * logsigmoid(bounded + shift)


def _total_variation(log_ratio: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """1 - min(1, s / p)."""
    shared = log_ratio.clamp_max(0).exp()
    return 1 - shared, 0.5 * (log_ratio.sign() - 1) * shared


SUMMANDS: dict[str, Summand] = {
    "fkl": _forward_kl,
    "jsd": _jsd,
    "skew_fkl": _skew_forward_kl,
    "skew_rkl": _skew_reverse_kl,
    "tvd": _total_variation,
}


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

    r log r of a ratio r grows faster than linearly, so there is no estimate of little variance. The rest is what the
    response's own token leaves of the mass outside the kept ones.
    """
    if teacher.own is None:
        raise ValueError("rkl on sampled tokens needs the teacher's log-probability of the response's own token")
    impossible = torch.isneginf(teacher.logprobs)
    silent = impossible.all(-1, keepdim=True)
    student = outside_too(student, impossible) if impossible.any() else student
    own = teacher.own.to(teacher.logprobs.dtype)
    rest = _difference(tail_mass(teacher).log(), own).masked_fill(torch.isneginf(student.outside), -torch.inf)
    label = student.label.masked_fill(torch.isneginf(own), -torch.inf)
    t = torch.cat([teacher.logprobs, own[:, None], rest[:, None]], -1)
    s = torch.cat([student.inside, label[:, None], _difference(student.outside, label)[:, None]], -1)
    return reverse_kl(*(side.masked_fill(silent, -torch.inf) for side in (t.sub_(log_total(t)), s)))


def _difference(whole: Tensor, part: Tensor) -> Tensor:
    """log(exp(whole) - exp(part)) to the precision of the whole, and not below it; part <= whole but for rounding."""
    limits = torch.finfo(whole.dtype)
    share = (part - whole.clamp_min(limits.min)).exp()
    return whole + torch.log1p(-share.clamp_max(1 - limits.eps))

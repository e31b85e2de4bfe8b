"""Divergences between a teacher and a student, at each state, in log space, with their derivatives.

Every divergence has one signature: log-probabilities of the teacher [..., M] and of the student [..., M] over the
same M outcomes, and the weight of its mixture (beta or alpha; ignored where there is none); the result is [...]. What
the M outcomes are (the vocabulary, or the teacher's top k and one bucket for the rest) is decided in `outcomes`. The
derivative for the student's log-probabilities is written out, so that one tensor is kept for it; the teacher gets none.

Beside each stands its summand g, of which `sampled` makes its estimate out of sampled tokens.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_IMPOSSIBLE = -1e30  # in place of -inf where two of them would be added
# log(s / p), the weight of the mixture -> g and its derivative for log s, elementwise
Summand = Callable[[Tensor, float], tuple[Tensor, Tensor]]
_LEAST, _MOST = -80.0, 50.0  # log x, beyond which x log(1 + c / x) is 0 or c in float64 too


class Differentiated(torch.autograd.Function):
    """A value [...] whose derivative [..., M] for x [..., M] is known."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        return value.clone()

    @staticmethod
    def backward(ctx, d_value: Tensor):
        (derivative,) = ctx.saved_tensors
        return d_value[..., None] * derivative, None, None


def _log_ratio(p: Tensor, q: Tensor) -> Tensor:
    """log P / Q of log-probabilities, 0 where P = 0, whatever Q."""
    return (p - q).nan_to_num_(nan=0.0, neginf=0.0, posinf=math.inf)


def _weighted(log_ratio: Tensor, p: Tensor) -> Tensor:
    """P times a log-ratio, in the latter's memory; 0 where P is, although the ratio may be infinite."""
    return log_ratio.mul_(p).nan_to_num_(nan=0.0, posinf=math.inf)


def _log_mixture(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """log(weight P + (1 - weight) Q) of log-probabilities; about -1e30 where both are 0."""
    p = p.clamp_min(_IMPOSSIBLE).add_(math.log(weight))
    return torch.logaddexp(p, q.clamp_min(_IMPOSSIBLE).add_(math.log1p(-weight)), out=p)


def _linear_in_the_student(log_ratio: Tensor, shift: float) -> Tensor:
    """-x log(1 + exp(-shift) / x) of x = s / p, between -exp(-shift) and 0."""
    bounded = log_ratio.clamp(_LEAST, _MOST)
    return bounded.exp() * logsigmoid(bounded + shift)


def forward_kl(teacher: Tensor, student: Tensor, weight: float = 0.0) -> Tensor:
    """KL(T || S) = sum T (log T - log S); its derivative for log S is -T."""
    with torch.no_grad():
        t = teacher.exp()
        value = _weighted(_log_ratio(teacher, student), t).sum(-1)
    return Differentiated.apply(student, value, t.neg_())


def _forward_kl_summand(log_ratio: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """log p - log s."""
    return -log_ratio, torch.full_like(log_ratio, -1)


def reverse_kl(teacher: Tensor, student: Tensor, weight: float = 1.0) -> Tensor:
    """KL(S || T) = sum S (log S - log T); its derivative for log S is S (log S - log T + 1)."""
    with torch.no_grad():
        s = student.exp()
        terms = _weighted(_log_ratio(student, teacher), s)
        value = terms.sum(-1)
    return Differentiated.apply(student, value, terms.add_(s))


def jsd(teacher: Tensor, student: Tensor, weight: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1), `weight` is its beta.

    beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S; by convention KL(T || S) at beta = 0 and
    KL(S || T) at beta = 1. Its derivative for log S is (1 - beta) S (log S - log M).
    """
    if weight == 0:
        return forward_kl(teacher, student)
    if weight == 1:
        return reverse_kl(teacher, student)
    with torch.no_grad():
        mixed = _log_mixture(teacher, student, weight)
        of_teacher = _weighted(_log_ratio(teacher, mixed), teacher.exp()).sum(-1)
        derivative = _weighted(_log_ratio(student, mixed), student.exp()).mul_(1 - weight)
        value = weight * of_teacher + derivative.sum(-1)
    return Differentiated.apply(student, value, derivative)


def _jsd_summand(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta (log p - log m) - (1 - beta) (log(1 - beta) + s / p log(1 + beta p / ((1 - beta) s))).

    m = beta p + (1 - beta) s.
    """
    shift = math.log1p(-beta) - math.log(beta)
    of_teacher = logsigmoid(-(log_ratio + shift)) - math.log(beta)
    of_student = _linear_in_the_student(log_ratio, shift)
    return (1 - beta) * (of_student - math.log1p(-beta)) + beta * of_teacher, (1 - beta) * of_student


def skew_forward_kl(teacher: Tensor, student: Tensor, weight: float = 0.1) -> Tensor:
    """KL(T || M), M = alpha T + (1 - alpha) S, `weight` is alpha (DistiLLM, arXiv 2402.03898, eq. 2).

    Its derivative for log S is -(1 - alpha) T S / M.
    """
    with torch.no_grad():
        mixed = _log_mixture(teacher, student, weight)
        t = teacher.exp()
        value = _weighted(_log_ratio(teacher, mixed), t).sum(-1)
        share = torch.sub(student, mixed, out=mixed).exp_()
    return Differentiated.apply(student, value, share.mul_(t).mul_(weight - 1))


def _skew_forward_kl_summand(log_ratio: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """log p - log m, m = alpha p + (1 - alpha) s."""
    share = log_ratio + (math.log1p(-alpha) - math.log(alpha))
    return logsigmoid(-share) - math.log(alpha), -torch.sigmoid(share)


def skew_reverse_kl(teacher: Tensor, student: Tensor, weight: float = 0.1) -> Tensor:
    """KL(S || M), M = (1 - alpha) T + alpha S, `weight` is alpha (DistiLLM, arXiv 2402.03898).

    Its derivative for log S is S (log S - log M + 1 - alpha S / M).
    """
    with torch.no_grad():
        mixed = _log_mixture(student, teacher, weight)
        s = student.exp()
        terms = _weighted(_log_ratio(student, mixed), s)
        value = terms.sum(-1)
        share = torch.sub(student, mixed, out=mixed).exp_()
    return Differentiated.apply(student, value, terms.add_(s).sub_(share.mul_(s), alpha=weight))


def _skew_reverse_kl_summand(log_ratio: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """-log alpha - s / p log(1 + (1 - alpha) p / (alpha s))."""
    shift = math.log(alpha) - math.log1p(-alpha)
    of_student = _linear_in_the_student(log_ratio, shift)
    bounded = log_ratio.clamp(_LEAST, _MOST)
    return of_student - math.log(alpha), of_student + bounded.exp() * torch.sigmoid(-(bounded + shift))


def total_variation(teacher: Tensor, student: Tensor, weight: float = 0.0) -> Tensor:
    """Total variation distance, 0.5 sum |T - S|; its derivative for log S is 0.5 sign(S - T) S."""
    with torch.no_grad():
        s = student.exp()
        difference = s - teacher.exp()
        value = 0.5 * difference.abs().sum(-1)
    return Differentiated.apply(student, value, difference.sign_().mul_(s).mul_(0.5))


def _total_variation_summand(log_ratio: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """1 - min(1, s / p)."""
    shared = log_ratio.clamp_max(0).exp()
    return 1 - shared, 0.5 * (log_ratio.sign() - 1) * shared


DIVERGENCES = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jsd,
    "skew_fkl": skew_forward_kl,
    "skew_rkl": skew_reverse_kl,
    "tvd": total_variation,
}
# Of those that are learned from sampled tokens; `rkl` has a way of its own (`sampled`).
SUMMANDS: dict[str, Summand] = {
    "fkl": _forward_kl_summand,
    "jsd": _jsd_summand,
    "skew_fkl": _skew_forward_kl_summand,
    "skew_rkl": _skew_reverse_kl_summand,
    "tvd": _total_variation_summand,
}
MIXTURES = {"jsd": "beta", "skew_fkl": "alpha", "skew_rkl": "alpha"}  # what the weight of a mixture is called


def label(name: str, weight: float) -> str:
    """A divergence as tables call it: `fkl`, `jsd(0.5)`."""
    return f"{name}({weight:g})" if name in MIXTURES else name

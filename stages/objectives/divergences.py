"""Divergences between a teacher and a student, at each state, in log space.

Every divergence has one signature: log-probabilities of the teacher [..., M] and of the student [..., M] over the
same M outcomes, and the weight of its mixture (beta or alpha; ignored where there is none); the result is [...]. What
the M outcomes are (the vocabulary, or the teacher's top k and one bucket for the rest) is decided in `outcomes`.
"""

import math

import torch
from torch import Tensor

_IMPOSSIBLE = -1e30  # in place of -inf where that would have no gradient


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) of log-probabilities [..., M] -> [...].

    Outcomes with p = 0 count as 0 and pass no gradient, whatever q.
    """
    log_ratio = (p - q).nan_to_num(nan=0.0, neginf=0.0, posinf=math.inf)  # p = 0 gives -inf, and NaN where q = 0 too
    return (p.exp() * log_ratio).sum(-1)


def mixture(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """log(weight P + (1 - weight) Q) of log-probabilities [..., M]; about -1e30 where both are 0."""
    p, q = p.clamp_min(_IMPOSSIBLE), q.clamp_min(_IMPOSSIBLE)
    return torch.logaddexp(p + math.log(weight), q + math.log1p(-weight))


def forward_kl(teacher: Tensor, student: Tensor, weight: float = 0.0) -> Tensor:
    """KL(T || S)."""
    return kl(teacher, student)


def reverse_kl(teacher: Tensor, student: Tensor, weight: float = 1.0) -> Tensor:
    """KL(S || T)."""
    return kl(student, teacher)


def jsd(teacher: Tensor, student: Tensor, weight: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1), `weight` is its beta.

    beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S; by convention KL(T || S) at beta = 0 and
    KL(S || T) at beta = 1.
    """
    if weight == 0:
        return forward_kl(teacher, student)
    if weight == 1:
        return reverse_kl(teacher, student)
    mixed = mixture(teacher, student, weight)
    return weight * kl(teacher, mixed) + (1 - weight) * kl(student, mixed)


def skew_forward_kl(teacher: Tensor, student: Tensor, weight: float = 0.1) -> Tensor:
    """KL(T || alpha T + (1 - alpha) S), `weight` is alpha (DistiLLM, arXiv 2402.03898, eq. 2)."""
    return kl(teacher, mixture(teacher, student, weight))


def skew_reverse_kl(teacher: Tensor, student: Tensor, weight: float = 0.1) -> Tensor:
    """KL(S || (1 - alpha) T + alpha S), `weight` is alpha (DistiLLM, arXiv 2402.03898)."""
    return kl(student, mixture(student, teacher, weight))


def total_variation(teacher: Tensor, student: Tensor, weight: float = 0.0) -> Tensor:
    """Total variation distance, 0.5 sum |T - S|."""
    return 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


DIVERGENCES = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jsd,
    "skew_fkl": skew_forward_kl,
    "skew_rkl": skew_reverse_kl,
    "tvd": total_variation,
}

"""Divergences between a teacher and a student, at each state, in log space.

Every divergence has one signature: log-probabilities of the teacher [..., M] and of the student [..., M] over the
same M outcomes, and `beta` where it is a mixture; the result is [...]. What the M outcomes are (the vocabulary, or
the teacher's top k and one bucket for the rest) is decided in `outcomes`.
"""

import math

import torch
from torch import Tensor


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) of log-probabilities [..., M] -> [...].

    Outcomes with p = 0 count as 0 and pass no gradient.
    """
    possible = p > -math.inf
    log_ratio = torch.where(possible, p, 0) - torch.where(possible, q, 0)
    return (torch.where(possible, p.exp(), 0) * log_ratio).sum(-1)


def forward_kl(teacher: Tensor, student: Tensor, beta: float = 0.0) -> Tensor:
    """KL(T || S)."""
    return kl(teacher, student)


def reverse_kl(teacher: Tensor, student: Tensor, beta: float = 1.0) -> Tensor:
    """KL(S || T)."""
    return kl(student, teacher)


def jsd(teacher: Tensor, student: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1).

    beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S; by convention KL(T || S) at beta = 0 and
    KL(S || T) at beta = 1.
    """
    if beta == 0:
        return forward_kl(teacher, student)
    if beta == 1:
        return reverse_kl(teacher, student)
    possible = (teacher > -math.inf) | (student > -math.inf)  # logaddexp(-inf, -inf) has no gradient
    t, s = torch.where(possible, teacher, 0), torch.where(possible, student, 0)
    mixture = torch.where(possible, torch.logaddexp(t + math.log(beta), s + math.log1p(-beta)), -math.inf)
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


DIVERGENCES = {"fkl": forward_kl, "rkl": reverse_kl, "jsd": jsd}

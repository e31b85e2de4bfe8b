"""From hidden states to per-token losses: the language-model head in chunks, never a [B, T, V] tensor.

Each chunk of the head is recomputed in the backward pass, so that memory holds one chunk of logits at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.objectives.divergences import DIVERGENCES
from stages.objectives.outcomes import TAILS, at_least_float32


class TokenScores(NamedTuple):
    """What the objectives need of the student at N response positions."""

    divergence: Tensor  # [N] teacher-student divergence; zero without a teacher
    logprob: Tensor  # [N] log pi(a_t | s_t)
    lse: Tensor  # [N] log-sum-exp of the raw logits


class TopK(NamedTuple):
    """A sparse teacher at N positions."""

    ids: Tensor  # [N, k]
    logprobs: Tensor  # [N, k], full-vocabulary normalisation


def sparse_divergence(name: str, beta: float = 0.5, tail: str = "bucket") -> Callable[[TopK, Tensor], Tensor]:
    """A divergence of DIVERGENCES between a sparse teacher at N positions and student logits [N, V] -> [N].

    tail: what is made of the mass outside the teacher's top k, one of TAILS.
    """

    def divergence(teacher: TopK, logits: Tensor) -> Tensor:
        return DIVERGENCES[name](*TAILS[tail](teacher.ids, teacher.logprobs, logits), beta)

    return divergence


def token_scores(logits: Tensor, labels: Tensor, teacher: TopK | None, divergence: Callable | None) -> TokenScores:
    """Scores of logits [N, V] at labels [N], with a `sparse_divergence` where a teacher is given."""
    logits = at_least_float32(logits)
    lse = torch.logsumexp(logits, -1)
    logprob = logits.gather(-1, labels[:, None]).squeeze(-1) - lse
    if divergence is None or teacher is None:
        return TokenScores(torch.zeros_like(lse), logprob, lse)
    return TokenScores(divergence(teacher, logits), logprob, lse)


def in_chunks(function: Callable[..., tuple[Tensor, ...]], chunk: int, *columns: Tensor) -> tuple[Tensor, ...]:
    """`function(*columns)` for columns of N rows, `chunk` rows at a time, each recomputed in the backward pass."""
    parts = []
    for start in range(0, len(columns[0]), chunk):
        rows = [column[start : start + chunk] for column in columns]
        if torch.is_grad_enabled() and len(columns[0]) > chunk:
            parts.append(checkpoint(function, *rows, use_reentrant=False))
        else:
            parts.append(function(*rows))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def chunked_token_scores(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    teacher: TopK | None,
    divergence: Callable | None,
    chunk: int,
) -> TokenScores:
    """`token_scores(head(hidden), ...)` of hidden [N, H] in chunks of positions."""

    def scores(hidden: Tensor, labels: Tensor, *topk: Tensor) -> TokenScores:
        return token_scores(head(hidden), labels, TopK(*topk) if topk else None, divergence)

    return TokenScores(*in_chunks(scores, chunk, hidden, labels, *(teacher or ())))

"""From hidden states to per-token losses: the language-model head in chunks, never a [B, T, V] tensor.

Each chunk of the head is recomputed in the backward pass, so that memory holds one chunk of logits at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.objectives.outcomes import at_least_float32, bucket


class TokenScores(NamedTuple):
    """What the objectives need of the student at N response positions."""

    divergence: Tensor  # [N] teacher-student divergence; zero without a teacher
    logprob: Tensor  # [N] log pi(a_t | s_t)
    lse: Tensor  # [N] log-sum-exp of the raw logits


class TopK(NamedTuple):
    """A sparse teacher at N positions."""

    ids: Tensor  # [N, k]
    logprobs: Tensor  # [N, k], full-vocabulary normalisation


def token_scores(logits: Tensor, labels: Tensor, teacher: TopK | None, divergence: Callable | None) -> TokenScores:
    """Scores of logits [N, V] at labels [N], with a divergence of `divergences` where a teacher is given."""
    logits = at_least_float32(logits)
    lse = torch.logsumexp(logits, -1)
    logprob = logits.gather(-1, labels[:, None]).squeeze(-1) - lse
    if divergence is None or teacher is None:
        return TokenScores(torch.zeros_like(lse), logprob, lse)
    return TokenScores(divergence(*bucket(teacher.ids, teacher.logprobs, logits)), logprob, lse)


def chunked_token_scores(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    teacher: TopK | None,
    divergence: Callable | None,
    chunk: int,
) -> TokenScores:
    """`token_scores(head(hidden), ...)` of hidden [N, H] in chunks of positions."""
    parts = []
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        part = None if teacher is None else TopK(teacher.ids[rows], teacher.logprobs[rows])

        def scores(hidden_rows, labels_rows, part=part):
            return token_scores(head(hidden_rows), labels_rows, part, divergence)

        if torch.is_grad_enabled() and len(hidden) > chunk:
            parts.append(checkpoint(scores, hidden[rows], labels[rows], use_reentrant=False))
        else:
            parts.append(scores(hidden[rows], labels[rows]))
    return TokenScores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

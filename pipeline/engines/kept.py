"""What an engine keeps of its logits at every position: a support of k tokens, the normaliser, and what is outside."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.engines.base import Answer
from pipeline.objectives.supports import offsets, systematic, top_place

_BYTES = 2**28  # of what lives beside the logits
_BLOCK = 256  # ids per block: the k likeliest lie in the k blocks with the largest maxima


class Kept(NamedTuple):
    """What is kept of N positions. float32 but for the ids."""

    logprobs: Tensor  # [N], of the response's own tokens
    ids: Tensor  # int32 [N, k], the likeliest first
    values: Tensor  # [N, k], their log-probabilities
    lse: Tensor  # [N], log-sum-exp of the logits
    rest: Tensor  # [N], the threshold tau of a sampled support; the mass outside a top k
    dropped: Tensor  # [N], mass on ids that only padding of the embedding has

    def answer(self, key: str, response: np.ndarray, finish: str, support: str) -> Answer:
        """The answer whose T response tokens these N = T positions are."""
        logprobs, ids, values, lse, rest, dropped = (column.cpu().numpy() for column in self)
        sampled = support == "sampled"
        tau, tail = (rest, None) if sampled else (None, rest)
        return Answer(key, response, finish, logprobs, ids, values, lse, tau, tail, float(dropped.max(initial=0)))


def kept(logits: Tensor, tokens: Tensor, k: int, support: str, vocabulary: int | None = None) -> Kept:
    """What is kept of raw logits [N, V], of any float type, where the response has `tokens` [N].

    support: `topk` keeps the k likeliest; `sampled` draws k (at least 1) by `pipeline.objectives.supports`, and leaves
    ids from `vocabulary` on out before everything else: the embedding has them for padding. At most as many are kept as
    there are ids. A row depends on nothing but itself. Logits that are NaN or infinite make such values, and no error.
    """
    size = logits.shape[-1] if support == "topk" else min(vocabulary or logits.shape[-1], logits.shape[-1])
    k, rows = min(k, size), _rows(size, k)
    parts = [_kept(*part, k, support, size) for part in zip(logits.split(rows), tokens.split(rows), strict=True)]
    return Kept(*(torch.cat(column) for column in zip(*parts, strict=True))) if len(parts) > 1 else parts[0]


def kept_of_each(
    logits: Sequence[Tensor], tokens: Sequence[Tensor], k: int, support: str, vocabulary: int | None = None
) -> Iterator[Kept]:
    """`kept` of each of several responses: logits [T, V] and tokens [T] of each. Short ones are computed together."""
    pieces, least = list(zip(logits, tokens, strict=True)), _rows(logits[0].shape[-1], k)
    while pieces:
        ends = np.cumsum([len(piece) for piece, _ in pieces])
        together = int((ends < least).sum()) + 1
        some, pieces = pieces[:together], pieces[together:]
        joined = kept(*(torch.cat(column) for column in zip(*some, strict=True)), k, support, vocabulary)
        lengths = [len(piece) for piece, _ in some]
        yield from map(Kept._make, zip(*(column.split(lengths) for column in joined), strict=True))


def _rows(size: int, k: int) -> int:
    """Rows to be worked on at once: for each a float32 copy, exponentials and, to draw, k blocks of ids and masses."""
    return max(1, _BYTES // (8 * size + 40 * _BLOCK * k))


def _kept(logits: Tensor, tokens: Tensor, k: int, support: str, size: int) -> Kept:
    own, padding = logits.gather(-1, tokens.long()[:, None]).float(), logits[:, size:].float()
    logits = logits[:, :size].float()
    top, values, places = _top(logits, k)
    mass = (logits - top[:, None]).exp_()  # in units of the likeliest's, and so is tau
    total = mass.sum(-1)
    log_total = total.log()
    lse = top + log_total
    if support == "topk":
        rest = mass.scatter_(-1, places, 0).sum(-1) / total  # the others' own sum: 1 - mass would cancel
    else:
        offset = offsets(k, tokens, top_place(values, places), lse)
        masses = mass.gather(-1, places)
        drawn = systematic(mass, k, offset, (masses, places))
        values, order = logits.gather(-1, drawn.places).sort(dim=-1, descending=True, stable=True)
        places, rest = drawn.places.gather(-1, order), drawn.tau / total
    dropped = 1 / (1 + (lse - padding.logsumexp(-1)).exp()) if padding.shape[-1] else torch.zeros_like(lse)

    def logprobs(of: Tensor) -> Tensor:
        return (of - top[:, None]) - log_total[:, None]  # exact where one token has nearly all mass, as of - lse is not

    return Kept(logprobs(own).squeeze(-1), places.int(), logprobs(values), lse, rest, dropped)


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest value of each row [N], its k largest and their places [N, k].

    They lie in the k blocks with the largest maxima, of which there are few.
    """
    full = logits.shape[-1] // _BLOCK * _BLOCK
    if not 0 < k * _BLOCK < full:
        return logits.amax(-1), *logits.topk(k, -1)
    blocks, rest = logits[:, :full].unflatten(-1, (-1, _BLOCK)), logits[:, full:]
    largest = blocks.amax(-1)
    chosen = largest.topk(k, -1).indices
    candidates = blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).flatten(1)
    values, within = torch.cat([candidates, rest], -1).topk(k, -1)
    block = chosen.gather(-1, (within // _BLOCK).clamp_max(k - 1))
    places = torch.where(within < k * _BLOCK, block * _BLOCK + within % _BLOCK, within + full - k * _BLOCK)
    return values[:, 0], values, places

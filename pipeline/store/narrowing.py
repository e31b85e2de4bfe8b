"""A stored row as a selection asks for it: with fewer tokens per position, or the plain top k of a sampled row."""

from dataclasses import replace

import numpy as np

from pipeline.errors import UserError
from pipeline.store.manifest import WRITE_AGAIN
from pipeline.store.schema import TOPK, Row

_CERTAIN = 1.01  # times tau: above it a token was kept for certain; float16 rounds a probability by less


def narrowed(row: Row, k: int, support: str | None) -> Row:
    """The row with at most k tokens per position, of a support; text alone stays as it is, and all rows serve k = 0.

    Raises UserError where the row is of another support and cannot serve (see `holds_top`).
    """
    if row.logprobs is None:
        return row
    if k == 0:
        return replace(row, **_first(row, 0), tau=None, tail=np.ones(len(row.response_ids), np.float32))
    if support == "topk":
        return _plain(row, k) if row.tau is None else _top_of_sampled(row, k)
    if row.tau is None:
        raise UserError(
            f"row {row.key} should be a sample of the teacher's tokens, but has no tau: run `xkd-pipeline cache "
            "verify`, which sets its shard aside, and the same command again"
        )
    return row if k >= row.k else _sampled(row, k)


def holds_top(row: Row, k: int) -> bool:
    """Whether a sampled row has the k likeliest tokens of every position: it holds them for certain, or all tokens."""
    if not len(row.response_ids):
        return True
    tau = row.tau[:, None]
    return row.k >= k and bool(((_mass(row.topk_logprobs[:, :k]) > _CERTAIN * tau) | (tau == 0)).all())


def stored_weights(topk_logprobs: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """What kept tokens [T, k] stand for as they are stored: max(p, tau), or 0 where p is 0; float64 [T, k]."""
    return np.where(np.isneginf(topk_logprobs), 0, np.maximum(_mass(topk_logprobs), tau[:, None]))


def _plain(row: Row, k: int) -> Row:
    if k >= row.k:
        return row
    tail = None if row.tail is None else row.tail + _mass(row.topk_logprobs[:, k:]).sum(-1)
    return replace(row, **_first(row, k), tail=None if tail is None else tail.astype(np.float32))


def _top_of_sampled(row: Row, k: int) -> Row:
    """The weights sum to 1, so the tail is the sum of those behind the k likeliest."""
    if not holds_top(row, k):
        raise UserError(
            f"row {row.key} is a sample of the teacher's tokens that lacks some of the {k} likeliest: {WRITE_AGAIN}"
        )
    behind = stored_weights(row.topk_logprobs[:, k:], row.tau)
    return replace(row, **_first(row, k), tau=None, tail=behind.sum(-1).astype(np.float32))


def _sampled(row: Row, k: int) -> Row:
    import torch

    from pipeline.objectives import supports

    # In float64, so that what is drawn does not depend on how a processor adds up.
    ids, tokens = (torch.from_numpy(values.astype(np.int64)) for values in (row.topk_ids, row.response_ids))
    logprobs, tau = (torch.from_numpy(values.astype(np.float64)) for values in (row.topk_logprobs, row.tau))
    lse = None if row.lse is None else torch.from_numpy(row.lse.astype(np.float64))
    drawn = supports.narrowed(ids, logprobs, tau, k, tokens, lse)
    places = drawn.places.numpy()
    kept = {name: np.take_along_axis(getattr(row, name), places, 1) for name in TOPK}
    return replace(row, **kept, tau=drawn.tau.numpy().astype(np.float32))


def _first(row: Row, k: int) -> dict[str, np.ndarray]:
    return {name: getattr(row, name)[:, :k] for name in TOPK}


def _mass(logprobs: np.ndarray) -> np.ndarray:
    return np.exp(logprobs.astype(np.float64))

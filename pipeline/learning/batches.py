"""Rows as training batches: right-padded sequences, and per response token what is known of it.

L is the longest sequence of a batch, R its longest response. Everything about tokens is [B, R]; `positions` says where
in the sequence the state s_t is that predicts token t, so that the head runs on those positions alone.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.store.schema import TOPK, Row

IGNORED = -100  # label of padding
Extras = Mapping[str, Mapping[str, np.ndarray]]  # name -> key of a row -> values [T], for instance a reward's mu


def collate(rows: Sequence[Row], topk: bool = True, extras: Extras | None = None) -> dict[str, Tensor]:
    """A batch: input_ids, attention_mask [B, L]; positions, labels [B, R]; stop [B]; top-k [B, R, k]; extras [B, R].

    topk: with the kept tokens, and with what rows have of `tau` and `own`, or of `tail`. With a plain top k there is
    `own` where some row is a student's sample, -inf for all others. Where some row is, `given` [B] says which are not.
    Rows of a selection are read by column. Padding is masked everywhere: `labels` is IGNORED there, top-k ids are
    0..k-1 with equal mass, extras are 0, as they are for rows whose extra is None. There is no top k where k is 0.
    """
    column = getattr(rows, "column", lambda name: [getattr(row, name) for row in rows])
    prompt_ids, response_ids = column("prompt_ids"), column("response_ids")
    stop, origins = [finish == "stop" for finish in column("finish")], column("origin")
    topk_ids, topk_logprobs = map(column, TOPK) if topk else (None, None)
    extras = _extras(column, topk, extras or {})
    starts, counts = np.array(list(map(len, prompt_ids))), np.array(list(map(len, response_ids)))
    place, step = np.arange((starts + counts).max()), np.arange(counts.max())
    in_sequence, in_response = place < (starts + counts)[:, None], step < counts[:, None]  # [B, L], [B, R]
    sequences = [ids for pair in zip(prompt_ids, response_ids, strict=True) for ids in pair]
    batch = {
        "input_ids": _fill(sequences, in_sequence, 0, np.int64),
        "attention_mask": in_sequence.astype(np.int64),
        "positions": np.where(in_response, starts[:, None] - 1 + step, 0),
        "labels": _fill(response_ids, in_response, IGNORED, np.int64),
        "stop": np.array(stop),
    }
    if topk_ids is not None and all(ids.size or not len(ids) for ids in topk_ids):
        k = max(1, *(ids.shape[1] for ids in topk_ids))  # an empty response read from a store has no k
        topk_ids, topk_logprobs = (
            [values.reshape(count, k) for values, count in zip(column, counts, strict=True)]
            for column in (topk_ids, topk_logprobs)
        )
        batch["topk_ids"] = _fill(topk_ids, in_response, np.arange(k), np.int64)
        batch["topk_logprobs"] = _fill(topk_logprobs, in_response, -np.log(2 * k), np.float32)
        if "tau" not in extras and "student" in origins:
            extras["own"] = _own(origins, column("logprobs"), counts)
    batch |= {name: _fill(values, in_response, 0, np.float32) for name, values in extras.items()}
    if "student" in origins:
        batch["given"] = np.array([origin != "student" for origin in origins])
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def is_given(batch: dict[str, Tensor]) -> Tensor:
    """Whether each of the batch's N response tokens is of a row that is not the student's own sample, bool [N]."""
    mask = batch["labels"] != IGNORED
    return batch["given"][:, None].expand_as(mask)[mask] if "given" in batch else mask[mask]


def _fill(values: list[np.ndarray], mask: np.ndarray, pad: np.ndarray | float, dtype: type) -> np.ndarray:
    """The values one after the other where the mask [B, S] is set, `pad` elsewhere: [B, S] or [B, S, k]."""
    flat = np.concatenate(values)
    filled = np.empty(mask.shape + flat.shape[1:], dtype)
    filled[mask], filled[~mask] = flat, pad
    return filled


def _extras(column: Callable[[str], list], topk: bool, extras: Extras) -> dict[str, list[np.ndarray]]:
    """What follows the tokens of rows: `extras`, and with the top k `tau` and `own` or `tail`, where rows have them."""
    columns = {name: [by_key[key] for key in column("key")] for name, by_key in extras.items()}
    counts = list(map(len, column("response_ids")))
    columns = {
        name: [np.zeros(count) if value is None else value for value, count in zip(values, counts, strict=True)]
        for name, values in columns.items()
    }
    if not topk:
        return columns
    tau, tail = column("tau"), column("tail")
    if any(values is not None for values in tau):
        return columns | {"tau": tau, "own": column("logprobs")}
    if all(values is None for values in tail):
        return columns
    known = (
        _tail(logprobs) if values is None else values
        for values, logprobs in zip(tail, column("topk_logprobs"), strict=True)
    )
    return columns | {"tail": list(known)}


def _own(origins: list[str], logprobs: list[np.ndarray | None], counts: np.ndarray) -> list[np.ndarray]:
    """The teacher's log-probabilities [T] of the tokens of student's samples; -inf, not looked at, for other rows."""
    return [
        values if origin == "student" and values is not None else np.full(count, -np.inf, np.float32)
        for origin, values, count in zip(origins, logprobs, counts, strict=True)
    ]


def _tail(topk_logprobs: np.ndarray) -> np.ndarray:
    """Mass outside a top k [T, k], for files that do not store it: as exact as rounded values allow."""
    mass = np.exp(topk_logprobs.astype(np.float32)).sum(-1)
    return np.maximum(1 - mass, np.finfo(np.float32).eps)

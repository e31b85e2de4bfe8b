"""Cached rows as training batches, and what a function makes of them row by row."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.learning.batches import Response, collate, padded
from pipeline.store.rows import Rows
from pipeline.store.schema import TOPK, Row


def from_rows(
    rows: Iterable[Row], topk: bool, extras: dict[str, dict[str, np.ndarray]] | None = None
) -> list[Response]:
    """Cached teacher rows as responses. `extras`: name -> key -> values [T], for instance a reward's mu."""
    rows = list(rows)
    columns = _extras(lambda name: [getattr(row, name) for row in rows], topk, extras or {})
    return [
        Response(
            row.prompt_ids,
            row.response_ids,
            row.finish == "stop",
            row.topk_ids if topk else None,
            row.topk_logprobs if topk else None,
            {name: values[number] for name, values in columns.items()},
        )
        for number, row in enumerate(rows)
    ]


def _extras(
    column: Callable[[str], list], topk: bool, extras: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, list[np.ndarray]]:
    """What follows the tokens of rows: `extras`, and with the top k `tau` and `own` or `tail`, where rows have them."""
    columns = {name: [by_key[key] for key in column("key")] for name, by_key in extras.items()}
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


def _tail(topk_logprobs: np.ndarray) -> np.ndarray:
    """Mass outside a top k [T, k] of a file that does not tell it, as well as rounded values know it."""
    mass = np.exp(topk_logprobs.astype(np.float32)).sum(-1)
    return np.maximum(1 - mass, np.finfo(np.float32).eps)


def collate_rows(
    rows: Sequence[Row], topk: bool, extras: dict[str, dict[str, np.ndarray]] | None = None
) -> dict[str, Tensor]:
    """A batch of cached rows; arguments as for `from_rows`. Rows out of a selection are not made for it."""
    column = rows.column if isinstance(rows, Rows) else lambda name: [getattr(row, name) for row in rows]
    return padded(
        *map(column, ("prompt_ids", "response_ids")),
        [finish == "stop" for finish in column("finish")],
        *map(column, TOPK if topk else ()),
        extras=_extras(column, topk, extras or {}),
    )


def per_response(
    rows: Sequence[Row],
    function: Callable[[dict[str, Tensor]], Sequence[Tensor]],
    device: torch.device | str = "cpu",
    topk: bool = False,
    batch_size: int = 128,
) -> Iterator[tuple[Row, list[np.ndarray]]]:
    """Each row with its share [T] of every flat [N] tensor that `function` makes of a batch, without gradients."""
    found = per_token(from_rows(rows, topk), function, device, batch_size)
    yield from zip(rows, found, strict=True)


def per_token(
    responses: Sequence[Response],
    function: Callable[[dict[str, Tensor]], Sequence[Tensor]],
    device: torch.device | str = "cpu",
    batch_size: int = 128,
) -> Iterator[list[np.ndarray]]:
    """The same for responses: for each one its share [T] of every tensor."""
    for start in range(0, len(responses), batch_size):
        part = responses[start : start + batch_size]
        batch = collate(part)
        with torch.no_grad():
            values = function({name: value.to(device) for name, value in batch.items()})
        bounds = np.cumsum([len(response.response_ids) for response in part])[:-1]
        split = [np.split(value.float().cpu().numpy(), bounds) for value in values]
        yield from map(list, zip(*split, strict=True))

"""Responses as training batches: right-padded sequences, and per response token what is known of it.

L is the longest sequence of a batch, R its longest response. Everything about tokens is [B, R]; `positions` says where
in the sequence the state s_t is that predicts token t, so that the head runs on those positions alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # label of padding


class Response(NamedTuple):
    """One prompt with one response; `extras` are float arrays [T] or [T, k] that follow the response's tokens."""

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    stop: bool
    topk_ids: np.ndarray | None = None  # int32 [T, k]
    topk_logprobs: np.ndarray | None = None  # float [T, k]
    extras: dict[str, np.ndarray] | None = None


def from_references(prompt_ids: Sequence[np.ndarray], reference_ids: Sequence[np.ndarray]) -> list[Response]:
    """Prompts with their references, which end by themselves."""
    return [Response(prompt, reference, True) for prompt, reference in zip(prompt_ids, reference_ids, strict=True)]


def collate(responses: Sequence[Response], pad: int = 0) -> dict[str, Tensor]:
    """A batch: input_ids, attention_mask [B, L]; positions, labels [B, R]; stop [B]; top-k [B, R, k]; extras [B, R].

    Padding is masked everywhere: `labels` is IGNORED there, top-k ids are 0..k-1 with equal mass, extras are 0.
    There is no top k where k is 0.
    """
    prompt_ids, response_ids, stop, topk_ids, topk_logprobs, extras = map(list, zip(*responses, strict=True))
    topk = () if topk_ids[0] is None else (topk_ids, topk_logprobs)
    extras = {name: [each[name] for each in extras] for name in extras[0] or {}}
    return padded(prompt_ids, response_ids, stop, *topk, extras=extras, pad=pad)


def padded(
    prompt_ids: list[np.ndarray],
    response_ids: list[np.ndarray],
    stop: list[bool],
    topk_ids: list[np.ndarray] | None = None,
    topk_logprobs: list[np.ndarray] | None = None,
    *,
    extras: dict[str, list[np.ndarray]],
    pad: int = 0,
) -> dict[str, Tensor]:
    """`collate` of columns: one entry a response in each."""
    starts, counts = np.array(list(map(len, prompt_ids))), np.array(list(map(len, response_ids)))
    place, step = np.arange((starts + counts).max()), np.arange(counts.max())
    read, said = place < (starts + counts)[:, None], step < counts[:, None]  # [B, L], [B, R]
    sequences = [ids for pair in zip(prompt_ids, response_ids, strict=True) for ids in pair]
    batch = {
        "input_ids": _fill(sequences, read, pad, np.int64),
        "attention_mask": read.astype(np.int64),
        "positions": np.where(said, starts[:, None] - 1 + step, 0),
        "labels": _fill(response_ids, said, IGNORED, np.int64),
        "stop": np.array(stop),
    }
    if topk_ids is not None and all(ids.size or not len(ids) for ids in topk_ids):
        k = max(1, *(ids.shape[1] for ids in topk_ids))  # an empty response out of a store does not know it
        topk_ids, topk_logprobs = (
            [values.reshape(count, k) for values, count in zip(column, counts, strict=True)]
            for column in (topk_ids, topk_logprobs)
        )
        batch["topk_ids"] = _fill(topk_ids, said, np.arange(k), np.int64)
        batch["topk_logprobs"] = _fill(topk_logprobs, said, -np.log(2 * k), np.float32)
    batch |= {name: _fill(values, said, 0, np.float32) for name, values in extras.items()}
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def _fill(values: list[np.ndarray], mask: np.ndarray, pad: np.ndarray | float, dtype: type) -> np.ndarray:
    """The values one after the other where the mask [B, S] is set, `pad` elsewhere: [B, S] or [B, S, k]."""
    flat = np.concatenate(values)
    filled = np.empty(mask.shape + flat.shape[1:], dtype)
    filled[mask], filled[~mask] = flat, pad
    return filled


@dataclass(frozen=True)
class States:
    """Last hidden states [B, L, H] of a backbone, and where the N response steps are in them."""

    hidden: Tensor
    rows: Tensor  # [N]
    places: Tensor  # [N]

    @property
    def before(self) -> Tensor:
        """[N, H]: s_t, which predicts token t."""
        return self.hidden[self.rows, self.places]

    @property
    def after(self) -> Tensor:
        """[N, H]: s_{t+1}, which has consumed token t."""
        return self.hidden[self.rows, self.places + 1]

    def detach(self) -> "States":
        return States(self.hidden.detach(), self.rows, self.places)


def response_states(backbone, batch: dict[str, Tensor]) -> States:
    """States of a model without its head at the response steps.

    A causal model reads prompt and response; an encoder-decoder reads the prompt, and its decoder the response.
    """
    mask, place = batch["labels"] != IGNORED, batch["positions"]
    if backbone.config.is_encoder_decoder:
        lengths = (batch["attention_mask"].sum(1) - mask.sum(1))[:, None]  # of the prompts
        prompts = batch["input_ids"][:, : int(lengths.max())]
        read = (torch.arange(prompts.shape[1], device=prompts.device) < lengths).long()
        start = prompts.new_full((len(prompts), 1), backbone.config.decoder_start_token_id)
        hidden = decoder_states(backbone, prompts, read, torch.cat([start, batch["labels"].clamp_min(0)], 1))
        place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    else:
        hidden = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    rows = torch.arange(len(hidden), device=hidden.device)[:, None].expand_as(mask)
    return States(hidden, rows[mask], place[mask])


def decoder_states(model, prompts: Tensor, read: Tensor, tokens: Tensor) -> Tensor:
    """Last states [B, R, H] of a decoder that reads `tokens` [B, R], the first of which starts it.

    prompts [B, P] with attention mask `read`. Not every encoder-decoder model has a base model without a head (T5 has
    none), but each has its two halves.
    """
    encoded = model.get_encoder()(input_ids=prompts, attention_mask=read).last_hidden_state
    decoder = model.get_decoder()
    return decoder(
        input_ids=tokens, encoder_hidden_states=encoded, encoder_attention_mask=read, use_cache=False
    ).last_hidden_state


def head_scale(model) -> float:
    """Factor of a model's last states before its head: d_model^-1/2 for T5 with tied embeddings, else 1."""
    return model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else 1.0

"""Forward passes of models over batches: states at the response steps, the head on them, scores of their tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.learning.batches import IGNORED, collate, is_given
from pipeline.objectives.head import Divergence, Head, Scores, token_scores
from pipeline.objectives.logprobs import TopK
from pipeline.store.schema import Row


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


def head_of(model, states: States) -> tuple[Head, Tensor]:
    """A model's output head and the states [N, H] it is applied to."""
    head, scale = model.get_output_embeddings(), head_scale(model)
    return Head(head.weight, head.bias), states.before if scale == 1.0 else states.before * scale


def teacher_of(batch: dict[str, Tensor]) -> TopK | None:
    """The sparse teacher at the response steps of a batch, where it has one."""
    if "topk_ids" not in batch:
        return None
    mask, names = batch["labels"] != IGNORED, ("topk_ids", "topk_logprobs", "tau", "tail", "own")
    given = is_given(batch) if "given" in batch else None
    return TopK(*(batch[name][mask] if name in batch else None for name in names), given)


def score_tokens(model, batch: dict[str, Tensor], divergence: Divergence | None = None, chunk: int = 0) -> Scores:
    """Per-token scores of a language model at the response steps, flat [N] each, without gradients.

    The backbone runs on the whole sequence, the head on response positions only.
    """
    with torch.no_grad():
        head, states = head_of(model, response_states(model.base_model, batch))
        labels = batch["labels"][batch["labels"] != IGNORED]
        return token_scores(head, states, labels, teacher_of(batch), divergence, chunk)


@torch.no_grad()
def has_plain_head(model, what: str) -> bool:
    """Whether a model's logits are its head on its last states, and not scaled, capped or biased later.

    Raises UserError, in which the model is called `what`, where they are NaN or infinite.
    """
    ids = torch.arange(min(4, model.config.get_text_config().vocab_size), device=model.device)[None]
    was_training = model.training
    model.eval()
    if model.config.is_encoder_decoder:
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
        states = decoder_states(model, ids, torch.ones_like(ids), ids)
    else:
        logits = model(input_ids=ids).logits
        states = model.base_model(input_ids=ids).last_hidden_state
    plain = model.get_output_embeddings()(states * head_scale(model))
    model.train(was_training)
    if not logits.isfinite().any(-1).all():
        raise UserError(f"{what} ({type(model).__name__}) has logits that are NaN or infinite: its weights are broken")
    return torch.allclose(logits.float(), plain.float(), rtol=1e-3, atol=1e-3)


def require_plain_head(model, what: str) -> None:
    """Raises UserError where a model has no plain head.

    The losses run the head themselves, on response positions alone; such a model would be trained on other logits.
    """
    if not has_plain_head(model, what):
        raise head_is_not_plain(model, what)


def head_is_not_plain(model, what: str) -> UserError:
    return UserError(
        f"{what} ({type(model).__name__}) changes its logits after its language-model head (scaling or capping, "
        "as Gemma 2, Cohere and Granite do); such models cannot be trained here yet, but can be teachers"
    )


def per_row(
    rows: Sequence[Row],
    function: Callable[[dict[str, Tensor]], Sequence[Tensor]],
    device: torch.device | str = "cpu",
    topk: bool = False,
    batch_size: int = 128,
) -> Iterator[list[np.ndarray]]:
    """For each row its share [T] of every flat [N] tensor that `function` makes of a batch, without gradients."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = collate(part, topk)
        with torch.no_grad():
            values = function({name: value.to(device) for name, value in batch.items()})
        bounds = np.cumsum([len(row.response_ids) for row in part])[:-1]
        split = [np.split(value.float().cpu().numpy(), bounds) for value in values]
        yield from map(list, zip(*split, strict=True))

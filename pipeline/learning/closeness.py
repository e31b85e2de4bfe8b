"""How close a model is to its teacher on held-out prompts: exact KL in both directions, and what a cache can say of it.

The teacher runs forward beside the model, over responses that are there: its own cached samples, and the model's own
samples of the same prompts. The logits of a few positions at a time are compared and forgotten, so that [N, V] of a
batch is never kept. The cached tokens say it too: sampled supports give an unbiased estimate, a top k a lower bound.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from pipeline import console
from pipeline.engines.base import Answer
from pipeline.errors import UserError
from pipeline.learning.batches import IGNORED
from pipeline.learning.forward import has_plain_head, head_of, per_row, response_states, score_tokens
from pipeline.models import best_device, describe_model, load_lm, require_context
from pipeline.objectives.divergences import forward_kl, reverse_kl
from pipeline.objectives.head import chunk_rows
from pipeline.objectives.logprobs import at_least_float32
from pipeline.objectives.outcomes import shared
from pipeline.objectives.sparse import sparse_divergence
from pipeline.params import Generate
from pipeline.store.schema import Row
from pipeline.store.selection import Selection

DROPPED_WARNING = 1e-6  # mass on ids that only one of two models has
Sums = dict[str, np.ndarray]  # measure -> [prompts with tokens, 2]: sum over the tokens, number of tokens


class LogitSource:
    """A language model as a source of logits at the response steps of batches."""

    def __init__(self, model, what: str):
        """what: the model's name in errors. Raises UserError for an encoder-decoder that changes its logits later."""
        self.model, self.what, self.plain = model, what, has_plain_head(model, what)
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        if not self.plain and model.config.is_encoder_decoder:
            raise UserError(f"{what} is an encoder-decoder that changes its logits after its head")

    def at(self, batch: dict[str, Tensor]) -> Callable[[slice], Tensor]:
        """Logits [n, V] of some of the batch's N response steps.

        A model that scales or caps its logits after its head makes them all at once, so give it one response at a time.
        """
        if self.plain:
            head, states = head_of(self.model, response_states(self.model.base_model, batch))
            return lambda rows: linear(states[rows], head.weight, head.bias)
        mask = batch["labels"] != IGNORED
        whole = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        logits = whole[rows[mask], batch["positions"][mask]]
        return lambda rows: logits[rows]


def both_kls(teacher: LogitSource, model: LogitSource, batch: dict[str, Tensor], chunk: int = 0) -> list[Tensor]:
    """KL(T || S), KL(S || T), and the mass outside the shared vocabulary (the larger of the two), [N] each.

    Exact, in float32 or better, over the ids that both models have, each renormalised there: of one family, only the
    padding of an embedding differs. chunk: positions compared at once, 0: as many as make 64 MiB of logits.
    """
    sources, count = (teacher, model), int((batch["labels"] != IGNORED).sum())
    logits_at = [source.at(batch) for source in sources]
    chunk = chunk or chunk_rows(max(source.vocabulary for source in sources))
    parts = []
    for first in range(0, max(count, 1), chunk):
        rows = slice(first, min(first + chunk, count))
        logits = [at_least_float32(at(rows)) for at in logits_at]
        t, s = shared(*logits)
        dropped = [1 - (x[:, : t.shape[-1]].logsumexp(-1) - x.logsumexp(-1)).exp() for x in logits]
        parts.append((forward_kl(t, s), reverse_kl(t, s), torch.maximum(*dropped)))
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def live_teacher(settings: Generate, selection: Selection, kl: str) -> LogitSource | None:
    """The teacher of a selection, loaded for exact KLs; None for kl: cache and, with a warning, where it cannot run."""
    if kl == "cache":
        return None
    try:
        return load_teacher(settings, selection.teacher)
    except UserError as error:
        console.warn(
            f"no exact KL, only what the cached tokens say of it (as with evaluate.kl: cache): the teacher cannot run "
            f"here: {error}"
        )
        return None


def load_teacher(settings: Generate, cached: dict) -> LogitSource:
    """The teacher that a selection describes (`cached`). Raises UserError where it is missing, too large or another."""
    if cached.get("quantization"):
        raise UserError(f"vLLM quantized it ({cached['quantization']}), and transformers does not")
    identity = describe_model(settings.teacher, settings.dtype)["identity"]
    if identity != cached["identity"]:
        raise UserError(f"{settings.teacher} is teacher {identity}, and the cache is of teacher {cached['identity']}")
    what = f"the teacher {settings.teacher}"
    try:
        return LogitSource(load_lm(settings.teacher, cached["dtype"]).to(best_device()), what)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{what} does not fit into memory") from error


class HeldOut:
    """What models are measured on: the teacher's cached samples of held-out prompts."""

    def __init__(self, rows: Sequence[Row], teacher: LogitSource | None, batch_size: int):
        """Rows of one support: `measure` is what their tokens say of KL(T || S), None where they keep none."""
        self.rows, self.teacher, self.batch_size = rows, teacher, batch_size
        self.sampled = any(row.tau is not None for row in rows)
        kept = any(row.topk_ids.size for row in rows)
        self.measure = ("kl_estimate" if self.sampled else "kl_bound") if kept else None

    @property
    def prompts(self) -> dict[str, np.ndarray]:
        """Held-out prompts by id, as token ids."""
        return {row.prompt_id: row.prompt_ids for row in self.rows}

    def of_the_teacher(self) -> tuple[Sums, Sums]:
        """The teacher's own measures, on its samples twice: zero, but for its cross-entropy."""
        if not self.rows:
            return {}, {}
        entropies = self._sums([-np.asarray(row.logprobs, np.float64) for row in self.rows])
        exact = dict.fromkeys(("kl", "reverse_kl") if self.teacher else (), entropies * [0, 1])
        own = dict.fromkeys(exact, np.array([[0.0, 1.0]] * len(self.prompts)))
        cached = {self.measure: entropies * [0, 1]} if self.measure else {}
        return {"cross_entropy": entropies} | cached | exact, own

    def of(self, source: LogitSource) -> Sums:
        """On the teacher's samples: `cross_entropy`, `measure`, and with a live teacher `kl` and `reverse_kl`.

        `kl_estimate`, of rows with sampled supports, is unbiased (at a position it can be negative). `kl_bound`, of a
        top k and the rest as one outcome, is at most the KL.
        """
        divergence = sparse_divergence("fkl", tail="sampled" if self.sampled else "bucket") if self.measure else None

        def cached(batch: dict[str, Tensor]) -> Iterable[Tensor]:
            scores = score_tokens(source.model, batch, divergence)
            return -scores.logprob, *(() if divergence is None else (scores.divergence,))

        values = self._measured(self.rows, cached, source.model.device, self.batch_size, divergence is not None)
        names = ("cross_entropy", *((self.measure,) if self.measure else ()))
        sums = dict(zip(names, map(self._sums, values), strict=True))
        return sums | self._exact(source, self.rows, [row.prompt_id for row in self.rows])

    def of_own_samples(self, source: LogitSource, samples: Mapping[str, Answer]) -> Sums:
        """On the model's own samples of the held-out prompts, by prompt id: `kl` and `reverse_kl`."""
        prompts = self.prompts
        rows = [Row.bare(prompts[name], sample.response_ids, sample.finish) for name, sample in samples.items()]
        return self._exact(source, rows, list(samples))

    def _exact(self, source: LogitSource, rows: Sequence[Row], ids: Sequence[str]) -> Sums:
        if (teacher := self.teacher) is None:
            return {}
        lengths = [(len(row.prompt_ids), len(row.response_ids)) for row in rows]
        require_context(teacher.model.config, lengths, teacher.what)
        size = self.batch_size if teacher.plain and source.plain else 1
        device = source.model.device
        kl, reverse, dropped = self._measured(rows, lambda batch: both_kls(teacher, source, batch), device, size)
        outside = float(np.concatenate([*dropped, np.zeros(1)]).max())
        if outside > DROPPED_WARNING:
            console.warn(
                f"{source.what} and the teacher have vocabularies of different sizes, and up to {outside:.1e} of the "
                "mass at a position is on tokens that only one of them has: KL is over those that both have"
            )
        return {"kl": self._sums(kl, ids), "reverse_kl": self._sums(reverse, ids)}

    @staticmethod
    def _measured(rows: Sequence[Row], function, device, batch_size: int, topk: bool = False) -> list[list[np.ndarray]]:
        """For each tensor that `function` makes of a batch, its values [T] of every row."""
        return list(map(list, zip(*per_row(rows, function, device, topk, batch_size), strict=True)))

    def _sums(self, values: Iterable[np.ndarray], ids: Sequence[str] | None = None) -> np.ndarray:
        """[prompts with tokens, 2] of per-token values [T] of responses, whose prompts are `ids`."""
        ids = [row.prompt_id for row in self.rows] if ids is None else ids
        sums = {identity: np.zeros(2) for identity in ids}
        for identity, each in zip(ids, values, strict=True):
            sums[identity] += (each.sum(dtype=np.float64), len(each))
        return np.array([value for value in sums.values() if value[1]]).reshape(-1, 2)

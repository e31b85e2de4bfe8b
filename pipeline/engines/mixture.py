"""MiniLLM's sampler (arXiv 2306.08543, section 2.2): responses drawn from a mixture of a student and its teacher.

Every token is drawn from p~ = (1 - alpha) S + alpha T. transformers' `generate` runs the student; the teacher reads the
same tokens as a logits processor, with a key-value cache of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.engines.base import Ask, Failure
from pipeline.engines.batched import BatchedEngine, Drawing, filled
from pipeline.errors import UserError
from pipeline.models import Context
from pipeline.objectives.policy_gradient import log_mixture
from pipeline.store.identity import Sampling


@dataclass(frozen=True)
class MixtureAnswer:
    """One response of T tokens, and what each model says of them at temperature 1, over its whole vocabulary."""

    key: str
    response_ids: np.ndarray  # int32 [T]; ends with the stop token where finish is `stop`
    finish: str  # stop | length
    old: np.ndarray  # float32 [T], log-probabilities of the student
    teacher: np.ndarray  # float32 [T], of the teacher


class MixtureEngine(BatchedEngine):
    """Samples from p~. Both models are in memory, on one device, in evaluation mode."""

    def __init__(self, student, teacher, alpha: float, batch_size: int = 64, vocabulary: int | None = None):
        """alpha: the teacher's share. vocabulary: ids that the tokenizer has, where the embeddings may have more.

        Only ids that both models and the tokenizer have are drawn: p~ is renormalised on them.
        """
        if student.config.is_encoder_decoder != teacher.config.is_encoder_decoder:
            raise UserError(
                f"a mixture of {type(student).__name__} and {type(teacher).__name__}: one is an encoder-decoder model "
                "and the other is not; use two of one kind"
            )
        sizes = [model.get_input_embeddings().num_embeddings for model in (student, teacher)]
        contexts = [Context.of(model.config) for model in (student, teacher)]
        tokens = min((context.tokens for context in contexts if context.tokens is not None), default=None)
        super().__init__(student, Context(tokens, contexts[0].each), min(sizes), batch_size)
        self.teacher, self.alpha = teacher, alpha
        self.shared = min(self.vocab_size, vocabulary or self.vocab_size)

    def close(self) -> None:
        self.teacher = None
        super().close()

    def sample(self, asks: Iterable[Ask], sampling: Sampling) -> Iterator[MixtureAnswer | Failure]:
        """Answers in any order. Raises UserError where sampling is not at temperature 1 from the whole distribution."""
        if (sampling.temperature, sampling.top_p) != (1, 1):
            raise UserError(
                f"temperature {sampling.temperature:g} and top_p {sampling.top_p:g}: samples of a mixture of student "
                "and teacher are weighted by their probabilities at temperature 1; set both to 1"
            )
        return self._run(asks, lambda ask: sampling.max_tokens, lambda batch: self._sampled(batch, sampling))

    @torch.inference_mode()
    def _sampled(self, batch: Sequence[Ask], sampling: Sampling) -> list[MixtureAnswer]:
        rows = filled(batch)
        prompts = self._padded([ask.prompt_ids for ask in rows])
        teacher = _Reader(self.teacher, *prompts)
        drawing = _Mixture([ask.seed for ask in rows], sampling, teacher, self.alpha, self.shared)
        tokens = self._generate(*prompts, drawing)
        return [
            MixtureAnswer(ask.key, response, finish, *(column.numpy() for column in columns))
            for ask, (response, finish, columns) in zip(batch, drawing.responses(tokens), strict=False)
        ]


class _Reader:
    """A model that reads what another one's `generate` writes, token by token."""

    def __init__(self, model, prompts: Tensor, mask: Tensor):
        """prompts, mask [B, P], padded as for the other model."""
        self.model, self.mask, self.cache, self.encoded = model, mask, None, None
        if model.config.is_encoder_decoder:
            self.encoded = model.get_encoder()(input_ids=prompts, attention_mask=mask)

    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, V] of the token after input_ids [B, L], which have grown by one token since the last call."""
        first = self.cache is None
        unread = input_ids if first else input_ids[:, -1:]
        if self.encoded is not None:
            if first:  # the other model's start token may be another one
                unread = torch.full_like(unread, self.model.config.decoder_start_token_id)
            inputs = {"encoder_outputs": self.encoded, "decoder_input_ids": unread}
        else:
            if not first:
                self.mask = torch.cat([self.mask, torch.ones_like(unread)], 1)
            positions = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, -unread.shape[1] :]
            inputs = {"input_ids": unread, "position_ids": positions, "logits_to_keep": 1}
        output = self.model(**inputs, attention_mask=self.mask, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return output.logits[:, -1]


class _Mixture(Drawing):
    """Draws from p~ on the `shared` first ids, and remembers both models' log-probabilities of what was drawn."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling, teacher: _Reader, alpha: float, shared: int):
        super().__init__(seeds, sampling)
        self.teacher, self.alpha, self.shared = teacher, alpha, shared

    def step(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        student = scores.float().log_softmax(-1)
        teacher = self.teacher.logits(input_ids).float().log_softmax(-1)
        chosen = self.choose(log_mixture(teacher[:, : self.shared], student[:, : self.shared], self.alpha))
        return chosen, tuple(of.gather(-1, chosen[:, None]).squeeze(-1) for of in (student, teacher))

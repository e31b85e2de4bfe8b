"""The transformers engine: the oracle, and the teacher on machines without vLLM.

transformers' own `generate` runs the model; a logits processor looks at the raw logits of each step, draws the next
token with each sample's own random numbers and keeps k.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline.engines.base import Answer, Answers, Ask, Loading
from pipeline.engines.batched import BatchedEngine, Drawing, filled
from pipeline.engines.kept import Kept, kept, kept_of_each
from pipeline.models import Context, best_device, load_lm
from pipeline.store.identity import Sampling
from pipeline.store.schema import finish_of


class HfEngine(BatchedEngine):
    """Samples and scores with one model."""

    def __init__(self, model, batch_size: int = 64, vocabulary: int | None = None):
        """vocabulary: ids that the tokenizer has, where the model's embedding may have more."""
        import transformers

        super().__init__(model, Context.of(model.config), model.get_input_embeddings().num_embeddings, batch_size)
        self.vocabulary = vocabulary
        self.description = {"engine": "hf", "transformers": transformers.__version__, "torch": torch.__version__}

    @classmethod
    def load(cls, folder: Path, loading: Loading) -> "HfEngine":
        return cls(load_lm(folder, loading.dtype).to(best_device()), loading.batch_size, loading.vocabulary)

    def sample(self, asks: Iterable[Ask], sampling: Sampling, k: int, support: str = "topk") -> Answers:
        return self._run(
            asks, lambda ask: sampling.max_tokens, lambda batch: self._sampled(batch, sampling, k, support)
        )

    def score(self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int], support: str = "topk") -> Answers:
        return self._run(
            asks, lambda ask: len(ask.response_ids), lambda batch: self._scored(batch, k, stop_token_ids, support)
        )

    @torch.inference_mode()
    def _sampled(self, batch: Sequence[Ask], sampling: Sampling, k: int, support: str) -> list[Answer]:
        rows = filled(batch)
        keep = partial(kept, k=k, support=support, vocabulary=self.vocabulary)
        capture = _Capture([ask.seed for ask in rows], sampling, keep)
        tokens = self._generate(*self._padded([ask.prompt_ids for ask in rows]), capture)
        return [
            Kept(*columns).answer(ask.key, response, finish, support)
            for ask, (response, finish, columns) in zip(batch, capture.responses(tokens), strict=False)
        ]

    @torch.inference_mode()
    def _scored(self, batch: Sequence[Ask], k: int, stop_token_ids: Sequence[int], support: str) -> list[Answer]:
        rows = filled(batch)
        logits = self._decoder_logits(rows) if self.seq2seq else self._causal_logits(rows)
        steps = [len(ask.response_ids) for ask in batch]
        views = [row[:n] if self.seq2seq else row[-n - 1 : -1] for row, n in zip(logits, steps, strict=False)]
        responses = [torch.tensor(ask.response_ids, device=logits.device) for ask in batch]
        return [
            captured.answer(ask.key, ask.response_ids, finish_of(ask.response_ids, stop_token_ids), support)
            for ask, captured in zip(batch, kept_of_each(views, responses, k, support, self.vocabulary), strict=True)
        ]

    def _causal_logits(self, batch: Sequence[Ask]) -> torch.Tensor:
        """[B, 1 + R, V]; left padding puts all responses at the end, and only those positions go through the head."""
        input_ids, mask = self._padded([np.concatenate([ask.prompt_ids, ask.response_ids]) for ask in batch])
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        tail = max(len(ask.response_ids) for ask in batch) + 1
        return self.model(input_ids=input_ids, attention_mask=mask, position_ids=positions, logits_to_keep=tail).logits

    def _decoder_logits(self, batch: Sequence[Ask]) -> torch.Tensor:
        """[B, R, V] of a decoder that reads its start token and the responses."""
        input_ids, mask = self._padded([ask.prompt_ids for ask in batch])
        start = np.asarray([self.model.config.decoder_start_token_id], np.int32)
        decoder_ids, _ = self._padded([np.concatenate([start, ask.response_ids[:-1]]) for ask in batch])
        return self.model(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits


class _Capture(Drawing):
    """Draws from the raw logits, and remembers what `keep(logits, tokens)` keeps of them."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling, keep: Callable[[torch.Tensor, torch.Tensor], Kept]):
        super().__init__(seeds, sampling)
        self.keep = keep

    def step(self, input_ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        chosen = self.choose(scores.float())
        return chosen, self.keep(scores, chosen)

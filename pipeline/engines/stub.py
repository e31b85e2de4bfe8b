"""A deterministic fake teacher: answers are a function of the prompt and the seed, no weights are read.

Its answers are stored under an identity of their own, so they can never be taken for a real teacher's.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline import interrupts
from pipeline.engines.base import Answer, Answers, Ask, Loading
from pipeline.engines.kept import kept
from pipeline.models import load_config
from pipeline.store.identity import Sampling
from pipeline.store.schema import finish_of


class StubEngine:
    """Draws `vocab_size`-dimensional logits from a generator seeded by the context."""

    def __init__(self, vocab_size: int, vocabulary: int | None = None):
        self.vocab_size, self.vocabulary = vocab_size, vocabulary
        self.description = {"engine": "stub", "version": "1"}

    @classmethod
    def load(cls, folder: Path, loading: Loading) -> "StubEngine":
        return cls(load_config(folder).get_text_config().vocab_size, loading.vocabulary)

    def close(self) -> None:
        """It holds nothing."""

    def sample(self, asks: Iterable[Ask], sampling: Sampling, k: int, support: str = "topk") -> Answers:
        for ask in interrupts.allowing(asks):
            rng = np.random.default_rng(ask.seed)
            length = int(rng.integers(1, sampling.max_tokens + 1))
            response = rng.integers(0, self.vocab_size, length).astype(np.int32)
            response = response[~np.isin(response, sampling.stop_token_ids)]
            if len(response) < sampling.max_tokens:
                response = np.append(response, np.int32(sampling.stop_token_ids[0]))
            yield self._answer(ask, response, sampling.stop_token_ids, k, support)

    def score(self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int], support: str = "topk") -> Answers:
        for ask in interrupts.allowing(asks):
            yield self._answer(ask, ask.response_ids, stop_token_ids, k, support)

    def _answer(self, ask: Ask, response: np.ndarray, stop_token_ids: Sequence[int], k: int, support: str) -> Answer:
        rng = np.random.default_rng([*map(int, ask.prompt_ids), *map(int, response)])
        logits = torch.from_numpy(rng.standard_normal((len(response), self.vocab_size), dtype=np.float32))
        captured = kept(logits, torch.tensor(response), k, support, self.vocabulary)
        return captured.answer(ask.key, response, finish_of(response, stop_token_ids), support)

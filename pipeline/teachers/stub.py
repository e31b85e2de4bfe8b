"""A deterministic fake teacher: answers are a function of the prompt and the seed, no weights are read.

Its answers are stored under an identity of their own, so they can never be taken for a real teacher's.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline import interrupts
from pipeline.shards.identity import Sampling
from pipeline.shards.schema import finish_of
from pipeline.teachers.base import Answer, Ask, Failure


class StubEngine:
    """Draws `vocab_size`-dimensional logits from a generator seeded by the context."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.description = {"engine": "stub", "version": "1"}

    @classmethod
    def load(cls, folder: Path) -> "StubEngine":
        from pipeline.models import load_config

        return cls(load_config(folder).get_text_config().vocab_size)

    def sample(self, asks: Iterable[Ask], sampling: Sampling, k: int) -> Iterator[Answer | Failure]:
        for ask in interrupts.allowing(asks):
            rng = np.random.default_rng(ask.seed)
            length = int(rng.integers(1, sampling.max_tokens + 1))
            response = rng.integers(0, self.vocab_size, length).astype(np.int32)
            response = response[~np.isin(response, sampling.stop_token_ids)]
            if len(response) < sampling.max_tokens:
                response = np.append(response, np.int32(sampling.stop_token_ids[0]))
            yield self._answer(ask, response, k, sampling.stop_token_ids)

    def score(self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int]) -> Iterator[Answer | Failure]:
        for ask in interrupts.allowing(asks):
            yield self._answer(ask, ask.response_ids, k, stop_token_ids)

    def _answer(self, ask: Ask, response: np.ndarray, k: int, stop_token_ids: Sequence[int]) -> Answer:
        rng = np.random.default_rng([*map(int, ask.prompt_ids), *map(int, response)])
        logits = rng.standard_normal((len(response), self.vocab_size), dtype=np.float32)
        lse = np.log(np.exp(logits).sum(-1))
        logprobs = logits - lse[:, None]
        top = np.argsort(-logprobs, axis=-1, kind="stable")[:, :k].astype(np.int32)
        return Answer(
            ask.key, response, finish_of(response, stop_token_ids),
            np.take_along_axis(logprobs, response[:, None], -1)[:, 0],
            top, np.take_along_axis(logprobs, top, -1), lse,
        )  # fmt: skip

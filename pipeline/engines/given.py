"""No teacher at all: given responses are kept as they are, without log-probabilities, for sequence-level KD."""

from collections.abc import Iterable, Sequence

import numpy as np

from pipeline import interrupts
from pipeline.engines.base import Answer, Answers, Ask, Failure
from pipeline.store.identity import Sampling
from pipeline.store.schema import finish_of


class TextEngine:
    """`score` passes responses through, with k = 0 and no support; there is nobody to `sample` from."""

    def __init__(self):
        self.description = {"engine": "text"}

    def sample(self, asks: Iterable[Ask], sampling: Sampling, k: int, support: str = "topk") -> Answers:
        for ask in interrupts.allowing(asks):
            yield Failure(ask.key, "engine text draws no samples")

    def score(self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int], support: str = "topk") -> Answers:
        for ask in interrupts.allowing(asks):
            empty = np.empty((len(ask.response_ids), 0))
            finish = finish_of(ask.response_ids, stop_token_ids)
            yield Answer(ask.key, ask.response_ids, finish, None, empty.astype(np.int32), empty, None)

    def close(self) -> None:
        """It holds nothing."""

"""The interface of a teacher engine: it answers (sample) or judges given responses (score).

Both return an iterator in any order, so that an engine can batch as it likes; a row that cannot be made comes back as
a Failure and never ends the run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.shards.identity import Sampling


@dataclass(frozen=True)
class Ask:
    """One response wanted, or one given response to be judged."""

    key: str
    prompt_ids: np.ndarray  # int32 [P]
    seed: int = 0
    response_ids: np.ndarray | None = None  # int32 [T], given where the response is to be scored


@dataclass(frozen=True)
class Answer:
    """One response of T tokens with the teacher's top k at every position (columns of a shard)."""

    key: str
    response_ids: np.ndarray  # int32 [T]; ends with the stop token where finish is `stop`
    finish: str  # stop | length
    logprobs: np.ndarray | None  # float32 [T]; None where no teacher was run
    topk_ids: np.ndarray  # int32 [T, k]
    topk_logprobs: np.ndarray  # float32 [T, k]
    lse: np.ndarray | None  # float32 [T]


@dataclass(frozen=True)
class Failure:
    """A row that could not be made."""

    key: str
    reason: str


class Engine(Protocol):
    """`description` goes into each shard's footer: engine and versions."""

    description: dict

    def sample(self, asks: Sequence[Ask], sampling: Sampling, k: int) -> Iterator[Answer | Failure]: ...

    def score(self, asks: Sequence[Ask], k: int, stop_token_ids: Sequence[int]) -> Iterator[Answer | Failure]: ...


def finish_of(response_ids: np.ndarray, stop_token_ids: Sequence[int]) -> str:
    """`stop` where a response ends with a stop token."""
    return "stop" if len(response_ids) and int(response_ids[-1]) in stop_token_ids else "length"

"""The interface of a teacher engine: it draws responses (`sample`) or scores given ones (`score`).

Both return an iterator in any order, so that an engine can batch as it likes; a row that cannot be made comes back as
a Failure and never ends the run. Signals are held back while answers are handed over, so an engine puts its work into
`interrupts.allowed()`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pipeline.errors import UserError
from pipeline.models import Context
from pipeline.store.identity import Sampling
from pipeline.store.schema import value_fault


@dataclass(frozen=True)
class Loading:
    """How a teacher is loaded. Only `dtype` and `quantization` change what it says."""

    dtype: str
    context: int  # the longest prompt plus response that will be asked for, in tokens
    tensor_parallel: int = 1  # GPUs that share each layer
    pipeline_parallel: int = 1  # groups of layers, one after the other
    quantization: str = ""  # vLLM's name; empty: the weights as they are stored
    replicas: int = 1  # copies of the engine, with ray
    replica_engine: str = ""  # what each copy is, with ray
    engine_options: dict[str, bool | int | float | str] = field(default_factory=dict)  # vLLM's own, over ours
    rows: int = 1024  # of one shard; with ray also the most that a copy gets at a time
    vocabulary: int | None = None  # ids that the tokenizer has; higher ones only pad the embedding
    batch_size: int = 64  # rows that hf runs together

    @property
    def devices(self) -> int:
        """Devices (or processes, on a CPU) that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel


class EngineDead(RuntimeError):
    """The engine cannot go on: whatever is asked of it now would fail as well."""


@dataclass(frozen=True)
class Ask:
    """A request: for one response, or for the scores of a given one."""

    key: str
    prompt_ids: np.ndarray  # int32 [P]
    seed: int = 0
    response_ids: np.ndarray | None = None  # int32 [T], given where the response is to be scored


@dataclass(frozen=True)
class Answer:
    """One response of T tokens with the tokens that are kept of the teacher at every position (columns of a shard)."""

    key: str
    response_ids: np.ndarray  # int32 [T]; ends with the stop token where finish is `stop`
    finish: str  # stop | length
    logprobs: np.ndarray | None  # float32 [T]; None where no teacher was run
    topk_ids: np.ndarray  # int32 [T, k]
    topk_logprobs: np.ndarray  # float32 [T, k]
    lse: np.ndarray | None  # float32 [T]
    tau: np.ndarray | None = None  # float32 [T], threshold of a sampled support; None for a plain top k
    tail: np.ndarray | None = None  # float32 [T], mass outside a plain top k; None for a sampled support
    dropped: float = 0.0  # largest mass at a position that was on ids which only padding of the embedding has


@dataclass(frozen=True)
class Failure:
    """A row that could not be made."""

    key: str
    reason: str


Answers = Iterator[Answer | Failure]  # in any order


class Engine(Protocol):
    """`description` goes into each shard's footer: engine and versions.

    k tokens are kept at every position: with support `topk` the likeliest, with `sampled` a draw
    (pipeline.objectives.supports).
    """

    description: dict

    def sample(self, asks: Iterable[Ask], sampling: Sampling, k: int, support: str = "topk") -> Answers: ...

    def score(self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int], support: str = "topk") -> Answers: ...

    def close(self) -> None:
        """Free the memory; nothing is asked afterwards."""


def needed(answers: Iterable[Answer | Failure], what: str) -> Iterator[Answer]:
    """Answers of a model of which every row is needed. Raises UserError at the first that cannot be made."""
    for answer in answers:
        if reason := answer.reason if isinstance(answer, Failure) else value_fault(answer):
            raise UserError(f"{what} gave no answer to row {answer.key}: {reason}")
        yield answer


def too_long(prompt: int, response: int, context: Context) -> str | None:
    """Why a prompt and a response of up to so many tokens do not fit; None where they do."""
    if context.holds(prompt, response):
        return None
    limit = f"{context.tokens} for each" if context.each else f"{context.tokens}"
    return (
        f"a prompt of {prompt} tokens and a response of up to {response} exceed the model's context of {limit}: "
        "shorten the prompt or lower max_tokens"
    )


def unknown_token(ask: Ask, vocabulary: int) -> str | None:
    """Why a prompt or a given response cannot be read: a token that a model of this size lacks; None where it can."""
    highest = max(ids.max(initial=-1) for ids in (ask.prompt_ids, ask.response_ids) if ids is not None)
    if highest < vocabulary:
        return None
    return f"it has token {highest}, and the model has {vocabulary} embeddings: its tokenizer is larger than the model"

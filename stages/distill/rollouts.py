"""MiniLLM's rollouts as one more model that is asked: the mixture of a student and its teacher, loaded when needed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import transformers

from pipeline.engines.base import Answer, Answers, Ask, Failure
from pipeline.engines.mixture import MixtureAnswer, MixtureEngine
from pipeline.files import digest
from pipeline.models import best_device, load_lm
from pipeline.store.identity import Sampling
from pipeline.teacher.teacher import Teacher


def mixture_of(student: Teacher, teacher: Teacher, alpha: float) -> Teacher:
    """The mixture as the store knows it: what it said is found by both identities and the share."""
    identity = digest({"mixture": [student.identity, teacher.identity, alpha]})[:16]
    name = f"{student.description['name']}, mixed with its teacher"
    return replace(student, description=student.description | {"identity": identity, "name": name}, engine="hf")


@dataclass
class Rollouts:
    """An engine that draws from (1 - alpha) S + alpha T; a row's log-probabilities are the student's alone."""

    student: Teacher
    teacher: Teacher
    alpha: float
    _engine: MixtureEngine | None = field(default=None, init=False)

    @property
    def description(self) -> dict:
        return {"engine": "mixture", "transformers": transformers.__version__, "torch": torch.__version__}

    def sample(self, asks: Iterable[Ask], sampling: Sampling, k: int, support: str = "topk") -> Answers:
        return answers_of(self._opened().sample(asks, sampling))

    def score(self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int], support: str = "topk") -> Answers:
        """Rollouts are only drawn; there is never anything to score."""
        if any(True for _ in asks):
            raise ValueError("a mixture of two models scores nothing")
        return iter(())

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _opened(self) -> MixtureEngine:
        if self._engine is None:
            models = (load_lm(of.source, of.loading.dtype).to(best_device()) for of in (self.student, self.teacher))
            loading = self.student.loading
            self._engine = MixtureEngine(*models, self.alpha, loading.batch_size, self.teacher.loading.vocabulary)
        return self._engine


def answers_of(drawn: Iterable[MixtureAnswer | Failure]) -> Iterator[Answer | Failure]:
    """Rollouts as answers with no more than the student's log-probabilities."""
    for each in drawn:
        if isinstance(each, Failure):
            yield each
        else:
            none = np.empty((len(each.response_ids), 0))
            yield Answer(each.key, each.response_ids, each.finish, each.old, none.astype(np.int32), none, None)

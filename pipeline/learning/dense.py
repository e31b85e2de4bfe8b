"""The term that draws a student to the whole distribution of a live teacher, which runs over the same batches."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.learning.closeness import LogitSource
from pipeline.learning.terms import Mean, Steps, Term
from pipeline.objectives.divergences import DIVERGENCES, label
from pipeline.objectives.head import Dense
from pipeline.objectives.outcomes import shared


def against(
    teacher: LogitSource, batch: dict[str, Tensor], divergence: Callable[[Tensor, Tensor, slice], Tensor]
) -> Dense:
    """What the head asks for a chunk of a batch's positions: the divergence from a live teacher, without its gradient.

    divergence: float [N] of the log-probabilities [N, V] of teacher and student over the ids that both have, and the
    chunk's place among the positions.
    """
    with torch.no_grad():
        logits_at = teacher.at(batch)

    def at(student: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            logits = logits_at(rows)
        return divergence(*shared(logits, student), rows)

    return at


class DenseDivergence(Term):
    """A divergence of `objectives.divergences` over the ids that teacher and student have, each renormalised there.

    The teacher is no part of the module: it is not trained, saved or moved. Its logits exist for one chunk of positions
    at a time, or for the whole batch where it changes them after its head.
    """

    def __init__(self, teacher: LogitSource, name: str, mixture: float = 0.5):
        """teacher: on the student's device; its dropout is turned off. mixture: weight of it, where there is one."""
        super().__init__()
        self.method, self.means = label(name, mixture), {"kd": Mean(1.0, "tokens")}
        self.teacher, self.of, self.mixture = teacher, DIVERGENCES[name], mixture
        teacher.model.eval()

    def dense(self, batch: dict[str, Tensor]) -> Dense:
        return against(self.teacher, batch, lambda teacher, student, _: self.of(teacher, student, self.mixture))

    def at(self, steps: Steps, *_: Tensor) -> dict[str, Tensor]:
        return {"kd": steps.scores.divergence}

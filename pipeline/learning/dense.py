"""The term that draws a student to the whole distribution of a live teacher, which runs over the same batches."""

import torch
from torch import Tensor

from pipeline.learning.closeness import LogitSource
from pipeline.learning.terms import Mean, Steps, Term
from pipeline.objectives.divergences import DIVERGENCES, label
from pipeline.objectives.head import Dense
from pipeline.objectives.outcomes import shared


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
        with torch.no_grad():
            logits_at = self.teacher.at(batch)

        def divergence(student: Tensor, rows: slice) -> Tensor:
            with torch.no_grad():
                teacher = logits_at(rows)
            return self.of(*shared(teacher, student), self.mixture)

        return divergence

    def at(self, steps: Steps, *_: Tensor) -> dict[str, Tensor]:
        return {"kd": steps.scores.divergence}

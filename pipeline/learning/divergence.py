"""The term that draws a student to the teacher's kept tokens."""

from torch import Tensor

from pipeline.learning.terms import Mean, Steps, Term
from pipeline.objectives.divergences import label
from pipeline.objectives.sparse import sparse_divergence


class Divergence(Term):
    """A divergence of `objectives.divergences` between the teacher's kept tokens and the student."""

    def __init__(self, name: str, mixture: float = 0.5, tail: str = "bucket"):
        """mixture: weight of the mixture, where it has one; tail: see `sparse_divergence`."""
        super().__init__()
        self.method, self.means = label(name, mixture), {"kd": Mean(1.0, "tokens")}
        self.divergence = sparse_divergence(name, mixture, tail)

    def at(self, steps: Steps, *_: Tensor) -> dict[str, Tensor]:
        return {"kd": steps.scores.divergence}

"""The terms of a student's loss: what each adds at every response token, what its mean is over, what it weighs.

A new loss is a new `Term`, in a module of its own: `means` names what it adds, `inputs` is what it needs of a batch
beside the student's scores, `at` gives the values. `divergence` or `dense` is what the scores hold of teacher and
student, where it needs that. Nothing else asks which terms there are.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from pipeline.learning.forward import States
from pipeline.objectives.head import Dense, Divergence, Scores


class Mean(NamedTuple):
    """One number that a term adds to the loss."""

    weight: float  # 0: it is only logged
    over: str  # tokens of responses, steps (those with a residual), own (of the student's samples) or given (others)
    auxiliary: bool = False  # of a model that is trained beside the student: not in the reported loss


class Steps(NamedTuple):
    """What terms may depend on at n consecutive response tokens."""

    scores: Scores
    delta: Tensor | None  # [n], the student's scaled residuals, where the learner has any
    kept: Tensor  # [n] bool: tokens that have a residual


class Term(nn.Module):
    """A part of a loss; `method` is what tables call it."""

    method: str
    means: Mapping[str, Mean]
    divergence: Divergence | None = None  # between the teacher's kept tokens and the student, where a term needs it

    def inputs(self, batch: dict[str, Tensor], states: States) -> tuple[Tensor, ...]:
        """Further tensors [N] that `at` is given, which may require gradients."""
        return ()

    def dense(self, batch: dict[str, Tensor]) -> Dense | None:
        """A divergence over the whole vocabulary at the batch's response tokens, for a term that has no other."""
        return None

    def at(self, steps: Steps, *inputs: Tensor) -> dict[str, Tensor]:
        """Each of `means` at n tokens, [n]."""
        raise NotImplementedError


class Likelihood(Term):
    """-log pi of the response's tokens: all of the loss for `sft` and `seqkd`, a summand for others."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.method, self.means = f"{weight:g} nll", {"nll": Mean(weight, "tokens")}

    def at(self, steps: Steps, *_: Tensor) -> dict[str, Tensor]:
        return {"nll": -steps.scores.logprob}

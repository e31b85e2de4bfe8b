"""The term that draws a student to its own sampled tokens by how much likelier a teacher finds them."""

import torch
from torch import Tensor

from pipeline.learning.batches import IGNORED
from pipeline.learning.forward import States
from pipeline.learning.terms import Mean, Steps, Term
from pipeline.objectives.policy_gradient import clipped_surrogate, probability_ratio


class PolicyGradient(Term):
    """The clipped surrogate on tokens that an earlier state of the student drew.

    A batch has [B, R] each, as extras of its rows: `old`, log-probabilities of that student; `advantage`; and where
    tokens were drawn from a mixture, `weight`. Without them, as in held-out batches, the term is 0.
    """

    def __init__(self, method: str, eps: float = 0.2):
        """method: `opd` or `minillm`, which differ in what the batch says."""
        super().__init__()
        self.method, self.eps = method, eps
        # clipped: share of tokens whose ratio is outside the range, whether or not that stops their gradient
        self.means = {"pg": Mean(1.0, "tokens"), "clipped": Mean(0.0, "tokens")}

    def inputs(self, batch: dict[str, Tensor], states: States) -> tuple[Tensor, ...]:
        mask = batch["labels"] != IGNORED
        if "old" not in batch:  # held-out rows, which nobody learns from: nothing is to be said of them
            return tuple(torch.zeros(2, len(states.rows), device=states.hidden.device))
        return tuple(batch[name][mask] for name in ("old", "advantage", "weight") if name in batch)

    def at(self, steps: Steps, old: Tensor, advantage: Tensor, weight: Tensor | float = 1.0) -> dict[str, Tensor]:
        logprob = steps.scores.logprob
        outside = (probability_ratio(logprob.detach(), old, weight) - 1).abs() > self.eps
        return {
            "pg": clipped_surrogate(logprob, old, advantage, weight, self.eps),
            "clipped": outside.to(logprob.dtype),
        }

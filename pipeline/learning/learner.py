"""What is trained: models, and the means that their loss is made of."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from pipeline.learning.batches import IGNORED, is_given
from pipeline.learning.forward import head_of, response_states, teacher_of
from pipeline.learning.residuals import Scaled
from pipeline.learning.terms import Mean, Steps, Term
from pipeline.objectives.avril import followed_steps, kept_steps
from pipeline.objectives.head import Scores, chunked_loss

COUNTS = ("tokens", "steps", "own", "given")  # what means are over: see `terms.Mean`


def count(batch: dict[str, Tensor], terminal: str) -> Tensor:
    """COUNTS of a batch."""
    mask, given = batch["labels"] != IGNORED, is_given(batch).sum()
    return torch.stack([mask.sum(), kept_steps(mask, batch["stop"], terminal).sum(), mask.sum() - given, given])


class Learner(nn.Module):
    """What a TermTrainer trains.

    `forward(counts, **batch)` returns the loss, sum_i weight_i * sum_i / count_i, and {name: sum over the batch} of
    each of `means`, detached.
    """

    means: dict[str, Mean]
    terminal: str = "drop"

    def weights(self, counts: Tensor) -> dict[str, Tensor]:
        """weight_i / count_i of the means that the loss is made of; counts are those of `count`."""
        sizes = dict(zip(COUNTS, counts.clamp_min(1), strict=False))
        return {name: mean.weight / sizes[mean.over] for name, mean in self.means.items() if mean.weight}


class StudentLearner(Learner):
    """A student and the terms of its loss."""

    def __init__(self, student, terms: Sequence[Term], residuals: Scaled | None = None, chunk: int = 0):
        """residuals: the student's, for terms that need them. chunk: positions at once, see `chunked_loss`."""
        super().__init__()
        self.student, self.terms, self.residuals, self.chunk = student, nn.ModuleList(terms), residuals, chunk
        self.means = {name: mean for term in terms for name, mean in term.means.items()}
        self.terminal = residuals.residual.terminal if residuals else "drop"

    def forward(self, counts: Tensor, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch["labels"] != IGNORED
        states = response_states(self.student.base_model, batch)
        inputs = [term.inputs(batch, states) for term in self.terms]
        followed, kept = followed_steps(mask)[mask], kept_steps(mask, batch["stop"], self.terminal)[mask]

        def values(scores: Scores, rows: slice, *tensors: Tensor) -> dict[str, Tensor]:
            delta = self.residuals and self.residuals.of_scores(scores.logprob, scores.lse, followed[rows], kept[rows])
            steps, rest = Steps(scores, delta, kept[rows]), iter(tensors)
            parts = (term.at(steps, *islice(rest, len(own))) for term, own in zip(self.terms, inputs, strict=True))
            return {name: value for part in parts for name, value in part.items()}

        head, before = head_of(self.student, states)
        divergence = next((term.divergence for term in self.terms if term.divergence), None)
        dense = next((found for term in self.terms if (found := term.dense(batch))), None)
        flat = [tensor for each in inputs for tensor in each]
        return chunked_loss(
            head, before, batch["labels"][mask], values, self.weights(counts), teacher_of(batch), divergence,
            flat, self.chunk, neighbours=self.residuals is not None, dense=dense,
        )  # fmt: skip

"""MiniLLM's loss (arXiv 2306.08543, eq. 7): a policy gradient on rollouts, its first step exactly, and plain text."""

import torch
from torch import Tensor

from pipeline.learning.batches import is_given
from pipeline.learning.closeness import LogitSource
from pipeline.learning.dense import against
from pipeline.learning.forward import States
from pipeline.learning.policy_gradient import PolicyGradient
from pipeline.learning.terms import Mean, Steps
from pipeline.objectives.divergences import forward_kl, reverse_kl
from pipeline.objectives.head import Dense
from pipeline.objectives.logprobs import SparseLogprobs, TopK
from pipeline.objectives.sparse import sparse_divergence


class MiniLLM(PolicyGradient):
    """On the student's rollouts the clipped surrogate and KL(S || T); on given text -log S and KL(T || S).

    The single-step part is KL(S || T) at each state of a rollout, which is the gradient of its first reward without
    sampling. The text's soft likelihood is KL(T || S): it differs from the teacher's cross-entropy by a constant.
    """

    def __init__(
        self, eps: float, single_step: float, text: float, tail: str = "bucket", teacher: LogitSource | None = None
    ):
        """single_step, text: weights. teacher: live, for both divergences over all tokens; else over `tail`."""
        super().__init__("minillm", eps)
        self.means = {
            "pg": Mean(1.0, "own"),
            "clipped": Mean(0.0, "own"),
            "single_step": Mean(single_step, "own"),
            "nll": Mean(text / 2, "given"),
            "kd": Mean(text / 2, "given"),
        }
        self.teacher, self.divergence = teacher, None if teacher else _by_origin(tail)
        if teacher:
            teacher.model.eval()

    def dense(self, batch: dict[str, Tensor]) -> Dense | None:
        if self.teacher is None:
            return None
        given = is_given(batch)

        def divergence(teacher: Tensor, student: Tensor, rows: slice) -> Tensor:
            return torch.where(given[rows], forward_kl(teacher, student), reverse_kl(teacher, student))

        return against(self.teacher, batch, divergence)

    def inputs(self, batch: dict[str, Tensor], states: States) -> tuple[Tensor, ...]:
        return (is_given(batch), *super().inputs(batch, states))

    def at(self, steps: Steps, given: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        of_samples = super().at(steps, *inputs) | {"single_step": steps.scores.divergence}
        of_text = {"nll": -steps.scores.logprob, "kd": steps.scores.divergence}
        return {name: torch.where(given, 0, value) for name, value in of_samples.items()} | {
            name: torch.where(given, value, 0) for name, value in of_text.items()
        }


def _by_origin(tail: str):
    """KL(T || S) on given rows, KL(S || T) on the student's own."""
    forward, reverse = (sparse_divergence(name, tail=tail) for name in ("fkl", "rkl"))

    def of(teacher: TopK, student: SparseLogprobs) -> Tensor:
        if teacher.given is None:
            return forward(teacher, student)
        return torch.where(teacher.given, forward(teacher, student), reverse(teacher, student))

    return of

"""What a loss on a sparse teacher knows at a position: k log-probabilities of the teacher and k + 2 of the student."""

from typing import NamedTuple

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half types promoted, float32 and float64 kept."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class TopK(NamedTuple):
    """A sparse teacher at N positions."""

    ids: Tensor  # [N, k], distinct in a row
    logprobs: Tensor  # [N, k], full-vocabulary normalisation, at temperature 1
    tau: Tensor | None = None  # [N], threshold of a sampled support (see supports); None for a plain top k
    tail: Tensor | None = None  # [N], mass outside the ids, where it is known
    own: Tensor | None = None  # [N], log-probability of the response's own token; -inf where it is not looked at
    given: Tensor | None = None  # [N] bool, False at the student's own samples; None where there are none

    def at(self, rows: slice) -> "TopK":
        """The same at some of the positions."""
        return TopK(*(None if x is None else x[rows] for x in self))


class SparseLogprobs(NamedTuple):
    """A student at N positions, as far as a sparse loss depends on it; at least float32."""

    outcomes: Tensor  # [N, k + 1] log-probabilities at the teacher's ids, and of all others together; -inf for none
    label: Tensor  # [N] of the token that followed
    lse: Tensor  # [N] log-sum-exp of the raw logits

    @property
    def inside(self) -> Tensor:
        """[N, k] at the teacher's ids; -inf where the student has no such id."""
        return self.outcomes[:, :-1]

    @property
    def outside(self) -> Tensor:
        """[N] of all other ids together; -inf where there are none."""
        return self.outcomes[:, -1]

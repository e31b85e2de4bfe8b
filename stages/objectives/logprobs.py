"""What a loss on a sparse teacher knows of the student at a position: k + 2 log-probabilities and a normaliser."""

from typing import NamedTuple

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half types promoted, float32 and float64 kept."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


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

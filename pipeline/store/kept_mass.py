"""How much of the teacher's probability the kept tokens have: no loss can teach what a top k leaves out.

A sample stands for all tokens, also for those that were not kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

OUTSIDE_WARNING = 0.1  # mean mass outside the kept tokens from which there is a warning
_BINS = 10_000


@dataclass
class KeptMass:
    """The mass of the kept tokens over positions, in memory that does not grow with them."""

    total: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, np.int64))  # positions by mass, from 0 to 1

    @classmethod
    def of(cls, rows: Iterable) -> "KeptMass":
        """Of rows (anything with `topk_logprobs` [T, k])."""
        mass = cls()
        for row in rows:
            mass.add(row.topk_logprobs)
        return mass

    def add(self, topk_logprobs: np.ndarray) -> None:
        """Positions with the log-probabilities [T, k] of their kept tokens."""
        if topk_logprobs.size:
            mass = np.exp(topk_logprobs.astype(np.float32)).sum(-1).clip(0, 1)  # float16 can sum to more than 1
            self.total += float(mass.sum(dtype=np.float64))
            self.counts += np.bincount(np.minimum(mass * _BINS, _BINS - 1).astype(np.int64), minlength=_BINS)

    def __add__(self, other: "KeptMass") -> "KeptMass":
        return KeptMass(self.total + other.total, self.counts + other.counts)

    @property
    def positions(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return self.total / self.positions

    @property
    def worst_tenth(self) -> float:
        """Mean over the tenth of the positions where it is smallest, to 1e-4."""
        tenth = max(self.positions / 10, 1.0)
        taken = np.diff(np.minimum(np.cumsum(self.counts), tenth), prepend=0.0)
        return float((taken * (np.arange(_BINS) + 0.5)).sum() / _BINS / tenth)

    def describe(self, k: int, support: str | None) -> "KeptMassFound | None":
        """Entries for results; None where nothing was kept."""
        if not self.positions:
            return None
        return {"k": k, "support": support, "mean": self.mean, "worst_tenth": self.worst_tenth}


class KeptMassFound(TypedDict):
    """The mass of the kept tokens, and which they are."""

    k: int
    support: NotRequired[str | None]  # earlier versions, which kept the top k, did not say it
    mean: float
    worst_tenth: float


def say_kept_mass(kept: KeptMassFound) -> str:
    """For people: `0.967 in the mean, 0.812 in the worst tenth of the positions`."""
    return f"{kept['mean']:.3f} in the mean, {kept['worst_tenth']:.3f} in the worst tenth of the positions"


def kept_mass_warning(kept: KeptMassFound | None) -> str | None:
    """What to say where much of the teacher is not kept, and no sample stands for it."""
    if kept is None or kept.get("support", "topk") != "topk" or 1 - kept["mean"] <= OUTSIDE_WARNING:
        return None
    return (
        f"the top {kept['k']} tokens per position have {kept['mean']:.0%} of the teacher's probability in the mean: "
        "no loss can teach the rest. generate.support=sampled keeps tokens that stand for all"
    )

"""What losses on the student's samples read beside the teacher's word: the policy gradient's numbers, and a reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pipeline.learning.posterior import RewardPosterior, load_posterior
from pipeline.learning.rewards import FILE, join_rewards, read_rewards, rewards_of, write_rewards
from pipeline.models import best_device
from pipeline.objectives.policy_gradient import mixture_weight, returns, reward, whitened
from pipeline.params import Distill
from pipeline.store.schema import Row
from stages.distill.inputs import permuted

Extra = Mapping[str, Mapping[str, np.ndarray]]  # name -> key -> values [T]


@dataclass(frozen=True)
class SampleExtras:
    """phi is run once over a round's samples, when they have been scored, and written beside them."""

    settings: Distill
    fitted: Path | None  # folder of the fitted posterior, where a reward is read
    student: Path  # the starting point, whose shape the posterior's encoder has
    seed: int

    @cached_property
    def posterior(self) -> RewardPosterior:
        return load_posterior(self.fitted, self.student).to(best_device()).eval()

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        """The reward of a round's rows, where one is learned from."""
        if self.fitted is not None:
            write_rewards(folder, rows, self.posterior)

    def rewards_of(self, rows: Sequence[Row]) -> Extra | None:
        """The reward of rows that are not kept."""
        return None if self.fitted is None else rewards_of(rows, self.posterior)

    def of(
        self, rows: Sequence[Row], old: Mapping[str, np.ndarray], counts: Mapping[str, int], rewards: Extra | None
    ) -> Extra:
        """Extras of a round's distinct rows.

        old: the student's log-probabilities [T]; counts: how often each was drawn; rewards: phi's; all by key.
        """
        extras: dict[str, Mapping[str, np.ndarray]] = {}
        if self.settings.objective in ("opd", "minillm"):
            extras |= {"old": old, "advantage": self._advantages(rows, old, counts)}
        if self.settings.objective == "minillm":
            alpha = self.settings.rounds.mixture
            extras["weight"] = {row.key: mixture_weight(*_both(row, old), alpha).numpy() for row in rows}
        if rewards is not None:
            if self.settings.reward == "shuffled":
                rewards = permuted(rewards, {row.key: len(row.response_ids) for row in rows}, self.seed, "a round")
            extras |= rewards
        return extras

    def read(
        self, folder: Path, rows: Sequence[Row], old: Mapping[str, np.ndarray], counts: Mapping[str, int]
    ) -> Extra:
        """`of` a round that was kept."""
        return self.of(rows, old, counts, None if self.fitted is None else read_rewards(folder))

    def join(self, out: Path, folders: Sequence[Path]) -> None:
        """Write the rewards of several rounds into one file."""
        if self.fitted is not None:
            join_rewards(out, [folder for folder in folders if (folder / FILE).is_file()])

    def _advantages(
        self, rows: Sequence[Row], old: Mapping[str, np.ndarray], counts: Mapping[str, int]
    ) -> dict[str, np.ndarray]:
        """Of each token, the return of log T - log S_old; MiniLLM's are whitened over the round's response tokens."""
        gamma, of = self.settings.gamma, self.settings.minillm
        if self.settings.objective == "opd":
            return {row.key: returns(reward(*_both(row, old)), gamma).numpy() for row in rows}
        rewards = (reward(*_both(row, old), of.scale, of.reward_clip) for row in rows)
        each = [returns(values, gamma, of.length) for values in rewards]
        repeats = torch.tensor([counts[row.key] for row, values in zip(rows, each, strict=True) for _ in values])
        whole = whitened(torch.cat(each).repeat_interleave(repeats))
        first = whole[repeats.cumsum(0) - repeats]  # one of each that was drawn several times
        return {row.key: part.numpy() for row, part in zip(rows, first.split(list(map(len, each))), strict=True)}


def _both(row: Row, old: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """log T and log S_old of a row's tokens, [T] each."""
    return torch.from_numpy(np.array(row.logprobs)), torch.from_numpy(np.array(old[row.key]))

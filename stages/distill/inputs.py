"""The reward as distillation reads it: fitted, trained further, new, or a control that knows nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.learning.consistency import GivenReward, JointReward, ScratchReward, ZeroReward
from pipeline.learning.posterior import RewardPosterior, load_posterior, read_description, require_same_residual
from pipeline.learning.residuals import Scaled
from pipeline.learning.rewards import read_rewards
from pipeline.models import load_lm
from pipeline.params import Distill, Reward
from pipeline.store.selection import Selection
from pipeline.store.training_rows import TeacherRows

FITTED = ("frozen", "shuffled", "joint")  # rewards that the stage `reward` fitted


@dataclass(frozen=True)
class RewardInputs:
    """What the X term needs: rewards by name and key where they come from a file, and the residuals' scale."""

    extras: dict[str, dict[str, np.ndarray]] | None = None
    residuals: Scaled | None = None  # the student's, in units of the teacher's; None without the X term
    phi_kl: float = 0.0

    @property
    def scale(self) -> float:
        return self.residuals.scale if self.residuals else 1.0

    def reward(self, settings: Distill, form: Reward, student: Path, fitted: Path | None) -> GivenReward:
        """The reward that the student is kept consistent with: read, trained with it (new or fitted), or zero."""
        if settings.reward == "zero":
            return ZeroReward()
        if settings.reward == "joint":
            return JointReward(load_posterior(fitted / settings.td, student).train(), self.phi_kl)
        if settings.reward == "scratch":
            posterior = RewardPosterior(load_lm(student), form.head, form.encoder, form.sigma_min).train()
            return ScratchReward(posterior, settings.kl_weight)
        return GivenReward()


def reward_inputs(
    settings: Distill, selection: Selection, rows: dict[str, TeacherRows], reward_path: Path | None, seed: int
) -> RewardInputs:
    """What the settings ask for. Raises UserError where the fitted reward is absent or of something else."""
    if settings.reward == "none":
        return RewardInputs()
    if settings.reward not in FITTED:
        # c is of the teacher's own samples, whatever is learned from, as it is in a fitted reward.
        spoken = selection.rows("train", topk=False) if "train" in selection.parts else rows["train"]
        return RewardInputs(None, Scaled.of(spoken, settings.td, settings.residual))
    if reward_path is None:
        raise UserError(f"distill.reward: {settings.reward} needs the folder of a fitted reward: pass --reward")
    folder = reward_path / settings.td
    description = read_description(folder)
    require_same_residual(settings.residual, description, folder)
    if description["teacher"] != selection.teacher["identity"]:
        raise UserError(
            f"the reward in {folder} explains teacher {description['teacher']}, the cache holds teacher "
            f"{selection.teacher['identity']}: run `xkd-pipeline reward` again"
        )
    scaled = Scaled(settings.td, settings.residual, description["c"], description["offset"])
    if settings.reward == "joint":
        return RewardInputs(None, scaled, description["phi_kl"])
    extras = _rewards_of(folder, rows)
    if settings.reward == "shuffled":
        extras = shuffled(extras, rows, seed)
    return RewardInputs(extras, scaled)


def _rewards_of(folder: Path, rows: dict[str, TeacherRows]) -> dict[str, dict[str, np.ndarray]]:
    """mu and log sigma by key. Raises UserError where a row has none."""
    extras = read_rewards(folder)
    unknown = [
        key
        for part in rows.values()
        for key, steps in zip(part.keys, part.response_tokens, strict=True)
        if len(extras["mu"].get(key, ())) != steps
    ]
    if unknown:
        raise UserError(
            f"{folder} has no reward for {len(unknown)} of the cached responses (first: {unknown[0]}): it was fitted "
            "on another selection; run `xkd-pipeline reward` again"
        )
    return extras


def shuffled(
    rewards: dict[str, dict[str, np.ndarray]], rows: dict[str, TeacherRows], seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Rewards `permuted` among the samples of each part."""
    parts = [
        permuted(rewards, dict(zip(samples.keys, samples.response_tokens, strict=True)), seed, part)
        for part, samples in rows.items()
    ]
    return {name: {key: values for part in parts for key, values in part[name].items()} for name in rewards}


def permuted(
    rewards: Mapping[str, Mapping[str, np.ndarray]], lengths: Mapping[str, int], seed: int, what: str
) -> dict[str, dict[str, np.ndarray]]:
    """Rewards permuted among samples: each gets another one's, from its first token on.

    lengths: tokens of each sample, by key. A shorter sequence of rewards is repeated, a longer one cut. Raises
    UserError where there is no other sample; `what` holds them.
    """
    keys = list(lengths)
    if len(keys) < 2:
        raise UserError(f"distill.reward: shuffled needs two samples or more, and {what} holds {len(keys)}")
    order = np.random.default_rng(seed).permutation(len(keys))
    pairs = [(keys[own], keys[other]) for own, other in zip(order, np.roll(order, 1), strict=True)]
    return {
        name: {own: np.resize(by_key[other], lengths[own]) for own, other in pairs} for name, by_key in rewards.items()
    }

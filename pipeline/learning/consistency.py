"""The X term: a student's residuals under a reward, and where the reward's mu and sigma come from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.learning.batches import IGNORED
from pipeline.learning.forward import States
from pipeline.learning.posterior import RewardPosterior
from pipeline.learning.terms import Mean, Steps, Term
from pipeline.objectives.avril import CLIP, gaussian_nll, kl_to_prior


class GivenReward(nn.Module):
    """mu and log sigma that come with the batch."""

    means: Mapping[str, Mean] = {}

    def forward(self, batch: dict[str, Tensor], states: States) -> tuple[Tensor, Tensor]:
        """mu, log_sigma [N] of the response tokens."""
        mask = batch["labels"] != IGNORED
        return batch["mu"][mask], batch["log_sigma"][mask]

    def seen(self, mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the student is kept consistent with."""
        return mu, log_sigma

    def at(self, delta: Tensor, mu: Tensor, log_sigma: Tensor) -> dict[str, Tensor]:
        """What the reward itself is trained with: each of its `means`, [n]."""
        return {}


class ZeroReward(GivenReward):
    """The control that knows nothing: mu = 0, sigma = 1."""

    def forward(self, batch: dict[str, Tensor], states: States) -> tuple[Tensor, Tensor]:
        return tuple(torch.zeros(2, len(states.rows), device=states.hidden.device))


class ScratchReward(GivenReward):
    """A posterior that is trained with the student: by the student's own loss, and by kl_weight KL(q || prior)."""

    def __init__(self, posterior: RewardPosterior, kl_weight: float):
        super().__init__()
        self.posterior, self.means = posterior, {"reward_kl": Mean(kl_weight, "steps")}

    def forward(self, batch: dict[str, Tensor], states: States) -> tuple[Tensor, Tensor]:
        if self.posterior.own_encoder:
            return self.posterior.head(self._read(states), batch["labels"][batch["labels"] != IGNORED])
        return self.posterior(batch)

    def _read(self, states: States) -> States:
        return states

    def at(self, delta: Tensor, mu: Tensor, log_sigma: Tensor) -> dict[str, Tensor]:
        return {"reward_kl": kl_to_prior(mu, log_sigma)}


class JointReward(ScratchReward):
    """The student sees the posterior detached; the posterior minimises its own -log q(delta) + phi_kl KL(q || prior).

    delta is the student's, detached and clipped (objective.md, section 5).
    """

    def __init__(self, posterior: RewardPosterior, phi_kl: float):
        super().__init__(posterior, phi_kl)
        self.means = {"reward_nll": Mean(1.0, "steps", True), "reward_kl": Mean(phi_kl, "steps", True)}

    def _read(self, states: States) -> States:
        return states.detach()

    def seen(self, mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        return mu.detach(), log_sigma.detach()

    def at(self, delta: Tensor, mu: Tensor, log_sigma: Tensor) -> dict[str, Tensor]:
        nll = gaussian_nll(delta.detach().clamp(-CLIP, CLIP), mu, log_sigma)
        return {"reward_nll": nll} | super().at(delta, mu, log_sigma)


class Consistency(Term):
    """The X term: lam mean[-log N(delta / c; mu, sigma^2)], the student's residuals under a reward."""

    method = "x"

    def __init__(self, reward: GivenReward, lam: float):
        super().__init__()
        self.reward = reward
        self.means = {"td_nll": Mean(lam, "steps"), "precision": Mean(0.0, "steps"), **reward.means}

    def inputs(self, batch: dict[str, Tensor], states: States) -> tuple[Tensor, Tensor]:
        return self.reward(batch, states)

    def at(self, steps: Steps, *inputs: Tensor) -> dict[str, Tensor]:
        mu, log_sigma = inputs
        values = {
            "td_nll": gaussian_nll(steps.delta, *self.reward.seen(mu, log_sigma)),
            "precision": torch.exp(-2 * log_sigma.detach()),
            **self.reward.at(steps.delta, mu, log_sigma),
        }
        return {name: torch.where(steps.kept, value, 0) for name, value in values.items()}

"""The reward posterior q_phi(R | s_t, a_t) = N(mu_t, sigma_t^2): a small language model with an action head."""

import json
import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models import load_lm
from pipeline.params import Residual
from stages.batches import IGNORED, response_states, scatter_steps
from stages.objectives.outcomes import at_least_float32
from stages.objectives.token_scores import in_chunks
from stages.students import head_scale

CHUNK = 4096  # response positions that go through the action head at once


class ActionHead(nn.Module):
    """mu and log sigma of the action taken in a state (AVRIL's state-action encoder, for a vocabulary of actions).

    mu = w * log softmax(head(h))[a] + MLP(h); log sigma = MLP(h), not below log sigma_min.
    """

    def __init__(self, width: int, vocab_size: int, sigma_min: float):
        super().__init__()
        self.actions = nn.Linear(width, vocab_size, bias=False)
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.state = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        nn.init.normal_(self.actions.weight, std=width**-0.5)
        self.floor = math.log(sigma_min)

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """States [N, H], actions [N] -> mu, log_sigma, float32 [N] each."""
        logits = at_least_float32(self.actions(states))
        logprob = logits.gather(-1, actions[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)
        shift, log_sigma = at_least_float32(self.state(states)).unbind(-1)
        return self.weight * logprob + shift, log_sigma.clamp_min(self.floor)


class RewardPosterior(nn.Module):
    """A separate encoder and an ActionHead."""

    def __init__(self, encoder, sigma_min: float):
        """encoder: a language model, the student's starting point; its backbone is used."""
        super().__init__()
        self.encoder = encoder.base_model
        config = encoder.config.get_text_config()
        self.head = ActionHead(config.hidden_size, config.vocab_size, sigma_min)

    @classmethod
    def from_student(cls, folder: Path, sigma_min: float) -> "RewardPosterior":
        """Encoder and action head start as the student's: an encoder that knows nothing of the task learns nothing."""
        student = load_lm(folder).train()
        posterior = cls(student, sigma_min)
        with torch.no_grad():
            posterior.head.actions.weight.copy_(student.get_output_embeddings().weight * head_scale(student))
        return posterior

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """mu, log_sigma [B, R] of a batch of `stages.batches.collate`; zero at padding."""
        mask = batch["labels"] != IGNORED
        states = response_states(self.encoder, batch)
        mu, log_sigma = in_chunks(self.head, CHUNK, states, batch["labels"][mask])
        return scatter_steps(mu, mask), scatter_steps(log_sigma, mask)


def save_posterior(folder: Path, posterior: RewardPosterior, description: dict) -> None:
    """Weights as safetensors, `description` (residual, c, fit) as reward.json."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_model(posterior, str(folder / "reward.safetensors"))
    (folder / "reward.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def load_posterior(folder: Path, student: Path, sigma_min: float) -> RewardPosterior:
    """The posterior in `folder`; `student` gives the encoder's shape."""
    posterior = RewardPosterior(load_lm(student), sigma_min)
    safetensors.torch.load_model(posterior, str(folder / "reward.safetensors"))
    return posterior


def read_description(folder: Path) -> dict:
    """reward.json. Raises UserError where there is none."""
    path = folder / "reward.json"
    if not path.is_file():
        raise UserError(f"no fitted reward at {folder}: run `xkd-pipeline reward` (or `dvc repro reward`) first")
    return json.loads(path.read_text(encoding="utf-8"))


def require_same_residual(wanted: Residual, description: dict, folder: Path) -> None:
    """Raises UserError where a student would be trained on other residuals than the reward was fitted to."""
    fitted = Residual(**description["residual"])
    differing = [
        f"{name} is {getattr(fitted, name)} in the reward and {getattr(wanted, name)} in distill.residual"
        for name in Residual.model_fields
        if getattr(fitted, name) != getattr(wanted, name)
    ]
    if differing:
        raise UserError(f"the reward in {folder} was fitted to other residuals: {'; '.join(differing)}")

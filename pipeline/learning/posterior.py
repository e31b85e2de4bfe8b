"""The reward posterior q_phi(R | s_t, a_t) = N(mu_t, sigma_t^2): the states of a language model and a small head."""

import json
import math
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import TypedDict

from pipeline.errors import UserError, in_one_line
from pipeline.files import read_json, require_file, require_shape
from pipeline.learning.batches import IGNORED
from pipeline.learning.dropout import set_dropout
from pipeline.learning.forward import States, head_scale, response_states
from pipeline.models import load_lm
from pipeline.objectives.head import chunk_rows
from pipeline.objectives.logprobs import at_least_float32
from pipeline.params import Residual


class ActionHead(nn.Module):
    """mu and log sigma of the action taken in a state (AVRIL's state-action encoder, for a vocabulary of actions).

    mu = w * log softmax(head(h))[a] + MLP(h); log sigma = MLP(h), not below log sigma_min; h has not seen the action.
    """

    def __init__(self, width: int, vocab_size: int, sigma_min: float):
        super().__init__()
        self.actions = nn.Linear(width, vocab_size, bias=False)
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.state = _mlp(width)
        nn.init.normal_(self.actions.weight, std=width**-0.5)
        self.floor = math.log(sigma_min)

    def forward(self, states: States, actions: Tensor) -> tuple[Tensor, Tensor]:
        """N steps and their actions [N] -> mu, log_sigma, float32 [N] each."""
        before = states.before
        shift, log_sigma = at_least_float32(self.state(before)).unbind(-1)
        return self.weight * self._logprob(before, actions) + shift, log_sigma.clamp_min(self.floor)

    def _logprob(self, before: Tensor, actions: Tensor) -> Tensor:
        """log softmax(head(h))[a], [N]; the vocabulary's logits exist for one chunk of positions at a time."""

        def some(before: Tensor, actions: Tensor) -> Tensor:
            logits = at_least_float32(self.actions(before))
            return -nn.functional.cross_entropy(logits, actions, reduction="none")

        rows = chunk_rows(self.actions.out_features)
        if len(before) <= rows:
            return some(before, actions)
        pairs = zip(before.split(rows), actions.split(rows), strict=True)
        return torch.cat([checkpoint(some, *pair, use_reentrant=False) for pair in pairs])

    def start_from(self, student) -> None:
        """The action head becomes the student's language-model head: its policy is where the reward starts."""
        with torch.no_grad():
            self.actions.weight.copy_(student.get_output_embeddings().weight * head_scale(student))


class StateHead(nn.Module):
    """mu and log sigma from the state that has consumed the action (AVA's two numbers, arXiv 2411.09341)."""

    def __init__(self, width: int, vocab_size: int, sigma_min: float):
        super().__init__()
        self.state = _mlp(width)
        self.floor = math.log(sigma_min)

    def forward(self, states: States, actions: Tensor) -> tuple[Tensor, Tensor]:
        """N steps and their actions [N] -> mu, log_sigma, float32 [N] each."""
        mu, log_sigma = at_least_float32(self.state(states.after)).unbind(-1)
        return mu, log_sigma.clamp_min(self.floor)

    def start_from(self, student) -> None:
        """Nothing of the student fits here."""


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))


HEADS = {"action": ActionHead, "state": StateHead}


class RewardPosterior(nn.Module):
    """An encoder and a head.

    The encoder is a backbone of its own (`separate`), trained with the head, or the student's (`own`), which the
    reward only reads; a learner that also trains the student gives the head its current states.
    """

    def __init__(self, model, head: str, encoder: str, sigma_min: float):
        """model: a language model, the student's starting point; its backbone becomes the encoder."""
        super().__init__()
        set_dropout(model, 0.0)
        self.own_encoder = encoder == "own"
        self.encoder = model.base_model.requires_grad_(not self.own_encoder)
        config = model.config.get_text_config()
        self.head = HEADS[head](config.hidden_size, config.vocab_size, sigma_min)

    @classmethod
    def from_student(cls, folder: Path, head: str, encoder: str, sigma_min: float) -> "RewardPosterior":
        """Encoder and action head start as the student's: an encoder that knows nothing of the task learns nothing."""
        student = load_lm(folder).train()
        posterior = cls(student, head, encoder, sigma_min)
        posterior.head.start_from(student)
        return posterior

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """mu, log_sigma, flat [N], of the response steps of a batch of `pipeline.learning.batches.collate`."""
        labels = batch["labels"][batch["labels"] != IGNORED]
        return self.head(response_states(self.encoder, batch), labels)


class Description(TypedDict):
    """What of reward.json is read."""

    residual: Residual
    teacher: str
    c: float
    offset: float
    phi_kl: float
    head: Literal["action", "state"]
    encoder: Literal["separate", "own"]
    sigma_min: float


def save_posterior(folder: Path, posterior: RewardPosterior, description: dict) -> None:
    """Weights as safetensors, `description` (head, encoder, residual, c, fit) as reward.json."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_model(posterior, str(folder / "reward.safetensors"))
    (folder / "reward.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def load_posterior(folder: Path, student: Path) -> RewardPosterior:
    """The posterior in `folder`; `student` gives the encoder's shape."""
    description = read_description(folder)
    form = (description[name] for name in ("head", "encoder", "sigma_min"))
    posterior, weights = RewardPosterior(load_lm(student), *form), folder / "reward.safetensors"
    with in_one_line(f"{weights} does not hold this reward", "Run `xkd-pipeline reward` again"):
        require_file(weights)
        safetensors.torch.load_model(posterior, str(weights))
    return posterior


def read_description(folder: Path) -> dict:
    """reward.json. Raises UserError where there is none, or not the one that was written."""
    path = folder / "reward.json"
    if not path.is_file():
        raise UserError(f"no fitted reward at {folder}: run `xkd-pipeline reward` (or `dvc repro reward`) first")
    description = read_json(path)
    require_shape(description, Description, f"{path} does not describe a reward, run `xkd-pipeline reward` again")
    return description


def require_same_residual(residual: Residual, description: dict, folder: Path) -> None:
    """Raises UserError where a student would be trained on other residuals than the reward was fitted to."""
    fitted = Residual(**description["residual"])
    differing = [
        f"{name} is {getattr(fitted, name)} in the reward and {getattr(residual, name)} in distill.residual"
        for name in Residual.model_fields
        if getattr(fitted, name) != getattr(residual, name)
    ]
    if differing:
        raise UserError(f"the reward in {folder} was fitted to other residuals: {'; '.join(differing)}")

"""The learner that every student is trained with: a distillation loss, likelihood, and the X term, by configuration."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from stages.batches import IGNORED, decoder_states, response_states, scatter_steps
from stages.objectives.avril import action_values, gaussian_nll, kl_to_prior, soft_state_values, td_residual
from stages.objectives.token_scores import TokenScores, TopK, chunked_token_scores, sparse_divergence
from stages.training import Learner, Term


def output_head(model) -> Callable[[Tensor], Tensor]:
    """Last states -> logits; the scale is applied only where there is one, since this runs at every training step."""
    head, scale = model.get_output_embeddings(), head_scale(model)
    return head if scale == 1.0 else lambda states: head(states * scale)


def head_scale(model) -> float:
    """Factor of a model's last states before its head: d_model^-1/2 for T5 with tied embeddings, else 1."""
    return model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else 1.0


def score_tokens(model, batch: dict[str, Tensor], divergence=None, chunk: int = 4096) -> TokenScores:
    """Per-token scores of a language model at the response positions, flat [N] each.

    The backbone runs on the whole sequence, the head on response positions only.
    """
    mask = batch["labels"] != IGNORED
    states = response_states(model.base_model, batch)
    teacher = TopK(batch["topk_ids"][mask], batch["topk_logprobs"][mask]) if "topk_ids" in batch else None
    return chunked_token_scores(output_head(model), states, batch["labels"][mask], teacher, divergence, chunk)


@torch.no_grad()
def require_plain_head(model, what: str) -> None:
    """Raises UserError where a model's logits are not its head on its last states (scaled, capped, biased later).

    The losses run the head themselves, on response positions alone; such a model would be trained on other logits.
    """
    ids = torch.arange(min(4, model.config.get_text_config().vocab_size), device=model.device)[None]
    was_training = model.training
    model.eval()
    if model.config.is_encoder_decoder:
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
        states = decoder_states(model, ids, torch.ones_like(ids), ids)
    else:
        logits = model(input_ids=ids).logits
        states = model.base_model(input_ids=ids).last_hidden_state
    head = output_head(model)(states)
    model.train(was_training)
    if not torch.allclose(logits.float(), head.float(), rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{what} ({type(model).__name__}) changes its logits after its language-model head (scaling or capping, "
            "as Gemma 2, Cohere and Granite do); such models cannot be trained here yet, but can be teachers"
        )


class StudentLearner(Learner):
    """L = L_KD + nll_weight NLL + lam mean[-log N(delta / c; mu, sigma^2)] + kl_weight mean[KL(q || prior)].

    objective: a divergence's name, or None for a loss on the tokens alone (`sft`, `seqkd`).
    The X term is present where `td` is given; `reward` is then `frozen` (mu and log_sigma come with the batch), `zero`
    (mu = 0, sigma = 1) or `scratch` (`posterior` is trained along by the same loss).
    """

    def __init__(
        self,
        student,
        objective: str | None = None,
        beta: float = 0.5,
        tail: str = "bucket",
        nll_weight: float = 1.0,
        td: str | None = None,
        reward: str = "zero",
        posterior: nn.Module | None = None,
        lam: float = 0.0,
        kl_weight: float = 0.0,
        q_source: str = "logits",
        gamma: float = 1.0,
        terminal: str = "drop",
        scale: float = 1.0,
        offset: float = 0.0,
        chunk: int = 4096,
    ):
        super().__init__()
        self.student, self.posterior = student, posterior
        self.divergence = sparse_divergence(objective, beta, tail) if objective else None
        self.td, self.reward = td, reward
        self.q_source, self.gamma, self.terminal = q_source, gamma, terminal
        self.scale, self.offset, self.chunk = scale, offset, chunk
        self.terms = {"nll": Term(nll_weight, "tokens")}
        if objective:
            self.terms["kd"] = Term(1.0, "tokens")
        if td:
            self.terms |= {"td_nll": Term(lam, "steps"), "precision": Term(0.0, "steps")}
            if reward == "scratch":
                self.terms["reward_kl"] = Term(kl_weight, "steps")

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Sums of all terms over the batch."""
        scores = score_tokens(self.student, batch, self.divergence, self.chunk)
        sums = {"nll": -scores.logprob.sum()}
        if self.divergence:
            sums["kd"] = scores.divergence.sum()
        return sums | (self._consistency(scores, batch) if self.td else {})

    def _consistency(self, scores: TokenScores, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["labels"] != IGNORED
        logprob, lse = scatter_steps(scores.logprob, mask), scatter_steps(scores.lse, mask)
        q, v = action_values(logprob, lse, self.q_source), soft_state_values(lse, self.q_source)
        delta, kept = td_residual(q, v, mask, batch["stop"], self.gamma, self.td, self.terminal)
        mu, log_sigma = self._reward(batch, delta)
        residual = (delta - self.offset) / self.scale
        sums = {
            "td_nll": gaussian_nll(residual, mu, log_sigma)[kept].sum(),
            "precision": torch.exp(-2 * log_sigma)[kept].sum(),
        }
        return sums | ({"reward_kl": kl_to_prior(mu, log_sigma)[kept].sum()} if self.reward == "scratch" else {})

    def _reward(self, batch: dict[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        if self.reward == "frozen":
            return batch["mu"], batch["log_sigma"]
        if self.reward == "scratch":
            return self.posterior(batch)
        return torch.zeros_like(like), torch.zeros_like(like)

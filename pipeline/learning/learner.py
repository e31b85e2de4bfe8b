"""The learner that every student is trained with: a distillation loss, likelihood, and the X term, by configuration."""

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.learning.batches import IGNORED, States, decoder_states, head_scale, response_states
from pipeline.learning.trainer import Learner, Term
from pipeline.objectives.avril import (
    CLIP,
    action_values,
    followed_steps,
    gaussian_nll,
    kept_steps,
    kl_to_prior,
    soft_state_values,
    td_residual,
)
from pipeline.objectives.head import Divergence, Head, Scores, chunked_loss, token_scores
from pipeline.objectives.logprobs import TopK


def head_of(model, states: States) -> tuple[Head, Tensor]:
    """A model's output head and the states [N, H] it is applied to."""
    head, scale = model.get_output_embeddings(), head_scale(model)
    return Head(head.weight, head.bias), states.before if scale == 1.0 else states.before * scale


def teacher_of(batch: dict[str, Tensor]) -> TopK | None:
    """The sparse teacher at the response steps of a batch, where it has one."""
    if "topk_ids" not in batch:
        return None
    mask, names = batch["labels"] != IGNORED, ("topk_ids", "topk_logprobs", "tau", "tail", "own")
    return TopK(*(batch[name][mask] if name in batch else None for name in names))


def score_tokens(model, batch: dict[str, Tensor], divergence: Divergence | None = None, chunk: int = 0) -> Scores:
    """Per-token scores of a language model at the response steps, flat [N] each, without gradients.

    The backbone runs on the whole sequence, the head on response positions only.
    """
    with torch.no_grad():
        head, states = head_of(model, response_states(model.base_model, batch))
        labels = batch["labels"][batch["labels"] != IGNORED]
        return token_scores(head, states, labels, teacher_of(batch), divergence, chunk)


@torch.no_grad()
def has_plain_head(model, what: str) -> bool:
    """Whether a model's logits are its head on its last states, and not scaled, capped or biased later.

    Raises UserError, with `what` the model is, where they are no numbers.
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
    found = model.get_output_embeddings()(states * head_scale(model))
    model.train(was_training)
    if not logits.isfinite().any(-1).all():
        raise UserError(f"{what} ({type(model).__name__}) has logits that are no numbers: its weights are broken")
    return torch.allclose(logits.float(), found.float(), rtol=1e-3, atol=1e-3)


def require_plain_head(model, what: str) -> None:
    """Raises UserError where a model has no plain head.

    The losses run the head themselves, on response positions alone; such a model would be trained on other logits.
    """
    if not has_plain_head(model, what):
        raise UserError(
            f"{what} ({type(model).__name__}) changes its logits after its language-model head (scaling or capping, "
            "as Gemma 2, Cohere and Granite do); such models cannot be trained here yet, but can be teachers"
        )


class StudentLearner(Learner):
    """L = L_KD + nll_weight NLL + lam mean[-log N(delta / c; mu, sigma^2)] + kl_weight mean[KL(q || prior)].

    divergence: of the sparse teacher and the student, or None for a loss on the tokens alone (`sft`, `seqkd`).
    The X term is present where `td` is given. `reward` then says where mu and sigma come from:
    `given` (they come with the batch), `zero` (mu = 0, sigma = 1), `scratch` (`posterior` is trained along by this one
    loss), or `joint`: the student sees the posterior detached, and the posterior minimises its own
    -log q(delta) + phi_kl KL with the student's delta detached and clipped.
    """

    def __init__(
        self,
        student,
        divergence: Divergence | None = None,
        nll_weight: float = 1.0,
        td: str | None = None,
        reward: str = "zero",
        posterior: nn.Module | None = None,
        lam: float = 0.0,
        kl_weight: float = 0.0,
        phi_kl: float = 0.0,
        q_source: str = "logits",
        gamma: float = 1.0,
        terminal: str = "drop",
        scale: float = 1.0,
        offset: float = 0.0,
        chunk: int = 0,
    ):
        super().__init__()
        self.student, self.posterior = student, posterior
        self.divergence = divergence
        self.td, self.reward = td, reward
        self.q_source, self.gamma, self.terminal = q_source, gamma, terminal
        self.scale, self.offset, self.chunk = scale, offset, chunk
        self.terms = {"nll": Term(nll_weight, "tokens")}
        if divergence is not None:
            self.terms["kd"] = Term(1.0, "tokens")
        if td:
            self.terms |= {"td_nll": Term(lam, "steps"), "precision": Term(0.0, "steps")}
        if td and reward == "scratch":
            self.terms["reward_kl"] = Term(kl_weight, "steps")
        if td and reward == "joint":
            self.terms |= {
                "reward_nll": Term(1.0, "steps", apart=True),
                "reward_kl": Term(phi_kl, "steps", apart=True),
            }

    def forward(self, counts: Tensor, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch["labels"] != IGNORED
        labels = batch["labels"][mask]
        states = response_states(self.student.base_model, batch)
        mu, log_sigma = self._reward(batch, states, labels) if self.td else (None, None)
        followed, kept = followed_steps(mask)[mask], kept_steps(mask, batch["stop"], self.terminal)[mask]

        def terms(scores: Scores, rows: slice, *posterior: Tensor) -> dict[str, Tensor]:
            values = {"nll": -scores.logprob}
            if scores.divergence is not None:
                values["kd"] = scores.divergence
            return values | (self._consistency(scores, followed[rows], kept[rows], *posterior) if self.td else {})

        head, before = head_of(self.student, states)
        loss, sums = chunked_loss(
            head, before, labels, terms, self.term_weights(counts), teacher_of(batch), self.divergence,
            () if mu is None else (mu, log_sigma), self.chunk, neighbours=self.td is not None,
        )  # fmt: skip
        return loss, sums

    def _consistency(
        self, scores: Scores, followed: Tensor, kept: Tensor, mu: Tensor, log_sigma: Tensor
    ) -> dict[str, Tensor]:
        """The terms of steps that have a residual, [n] each, zero at the others."""
        q = action_values(scores.logprob, scores.lse, self.q_source)
        v = soft_state_values(scores.lse, self.q_source)
        delta = (td_residual(q, v, followed, kept, self.gamma, self.td) - self.offset) / self.scale
        joint = self.reward == "joint"
        seen = (mu.detach(), log_sigma.detach()) if joint else (mu, log_sigma)
        values = {"td_nll": gaussian_nll(delta, *seen), "precision": torch.exp(-2 * log_sigma.detach())}
        if self.reward in ("scratch", "joint"):
            values["reward_kl"] = kl_to_prior(mu, log_sigma)
        if joint:
            values["reward_nll"] = gaussian_nll(delta.detach().clamp(-CLIP, CLIP), mu, log_sigma)
        return {name: torch.where(kept, value, 0) for name, value in values.items()}

    def _reward(self, batch: dict[str, Tensor], states: States, labels: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma [N] of the tokens."""
        mask = batch["labels"] != IGNORED
        if self.reward == "given":
            return batch["mu"][mask], batch["log_sigma"][mask]
        if self.reward == "zero":
            return tuple(torch.zeros(2, len(labels), device=labels.device))
        if self.posterior.own_encoder:
            return self.posterior.head(states.detach() if self.reward == "joint" else states, labels)
        return self.posterior(batch)

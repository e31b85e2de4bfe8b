"""Fitting a reward posterior: the candidates of phi_kl, early stopping, and what is known of the one that is kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import EarlyStoppingCallback

from pipeline.learning.batches import IGNORED, Response
from pipeline.learning.checkpoints import once
from pipeline.learning.curves import split_history
from pipeline.learning.dropout import set_dropout
from pipeline.learning.learner import StudentLearner, score_tokens
from pipeline.learning.posterior import RewardPosterior
from pipeline.learning.residuals import Scaled
from pipeline.learning.rows import from_rows, per_response
from pipeline.learning.trainer import Learner, Term, seed_everything, train
from pipeline.models import best_device, load_lm
from pipeline.objectives.avril import gaussian_nll, kept_steps, kl_to_prior
from pipeline.params import Reward
from pipeline.store.schema import Row
from stages.reward.audit import calibration

POSTERIORS = ("sarsa", "soft")


class RewardLearner(Learner):
    """-log q(delta) + phi_kl KL(q || prior) on the teacher's residuals, which come with the batch as `delta`."""

    def __init__(self, posterior: RewardPosterior, phi_kl: float, terminal: str):
        super().__init__()
        self.posterior, self.terminal = posterior, terminal
        self.terms = {"reward_nll": Term(1.0, "steps"), "reward_kl": Term(phi_kl, "steps")}

    def forward(self, counts: Tensor, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch["labels"] != IGNORED
        mu, log_sigma = self.posterior(batch)
        kept = kept_steps(mask, batch["stop"], self.terminal)[mask]
        nll = gaussian_nll(batch["delta"][mask], mu, log_sigma)
        sums = {"reward_nll": nll[kept].sum(), "reward_kl": kl_to_prior(mu, log_sigma)[kept].sum()}
        loss = sum(weight * sums[name] for name, weight in self.term_weights(counts).items())
        return loss, {name: value.detach() for name, value in sums.items()}


@dataclass(frozen=True)
class Fitted:
    """A posterior, what is known of its fit, and the held-out curve of its training."""

    posterior: RewardPosterior
    metrics: dict
    description: dict
    curve: list[dict]


@dataclass(frozen=True)
class Fitting:
    """What every fit of one stage shares."""

    settings: Reward
    seed: int
    student: Path
    train: Sequence[Row]
    validation: Sequence[Row]
    run: Path  # folder of the checkpoints

    def fit(self, td: str, negatives: Sequence[Row] = ()) -> Fitted:
        """The fit with the best held-out likelihood among the candidates of phi_kl.

        negatives: further responses that the teacher has scored; the scale c stays that of its own.
        """
        settings = self.settings
        scaled = Scaled.of(self.train, td, getattr(settings, td))
        rows = [*self.train, *negatives]
        known = {"delta": scaled.clipped([*rows, *self.validation])} if settings.fit == "teacher" else None
        responses = from_rows(rows, False, known), from_rows(self.validation, False, known)
        best: tuple[float, float, Learner, list[dict]] | None = None
        for number, phi_kl in enumerate(settings.phi_kl):
            seed_everything(self.seed)
            learner = self._learner(phi_kl, scaled)
            run = self.run / f"{td}-{len(negatives)}-{number}"
            what = f"{td} reward{' with negatives' if negatives else ''}, phi_kl {phi_kl:g}"
            history = once(run, learner, lambda: self._train(what, learner, *responses, run))  # noqa: B023
            nll = min(entry["eval_reward_nll"] for entry in history if "eval_reward_nll" in entry)
            if best is None or nll < best[0]:
                best = nll, phi_kl, learner.to(best_device()).eval(), history
        nll, phi_kl, learner, history = best
        policy, posterior = getattr(learner, "student", None), learner.posterior
        if policy is not None and posterior.own_encoder:
            posterior.encoder = policy.base_model  # the states that the head was trained on
        known = {"phi_kl": phi_kl, "heldout_nll": nll, "c": scaled.scale, "offset": scaled.offset}
        description = {"td": td, "residual": scaled.residual.model_dump(), **known, "negatives": len(negatives)}
        description |= {name: getattr(settings, name) for name in ("fit", "head", "encoder", "sigma_min")}
        rows = self.validation if policy is None else _spoken_by(policy, self.validation)
        values = {row.key: tuple(found) for row, found in per_response(rows, posterior, posterior.device)}
        calibrated = calibration(values, scaled.clipped(rows), posterior.head.floor, scaled.kept(rows))
        return Fitted(posterior, known | calibrated, description, split_history(history)[1])

    def _learner(self, phi_kl: float, scaled: Scaled) -> Learner:
        settings, residual = self.settings, scaled.residual
        posterior = RewardPosterior.from_student(self.student, settings.head, settings.encoder, settings.sigma_min)
        if settings.fit == "teacher":
            return RewardLearner(posterior, phi_kl, residual.terminal)
        policy = load_lm(self.student).train()
        set_dropout(policy, 0.0)
        return StudentLearner(
            policy, td=scaled.td, reward="joint", posterior=posterior, lam=settings.lam,
            phi_kl=phi_kl, scale=scaled.scale, offset=scaled.offset, **residual.model_dump(),
        )  # fmt: skip

    def _train(
        self, what: str, learner: Learner, train_on: Sequence[Response], held_out: Sequence[Response], run: Path
    ) -> list[dict]:
        every = self.settings.evaluate_every
        return train(
            what, learner, train_on, held_out, self.settings.optimisation, run, self.seed, log_every=every,
            evaluate_every=every, save_every=every, best="reward_nll",
            callbacks=[EarlyStoppingCallback(self.settings.patience)],
        )  # fmt: skip


def _spoken_by(policy, rows: Sequence[Row]) -> list[Row]:
    """The rows with the policy's log-probabilities and normalisers in place of the teacher's."""

    def scores(batch: dict[str, Tensor]) -> list[Tensor]:
        found = score_tokens(policy, batch)
        return [found.logprob, found.lse]

    return [
        replace(row, logprobs=logprob, lse=lse) for row, (logprob, lse) in per_response(rows, scores, policy.device)
    ]

"""Fitting a reward posterior: the candidates of phi_kl, early stopping, and what is known of the one that is kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline import console
from pipeline.errors import UserError
from pipeline.learning.batches import IGNORED, collate
from pipeline.learning.checkpoints import once
from pipeline.learning.consistency import Consistency, JointReward
from pipeline.learning.curves import split_history
from pipeline.learning.dropout import set_dropout
from pipeline.learning.forward import per_row, score_tokens
from pipeline.learning.job import Job, Training
from pipeline.learning.launch import launch
from pipeline.learning.learner import Learner, StudentLearner
from pipeline.learning.posterior import RewardPosterior
from pipeline.learning.residuals import Scaled
from pipeline.learning.terms import Likelihood, Mean
from pipeline.learning.trainer import seed_everything
from pipeline.models import (
    Context,
    best_device,
    load_config,
    load_lm,
    load_tokenizer,
    require_context,
    require_same_tokenizer,
)
from pipeline.objectives.avril import gaussian_nll, kept_steps, kl_to_prior
from pipeline.params import Reward, Train
from pipeline.provenance import fingerprint
from pipeline.store.schema import Row
from pipeline.store.selection import Selection

POSTERIORS = ("sarsa", "soft")


class RewardLearner(Learner):
    """-log q(delta) + phi_kl KL(q || prior) on the teacher's residuals, which come with the batch as `delta`."""

    def __init__(self, posterior: RewardPosterior, phi_kl: float, terminal: str):
        super().__init__()
        self.posterior, self.terminal = posterior, terminal
        self.means = {"reward_nll": Mean(1.0, "steps"), "reward_kl": Mean(phi_kl, "steps")}

    def forward(self, counts: Tensor, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch["labels"] != IGNORED
        mu, log_sigma = self.posterior(batch)
        kept = kept_steps(mask, batch["stop"], self.terminal)[mask]
        nll = gaussian_nll(batch["delta"][mask], mu, log_sigma)
        sums = {"reward_nll": nll[kept].sum(), "reward_kl": kl_to_prior(mu, log_sigma)[kept].sum()}
        loss = sum(weight * sums[name] for name, weight in self.weights(counts).items())
        return loss, {name: value.detach() for name, value in sums.items()}


@dataclass(frozen=True)
class Fitted:
    """A posterior, what is known of its fit, and the held-out curve of its training."""

    posterior: RewardPosterior
    metrics: dict
    description: dict
    curve: list[dict]


@dataclass(frozen=True)
class Sources:
    """Paths of what rewards are fitted on."""

    selection: Path
    student: Path
    scored: Path | None = None
    store: str | Path | None = None


@dataclass(frozen=True)
class Fitting:
    """What every fit of one stage shares."""

    settings: Reward
    seed: int
    sources: Sources
    train: Sequence[Row]
    validation: Sequence[Row]
    negatives: Sequence[Row]  # further responses that the teacher has scored
    run: Path  # folder of the checkpoints
    how: Train

    def fit(self, td: str, negatives: bool = False) -> Fitted:
        """The fit with the best held-out likelihood among the candidates of phi_kl.

        negatives: learn from them too; the scale c stays that of the teacher's own responses.
        """
        settings, used = self.settings, len(self.negatives) if negatives else 0
        best: tuple[float, float, Learner, list[dict]] | None = None
        for number, phi_kl in enumerate(settings.phi_kl):
            job, training = self._job(td, negatives, number), self.training(td, negatives, number)
            history = once(job.run, training.learner, lambda: launch(job, training).history)  # noqa: B023
            nll = min(entry["eval_reward_nll"] for entry in history if "eval_reward_nll" in entry)
            if best is None or nll < best[0]:
                best = nll, phi_kl, training.learner.to(best_device()).eval(), history
        nll, phi_kl, learner, history = best
        policy, scaled = getattr(learner, "student", None), self._scaled(td)
        posterior = next(module for module in learner.modules() if isinstance(module, RewardPosterior))
        if policy is not None and posterior.own_encoder:
            posterior.encoder = policy.base_model  # the states that the head was trained on
        known = {"phi_kl": phi_kl, "heldout_nll": nll, "c": scaled.scale, "offset": scaled.offset}
        description = {"td": td, "residual": scaled.residual.model_dump(), **known, "negatives": used}
        description |= {name: getattr(settings, name) for name in ("fit", "head", "encoder", "sigma_min")}
        rows = self.validation if policy is None else _spoken_by(policy, self.validation)
        values = zip(rows, per_row(rows, posterior, posterior.device), strict=True)
        values = {row.key: tuple(each) for row, each in values}
        calibrated = calibration(values, scaled.clipped(rows), posterior.head.floor, scaled.kept(rows))
        return Fitted(posterior, known | calibrated, description, split_history(history)[1])

    def training(self, td: str, negatives: bool, number: int) -> Training:
        """The learner of one candidate, by its number, and what it learns from."""
        settings, scaled = self.settings, self._scaled(td)
        rows = [*self.train, *(self.negatives if negatives else ())]
        known = {"delta": scaled.clipped([*rows, *self.validation])} if settings.fit == "teacher" else None
        seed_everything(self.seed)
        learner = self._learner(settings.phi_kl[number], scaled)
        return Training(learner, rows, self.validation, partial(collate, topk=False, extras=known))

    def _scaled(self, td: str) -> Scaled:
        return Scaled.of(self.train, td, getattr(self.settings, td))

    def _learner(self, phi_kl: float, scaled: Scaled) -> Learner:
        settings, student = self.settings, self.sources.student
        posterior = RewardPosterior.from_student(student, settings.head, settings.encoder, settings.sigma_min)
        if settings.fit == "teacher":
            return RewardLearner(posterior, phi_kl, scaled.residual.terminal)
        policy = load_lm(student).train()
        set_dropout(policy, 0.0)
        return StudentLearner(policy, [Likelihood(), Consistency(JointReward(posterior, phi_kl), settings.lam)], scaled)

    def _job(self, td: str, negatives: bool, number: int) -> Job:
        settings, phi_kl = self.settings, self.settings.phi_kl[number]
        paths = {name: path and str(path) for name, path in vars(self.sources).items()}
        return Job(
            what=f"{td} reward{' with negatives' if negatives and self.negatives else ''}, phi_kl {phi_kl:g}",
            make="stages.reward.fit:training",
            inputs={
                "settings": settings.model_dump(), "seed": self.seed, "paths": paths, "td": td, "negatives": negatives,
                "number": number,
            },
            optimisation=settings.optimisation,
            seed=self.seed,
            run=self.run / f"{td}-{len(self.negatives) if negatives else 0}-{number}",
            log_every=settings.evaluate_every,
            evaluate_every=settings.evaluate_every,
            save_every=settings.evaluate_every,
            best="reward_nll",
            patience=settings.patience,
            train=self.how,
        )  # fmt: skip


def training(
    settings: dict, seed: int, paths: dict[str, str | None], td: str, negatives: bool, number: int
) -> Training:
    """What a job of `Fitting` trains."""
    sources = Sources(**{name: path and Path(path) for name, path in paths.items()})
    rows, _ = read_rows(sources)
    own = rows["train"], rows["validation"], rows.get("negatives", ())
    return Fitting(Reward(**settings), seed, sources, *own, Path(), Train()).training(td, negatives, number)


def read_rows(sources: Sources) -> tuple[dict[str, list[Row]], dict[str, Selection]]:
    """The rows of every part that the student can read, and the selections that they are in.

    Raises UserError where there is nothing to fit or to validate, or the selections are of different models.
    """
    selection = Selection(sources.selection, sources.store)
    selection.require_teacher("a reward")
    student = sources.student
    require_same_tokenizer(selection.teacher["tokenizer"], load_tokenizer(student), student)
    rows = {name: list(selection.rows(name, topk=False)) for name in ("train", "validation") if name in selection.parts}
    for name in ("train", "validation"):
        if not rows.get(name):
            raise UserError(
                f"{sources.selection} has no {name} responses: the reward is fitted on train, chosen on validation"
            )
    config = load_config(student)
    require_context(config, (_lengths(row) for part in rows.values() for row in part), f"the student {student}")
    others = {"scored": list(selection.rows("scored", topk=False))} if "scored" in selection.parts else {}
    opened = {"selection": selection}
    if sources.scored is not None:
        opened["scored"] = scored = _opened_scored(selection, sources)
        others |= {name: list(scored.rows(name, topk=False)) for name in scored.parts}
    return rows | _readable(others, Context.of(config)), opened


def _opened_scored(selection: Selection, sources: Sources) -> Selection:
    """What the stage `score` wrote. Raises UserError where it is of another teacher or student."""
    scored = Selection(sources.scored, sources.store)
    scored.require_same_teacher(selection)
    if scored.manifest.get("student") not in (None, fingerprint(sources.student)):
        raise UserError(
            f"{sources.scored} holds samples of another student than {sources.student}: run `xkd-pipeline score` for it"
        )
    return scored


def _readable(rows: dict[str, list[Row]], context: Context) -> dict[str, list[Row]]:
    """The rows that the student can read: a reference may be longer than any response of the teacher."""
    readable = {name: [row for row in part if context.holds(*_lengths(row))] for name, part in rows.items()}
    left_out = sum(len(rows[name]) - len(readable[name]) for name in rows)
    if left_out:
        console.warn(
            f"{left_out:,} scored rows are longer than the student reads ({context.tokens} tokens) and left out"
        )
    return readable


def _lengths(row: Row) -> tuple[int, int]:
    return len(row.prompt_ids), len(row.response_ids)


def calibration(
    posterior: dict[str, tuple[np.ndarray, np.ndarray]],
    delta: dict[str, np.ndarray],
    log_floor: float,
    kept: dict[str, np.ndarray],
) -> dict[str, float]:
    """Shares of held-out residuals inside 1 and 2 sigma, and of sigmas at their floor, over the kept steps."""
    mu, log_sigma, residuals = (
        np.concatenate([values[key][kept[key]] for key in posterior])
        for values in ({k: p[0] for k, p in posterior.items()}, {k: p[1] for k, p in posterior.items()}, delta)
    )
    distance = np.abs(residuals - mu) / np.exp(log_sigma)
    return {
        "inside_1_sigma": float((distance <= 1).mean()),
        "inside_2_sigma": float((distance <= 2).mean()),
        "sigma_at_floor": float((log_sigma <= log_floor + 1e-6).mean()),
    }


def _spoken_by(policy, rows: Sequence[Row]) -> list[Row]:
    """The rows with the policy's log-probabilities and normalisers in place of the teacher's."""

    def scores(batch: dict[str, Tensor]) -> list[Tensor]:
        scores = score_tokens(policy, batch)
        return [scores.logprob, scores.lse]

    values = zip(rows, per_row(rows, scores, policy.device), strict=True)
    return [replace(row, logprobs=logprob, lse=lse) for row, (logprob, lse) in values]

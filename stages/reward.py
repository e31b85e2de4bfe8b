"""Fit the reward that explains the teacher: AVRIL on its cached words, and an audit of what came out."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import EarlyStoppingCallback

from pipeline import console
from pipeline.errors import UserError
from pipeline.models import load_config, load_lm, load_tokenizer, require_context, require_same_tokenizer
from pipeline.params import Params, Residual, Reward
from pipeline.provenance import code_fingerprint, fingerprint, git_commit, seconds_since_start, versions
from pipeline.shards.files import digest, write_json_atomically
from pipeline.shards.schema import Row
from pipeline.shards.selection import Selection
from stages.audit import Scored, audit, calibration
from stages.batches import IGNORED, collate, from_rows
from stages.bootstrap import say_interval
from stages.curves import split_history, write_csv
from stages.objectives.avril import gaussian_nll, kept_steps, kl_to_prior
from stages.residuals import residual_scale, teacher_residual
from stages.reward_model import RewardPosterior, save_posterior
from stages.students import score_tokens
from stages.training import Learner, Term, seed_everything, train

CLIP = 5.0  # residuals have heavy tails; in units of c
POSTERIORS = ("sarsa", "soft")


class RewardLearner(Learner):
    """-log q(delta) + phi_kl KL(q || prior) on the teacher's residuals, which come with the batch as `delta`."""

    def __init__(self, posterior: RewardPosterior, phi_kl: float, terminal: str):
        super().__init__()
        self.posterior, self.terminal = posterior, terminal
        self.terms = {"nll": Term(1.0, "steps"), "kl": Term(phi_kl, "steps")}

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        mu, log_sigma = self.posterior(batch)
        kept = kept_steps(batch["labels"] != IGNORED, batch["stop"], self.terminal)
        nll = gaussian_nll(batch["delta"], mu, log_sigma)
        return {"nll": nll[kept].sum(), "kl": kl_to_prior(mu, log_sigma)[kept].sum()}


def reward(
    params: Params,
    selection_path: Path,
    student_path: Path,
    out: Path,
    audit_out: Path,
    runs: Path,
    store: Path | None = None,
) -> dict:
    """Fit both posteriors on the cached teacher, write them to `out` with the rewards of all its tokens, and audit.

    Returns the metrics. Raises UserError where the selection holds nothing to fit, to validate or to audit with.
    """
    selection = Selection(selection_path, store)
    selection.require_teacher("a reward")
    require_same_tokenizer(selection.teacher["tokenizer"], load_tokenizer(student_path), student_path)
    rows = {name: list(selection.rows(name)) for name in ("train", "validation", "scored") if name in selection.parts}
    for name in ("train", "validation"):
        if not rows.get(name):
            raise UserError(
                f"{selection_path} has no {name} responses: the reward is fitted on train, chosen on validation"
            )

    longest = max(len(row.prompt_ids) + len(row.response_ids) for part in rows.values() for row in part)
    require_context(load_config(student_path), longest, f"the student {student_path}")
    origins = {"selection": fingerprint(selection_path), "student": fingerprint(student_path)}
    inputs = [params.seed, origins, code_fingerprint()]
    metrics: dict[str, dict] = {}
    for td in POSTERIORS:
        residual: Residual = getattr(params.reward, td)
        run = runs / "reward" / digest([td, params.reward.model_dump(), *inputs])[:16]
        posterior, metrics[td], curve = _fit(td, residual, params.reward, rows, student_path, params.seed, run)
        description = {"td": td, "residual": residual.model_dump(), "teacher": selection.teacher["identity"]}
        save_posterior(out / td, posterior, description | metrics[td])
        _write_rewards(out / td / "rewards.parquet", [row for part in rows.values() for row in part], posterior)
        write_csv(audit_out / f"{td}.csv", curve)
        shutil.rmtree(run, ignore_errors=True)
    scored = auditable(rows.get("scored", []))
    if scored:
        metrics["audit"] = _audit(scored, posterior, student_path, params)
    else:
        console.warn(
            "the reward is not audited: that needs validation prompts with references of two tokens or more, and "
            "generate.corrupted above 0"
        )
    provenance = {
        "seed": params.seed,
        "parameters": params.reward.model_dump(),
        "teacher": selection.teacher["identity"],
        **origins,
        "git_commit": git_commit(),
        "versions": versions(),
    }
    write_json_atomically(
        audit_out / "results.json", metrics | {"cost": {"seconds": seconds_since_start()}, "provenance": provenance}
    )
    write_json_atomically(audit_out / "metrics.json", _headline(metrics))
    _report(metrics, out, audit_out)
    return metrics


def _fit(
    td: str,
    residual: Residual,
    settings: Reward,
    rows: dict[str, list[Row]],
    student: Path,
    seed: int,
    run: Path,
) -> tuple[RewardPosterior, dict, list[dict]]:
    """Posterior, what is known of its fit, and held-out curve, for the phi_kl with the best held-out likelihood."""
    scale, offset = residual_scale(rows["train"], td, residual)
    deltas = {"delta": dict(_scaled_residuals([*rows["train"], *rows["validation"]], td, residual, scale, offset))}
    responses = {name: from_rows(rows[name], False, deltas) for name in ("train", "validation")}
    best: tuple[float, float, RewardPosterior, list[dict]] | None = None
    for phi_kl in settings.phi_kl:
        seed_everything(seed)
        learner = RewardLearner(RewardPosterior.from_student(student, settings.sigma_min), phi_kl, residual.terminal)
        history = train(
            f"{td} reward, phi_kl {phi_kl:g}", learner, responses["train"], responses["validation"],
            settings.optimisation, run / f"{phi_kl:g}", seed, log_every=settings.evaluate_every,
            evaluate_every=settings.evaluate_every, save_every=settings.evaluate_every, best="nll",
            callbacks=[EarlyStoppingCallback(settings.patience)],
        )  # fmt: skip
        nll = min(entry["eval_nll"] for entry in history if "eval_nll" in entry)
        if best is None or nll < best[0]:
            best = nll, phi_kl, learner.posterior.eval(), history
    nll, phi_kl, posterior, history = best
    fit = {"phi_kl": phi_kl, "heldout_nll": nll, "c": scale, "offset": offset, "sigma_min": settings.sigma_min}
    fit |= calibration(
        _posterior_of(rows["validation"], posterior), deltas["delta"], posterior.head.floor,
        {row.key: teacher_residual(row, td, residual)[1] for row in rows["validation"]},
    )  # fmt: skip
    return posterior, fit, split_history(history)[1]


def _scaled_residuals(
    rows: Sequence[Row], td: str, residual: Residual, scale: float, offset: float
) -> Iterator[tuple[str, np.ndarray]]:
    for row in rows:
        delta, _ = teacher_residual(row, td, residual)
        yield row.key, np.clip((delta - offset) / scale, -CLIP, CLIP)


@torch.no_grad()
def _posterior_of(
    rows: Sequence[Row], posterior: RewardPosterior, batch_size: int = 128
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """key -> mu [T], log_sigma [T]."""
    found = {}
    responses = from_rows(rows, False)
    for start in range(0, len(rows), batch_size):
        mu, log_sigma = posterior(collate(responses[start : start + batch_size]))
        for i, row in enumerate(rows[start : start + batch_size]):
            steps = len(row.response_ids)
            found[row.key] = mu[i, :steps].numpy(), log_sigma[i, :steps].numpy()
    return found


def _write_rewards(path: Path, rows: Sequence[Row], posterior: RewardPosterior) -> None:
    """mu and log sigma of every cached token, once: distillation and the report read them, without the encoder."""
    values = _posterior_of(rows, posterior)
    schema = pa.schema({"key": pa.string(), "mu": pa.list_(pa.float32()), "log_sigma": pa.list_(pa.float32())})
    columns = [list(values), [mu for mu, _ in values.values()], [log_sigma for _, log_sigma in values.values()]]
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")


def auditable(rows: Sequence[Row]) -> list[Row]:
    """The rows of prompts that have both right and wrong responses."""
    origins: dict[str, set[str]] = {}
    for row in rows:
        origins.setdefault(row.prompt_id, set()).add(row.origin)
    return [row for row in rows if {"reference", "corrupted"} <= origins[row.prompt_id]]


def _audit(rows: Sequence[Row], posterior: RewardPosterior, student_path: Path, params: Params) -> dict:
    """Rank held-out references against their corruptions by the soft reward, beside the log-probability baselines."""
    rewards = _posterior_of(rows, posterior)
    student = _student_logprobs(rows, load_lm(student_path))
    judges = {
        "reward": {key: mu for key, (mu, _) in rewards.items()},
        "student_logprob": student,
        "teacher_logprob": {row.key: row.logprobs for row in rows},
    }
    scored = {
        judge: [Scored(row.prompt_id, row.origin == "reference", values[row.key]) for row in rows]
        for judge, values in judges.items()
    }
    return {judge: audit(examples, params.reward.bootstrap, params.seed) for judge, examples in scored.items()}


@torch.no_grad()
def _student_logprobs(rows: Sequence[Row], student, batch_size: int = 128) -> dict[str, np.ndarray]:
    found, responses = {}, from_rows(rows, False)
    for start in range(0, len(rows), batch_size):
        logprob = score_tokens(student, collate(responses[start : start + batch_size])).logprob.numpy()
        part = rows[start : start + batch_size]
        bounds = np.cumsum([len(row.response_ids) for row in part])[:-1]
        found.update(zip((row.key for row in part), np.split(logprob, bounds), strict=True))
    return found


def _headline(metrics: dict) -> dict[str, float]:
    """The few numbers that `dvc metrics` shows; all are in results.json."""
    shown = {f"{td}_nll": metrics[td]["heldout_nll"] for td in POSTERIORS}
    return shown | {f"auc_{judge}": found["within_mean"]["auc"] for judge, found in metrics.get("audit", {}).items()}


def _report(metrics: dict, out: Path, audit_out: Path) -> None:
    shown = ("c", "inside_1_sigma", "inside_2_sigma", "sigma_at_floor")
    console.table(
        "reward posterior on held-out teacher text",
        ("posterior", "-log q", "phi_kl", "c", "in 1 sigma", "in 2 sigma", "at floor"),
        [
            (td, f"{fit['heldout_nll']:.3f}", f"{fit['phi_kl']:g}", *(f"{fit[name]:.2f}" for name in shown))
            for td, fit in ((td, metrics[td]) for td in POSTERIORS)
        ],
    )
    if "audit" in metrics:
        console.table(
            "audit: AUC of references over their corruptions, within prompts (95 % interval)",
            ("judge", "mean", "sum", "pooled mean"),
            [
                (
                    judge,
                    *(say_interval(r[how], ".3f", of="auc") for how in ("within_mean", "within_sum")),
                    f"{r['pooled_mean']['auc']:.3f}",
                )
                for judge, r in metrics["audit"].items()
            ],
        )
    console.facts("reward fitted", [("reward", out), ("audit", audit_out)])

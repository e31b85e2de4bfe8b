"""Train the student on the cached teacher: L_KD, likelihood and the X term, the reward read from its cache."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from transformers import EarlyStoppingCallback

from pipeline import console
from pipeline.errors import UserError
from pipeline.models import (
    load_lm,
    load_tokenizer,
    require_context,
    require_replaceable,
    require_same_tokenizer,
    save_model,
    stop_token_ids,
)
from pipeline.params import Distill, Lora, Params
from pipeline.provenance import code_fingerprint, fingerprint, git_commit, seconds_since_start, versions
from pipeline.shards.files import digest, write_json_atomically
from pipeline.shards.schema import Row
from pipeline.shards.selection import Selection
from stages.batches import from_rows
from stages.curves import split_history, write_csv
from stages.residuals import residual_scale
from stages.reward_model import RewardPosterior, read_description, require_same_residual
from stages.students import StudentLearner, require_plain_head
from stages.training import FirstStep, seed_everything, train

LAM_EFF_WARNING = 0.1


def distill(
    params: Params,
    selection_path: Path,
    student_path: Path,
    reward_path: Path | None,
    out: Path,
    metrics_out: Path,
    runs: Path,
    store: Path | None = None,
) -> dict:
    """Distil the model in `student_path` into the folder `out`; returns the closing metrics, also in `metrics_out`.

    reward_path: folder of the reward stage, needed for `distill.reward: frozen`. Raises UserError where tokenizers or
    residuals do not match.
    """
    settings = params.distill
    require_replaceable(out)
    selection = Selection(selection_path, store)
    if settings.objective != "seqkd" or settings.reward != "none":
        selection.require_teacher(name_of(settings))
    tokenizer = load_tokenizer(student_path)
    require_same_tokenizer(selection.teacher["tokenizer"], tokenizer, student_path)
    rows = {name: list(selection.rows(name)) for name in ("train", "validation") if name in selection.parts}
    if not rows.get("train"):
        raise UserError(f"{selection_path} holds no training responses")

    extras, scale, offset = _reward_inputs(settings, selection, rows, reward_path)
    seed = params.seed + settings.seed
    seed_everything(seed)
    student = load_lm(student_path).train()
    require_plain_head(student, f"the student {student_path}")
    adapted = _with_adapters(student, settings.lora) if settings.lora.rank else None
    posterior = None
    if settings.reward == "scratch":
        posterior = RewardPosterior(load_lm(student_path).train(), params.reward.sigma_min)
    topk = settings.objective != "seqkd"
    responses = {name: from_rows(part, topk, extras) for name, part in rows.items()}
    longest = max(len(row.prompt_ids) + len(row.response_ids) for part in rows.values() for row in part)
    require_context(student.config, longest, f"the student {student_path}")
    if settings.best and not rows.get("validation"):
        raise UserError(f"distill.best needs held-out responses, and {selection_path} has no part validation")
    inputs = [params.seed, settings.model_dump(), params.reward.sigma_min, scale, offset, code_fingerprint()]
    origins = {"selection": fingerprint(selection_path), "student": fingerprint(student_path)}
    origins["reward"] = fingerprint(reward_path) if extras else None
    inputs.append(origins)
    run = runs / "distill" / digest(inputs)[:16]
    first_step = FirstStep()
    history = train(
        f"distilling ({name_of(settings)})",
        _learner(settings, student, posterior, scale, offset),
        responses["train"],
        responses.get("validation"),
        settings.optimisation,
        run,
        seed,
        log_every=settings.log_every,
        evaluate_every=settings.evaluate_every if "validation" in responses else None,
        save_every=settings.save_every,
        best=settings.best or None,
        callbacks=[first_step, *([EarlyStoppingCallback(settings.patience)] if settings.patience else [])],
        report_to=settings.report_to,
    )
    if adapted is not None:
        student = adapted.merge_and_unload()
    metrics = _write_curves(settings, history, scale, metrics_out)
    metrics |= {"objective": name_of(settings), "samples": len(rows["train"]), "parameters": student.num_parameters()}
    provenance = {
        "seed": params.seed,
        "parameters": settings.model_dump(),
        "teacher": selection.teacher["identity"],
        **origins,
        "git_commit": git_commit(),
        "versions": versions(),
    }
    cost = {"seconds_to_first_step": first_step.seconds, "seconds": seconds_since_start()}
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    write_json_atomically(metrics_out / "metrics.json", numbers)
    write_json_atomically(metrics_out / "results.json", metrics | {"cost": cost, "provenance": provenance})
    drawn = selection.part("train")["request"].get("sampling")  # absent where responses were given
    stops = tuple(drawn["stop_token_ids"]) if drawn else stop_token_ids(student_path, tokenizer)
    save_model(out, student, tokenizer, _card(settings, selection, metrics, origins["student"]), stops)
    shutil.rmtree(run, ignore_errors=True)
    console.facts(
        f"student distilled with {name_of(settings)}",
        [
            ("cached responses", f"{len(rows['train']):,}"),
            *((name, f"{value:.4g}") for name, value in metrics.items() if isinstance(value, float)),
            ("first step after", f"{first_step.seconds or 0:.0f} s"),
            ("student", out),
            ("metrics", metrics_out),
        ],
    )
    return metrics


def _with_adapters(student, lora: Lora):
    """The PEFT model around `student`, whose linear layers get adapters in place; nothing else is trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="SEQ_2_SEQ_LM" if student.config.is_encoder_decoder else "CAUSAL_LM",
    )
    return get_peft_model(student, config)


def name_of(settings: Distill) -> str:
    """The objective as the tables call it: `fkl`, `x-fkl (frozen)`, `jsd(0.5) + 0.5 nll`."""
    name = settings.objective + (f"({settings.beta:g})" if settings.objective == "jsd" else "")
    name += f" + {settings.nll_weight:g} nll" if settings.nll_weight else ""
    return name if settings.reward == "none" else f"x-{name} ({settings.reward})"


def _reward_inputs(
    settings: Distill, selection: Selection, rows: dict[str, Sequence[Row]], reward_path: Path | None
) -> tuple[dict[str, dict[str, np.ndarray]] | None, float, float]:
    """The reward's values by name and key where it is frozen, and the residuals' scale and offset."""
    if settings.reward == "none":
        return None, 1.0, 0.0
    if settings.reward != "frozen":
        return None, *residual_scale(rows["train"], settings.td, settings.residual)
    if reward_path is None:
        raise UserError("distill.reward: frozen needs the folder of a fitted reward: pass --reward")
    folder = reward_path / settings.td
    description = read_description(folder)
    require_same_residual(settings.residual, description, folder)
    if description["teacher"] != selection.teacher["identity"]:
        raise UserError(
            f"the reward in {folder} explains teacher {description['teacher']}, the cache holds teacher "
            f"{selection.teacher['identity']}: run `xkd-pipeline reward` again"
        )
    table = pq.read_table(folder / "rewards.parquet")
    keys = table.column("key").to_pylist()
    extras = {
        name: dict(zip(keys, (np.asarray(v, np.float32) for v in table.column(name).to_pylist()), strict=True))
        for name in ("mu", "log_sigma")
    }
    unknown = [
        row.key for part in rows.values() for row in part if len(extras["mu"].get(row.key, ())) != len(row.response_ids)
    ]
    if unknown:
        raise UserError(
            f"{folder} has no reward for {len(unknown)} of the cached responses (first: {unknown[0]}): it was fitted "
            "on another selection; run `xkd-pipeline reward` again"
        )
    return extras, description["c"], description["offset"]


def _learner(settings: Distill, student, posterior, scale: float, offset: float) -> StudentLearner:
    seqkd, plain = settings.objective == "seqkd", settings.reward == "none"
    return StudentLearner(
        student,
        objective=None if seqkd else settings.objective,
        beta=settings.beta,
        tail=settings.tail,
        nll_weight=settings.nll_weight + seqkd,
        td=None if plain else settings.td,
        reward=settings.reward,
        posterior=posterior,
        lam=settings.lam,
        kl_weight=settings.kl_weight,
        q_source=settings.residual.q_source,
        gamma=settings.residual.gamma,
        terminal=settings.residual.terminal,
        scale=scale,
        offset=offset,
        chunk=settings.chunk,
    )


def _write_curves(settings: Distill, history: list[dict], scale: float, out: Path) -> dict:
    """Training and held-out curves as CSV, with lam_eff; returns the held-out values of the student that is kept."""
    training, held_out = split_history(history)
    for row in [*training, *held_out]:
        if "precision" in row:
            row["lam_eff"] = settings.lam * row.pop("precision") / scale**2
    strongest = max((row.get("lam_eff", 0.0) for row in training), default=0.0)
    if strongest > LAM_EFF_WARNING:
        console.warn(
            f"lam_eff reached {strongest:.2g}: above {LAM_EFF_WARNING} the TD term works against the distillation "
            "loss; lower distill.lam"
        )
    write_csv(out / "training.csv", training)
    write_csv(out / "heldout.csv", held_out)
    kept: dict = {}
    if held_out:
        kept = min(held_out, key=lambda row: row[settings.best]) if settings.best else held_out[-1]
    found = {f"heldout_{name}": value for name, value in kept.items() if name != "step"}
    if settings.best:
        found["best_step"] = kept["step"]
    return found | {"train_loss": training[-1]["loss"]} if training else found


def _card(settings: Distill, selection: Selection, metrics: dict, started_from: str) -> str:
    teacher = selection.teacher
    lines = [
        "---",
        "library_name: transformers",
        *([f"license: {teacher['licence']}"] if teacher["licence"] else []),
        "---",
        "# Distilled student",
        "",
        f"- Objective: {name_of(settings)}",
        f"- Teacher: {teacher['name'] or 'local model'}, identity `{teacher['identity']}`",
        f"- Cached responses: {metrics['samples']:,} (training), top {selection.manifest['k']} tokens a position",
        f"- Started from: model `{started_from}`",
        f"- Training: {settings.optimisation.steps} steps of {settings.optimisation.batch_size} responses",
        *([f"- LoRA: rank {settings.lora.rank}, alpha {settings.lora.alpha:g}, merged"] if settings.lora.rank else []),
        "",
        "Held out, in nats a token where it is a loss:",
        "",
        *(f"- {name}: {value:.4g}" for name, value in metrics.items() if isinstance(value, float)),
    ]
    return "\n".join(lines) + "\n"

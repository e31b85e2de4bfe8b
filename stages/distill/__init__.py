"""Train the student on the cached teacher: L_KD, likelihood and the X term, the reward read from its cache."""

import json
import shutil
from pathlib import Path

from pipeline import console
from pipeline.files import digest
from pipeline.learning.curves import split_history, write_csv
from pipeline.learning.job import Job
from pipeline.learning.trainer import run
from pipeline.models import load_tokenizer, require_own_model, save_model, save_note, stop_token_ids
from pipeline.outputs import begin_results, require_apart, require_can_write, require_own_results
from pipeline.params import OBSERVING, Distill, Params
from pipeline.provenance import code_fingerprint, fingerprint
from pipeline.results import write_results
from stages.distill.inputs import FITTED
from stages.distill.training import Distillation

_JOB = ("optimisation", "log_every", "evaluate_every", "save_every", "best", "patience", "report_to", "workers")
LAM_EFF_LEAST, LAM_EFF_MOST = 1e-4, 0.1  # outside of them the TD term does not act, or acts against the loss


def distill(
    params: Params,
    selection_path: Path,
    student_path: Path,
    reward_path: Path | None,
    out: Path,
    metrics_out: Path,
    runs: Path,
    store: str | Path | None = None,
    scored_path: Path | None = None,
) -> dict:
    """Distil the model in `student_path` into the folder `out`; returns the closing metrics, also in `metrics_out`.

    reward_path: folder of the reward stage, needed for the rewards `frozen`, `shuffled` and `joint`. scored_path: what
    the stage `score` had scored, with the references that `sft` learns. Raises UserError where tokenizers, vocabularies
    or residuals do not match.
    """
    settings = params.distill
    require_apart({"--out": out}, {"--metrics": metrics_out, "--runs": runs / "distill"})
    require_apart({"--metrics": metrics_out}, {"--runs": runs / "distill"})
    require_own_model(out)
    require_own_results(metrics_out, "distill", "--metrics")
    require_can_write(runs)
    paths = {"selection": selection_path, "student": student_path, "reward": reward_path, "scored": scored_path}
    paths["store"] = store
    seed = params.seed + settings.seed
    plan = Distillation.open(settings, params.reward, seed, **paths)
    origins = {"selection": plan.selection.fingerprint, "student": fingerprint(student_path)}
    origins["scored"] = plan.scored and plan.scored.fingerprint
    origins["reward"] = fingerprint(reward_path) if settings.reward in FITTED else None
    training = plan.training()
    job = _job(params, plan, paths, runs, origins)
    trained = run(job, training)
    student = training.learner.student if plan.adapted is None else plan.adapted.merge_and_unload()

    begin_results(metrics_out, "distill", "--metrics")
    metrics = _write_curves(settings, trained.history, plan.inputs.scale, metrics_out)
    metrics |= {"objective": plan.name, "samples": len(plan.rows["train"]), "parameters": student.num_parameters()}
    write_results(
        metrics_out / "results.json", "distill", metrics, {"seconds_to_first_step": trained.seconds_to_first_step},
        seed=params.seed, parameters=settings.model_dump(), teacher=plan.selection.teacher["identity"], **origins,
    )  # fmt: skip
    drawn = plan.selection.parts.get("train", {}).get("request", {}).get("sampling")  # absent of given responses
    tokenizer = load_tokenizer(student_path)
    stops = tuple(drawn["stop_token_ids"]) if drawn else stop_token_ids(student_path, tokenizer)
    save_model(out, student, tokenizer, _card(plan, metrics, origins["student"]), stops)
    shutil.rmtree(job.run, ignore_errors=True)
    facts = [("cached responses", f"{metrics['samples']:,}")]
    facts += [(name, f"{value:.4g}") for name, value in metrics.items() if isinstance(value, float)]
    facts += [("first step after", f"{trained.seconds_to_first_step or 0:.0f} s")]
    console.facts(f"student distilled with {plan.name}", [*facts, ("student", out), ("metrics", metrics_out)])
    return metrics


def _job(params: Params, plan: Distillation, paths: dict[str, object], runs: Path, origins: dict) -> Job:
    """The training; its checkpoints are resumed by a run of the same inputs and the same code alone."""
    settings = params.distill
    form = params.reward.model_dump(include={"head", "encoder", "sigma_min"})
    of = [params.seed, settings.model_dump(exclude=OBSERVING), form]
    of += [code_fingerprint("stages.distill.training"), origins]
    inputs = {"params": params.model_dump(include={"distill", "reward"}), "seed": plan.seed}
    return Job(
        what=f"distilling ({plan.name})",
        make="stages.distill.training:training",
        inputs=inputs | {name: None if path is None else str(path) for name, path in paths.items()},
        run=runs / "distill" / digest(of)[:16],
        seed=plan.seed,
        **{name: getattr(settings, name) for name in _JOB},
    )


def leave_out(out: Path, metrics_out: Path) -> None:
    """Leave a note in the place of the plain student, where distill.plain is false."""
    begin_results(metrics_out, "distill", "--metrics")
    save_note(out, "No plain student was trained: distill.plain is false.")
    console.say(f"no plain student is trained (distill.plain is false); {out} says so")


def _write_curves(settings: Distill, history: list[dict], scale: float, out: Path) -> dict:
    """Training and held-out curves as CSV, with lam_eff; returns the held-out values of the student that is kept."""
    training, held_out = split_history(history)
    for row in [*training, *held_out]:
        if "precision" in row:
            row["lam_eff"] = settings.lam * row.pop("precision") / scale**2
    strongest = max((row["lam_eff"] for row in training if "lam_eff" in row), default=None)
    if strongest is not None and strongest > LAM_EFF_MOST:
        console.warn(
            f"lam_eff reached {strongest:.2g}: above {LAM_EFF_MOST} the TD term works against the distillation "
            "loss; lower distill.lam"
        )
    if strongest is not None and strongest < LAM_EFF_LEAST:
        console.warn(
            f"lam_eff stayed at or below {strongest:.2g}: under {LAM_EFF_LEAST} the X term does not act, and the "
            "student is that of the plain loss; raise distill.lam, or set distill.reward=none"
        )
    write_csv(out / "training.csv", training)
    write_csv(out / "heldout.csv", held_out)
    kept: dict = {}
    if held_out:
        kept = min(held_out, key=lambda row: row[settings.best]) if settings.best else held_out[-1]
    closing = {f"heldout_{name}": value for name, value in kept.items() if name != "step"}
    if settings.best:
        closing["best_step"] = kept["step"]
    return closing | {"train_loss": training[-1]["loss"]} if training else closing


def _card(plan: Distillation, metrics: dict, started_from: str) -> str:
    settings, teacher, k = plan.settings, plan.selection.teacher, plan.selection.k
    kept = f"{k} sampled tokens" if plan.sampled else f"top {k} tokens"
    lines = [
        "---",
        "library_name: transformers",
        *([f"license: {json.dumps(teacher['licence'])}"] if teacher["licence"] else []),
        "---",
        "# Distilled student",
        "",
        f"- Objective: {metrics['objective']}",
        f"- Teacher: {teacher['name'] or 'local model'}, identity `{teacher['identity']}`",
        f"- Cached responses: {metrics['samples']:,} (training), {kept} per position",
        f"- Started from: model `{started_from}`",
        f"- Training: {settings.optimisation.steps} steps of {settings.optimisation.batch_size} responses",
        *([f"- LoRA: rank {settings.lora.rank}, alpha {settings.lora.alpha:g}, merged"] if settings.lora.rank else []),
        "",
        "Held out, in nats per token where it is a loss:",
        "",
        *(f"- {name}: {value:.4g}" for name, value in metrics.items() if isinstance(value, float)),
    ]
    return "\n".join(lines) + "\n"

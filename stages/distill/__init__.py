"""Train the student on the cached teacher: L_KD, likelihood and the X term, the reward read from its cache."""

import json
import shutil
from pathlib import Path

from pipeline import console
from pipeline.files import digest
from pipeline.layout import sibling
from pipeline.learning.curves import split_history, write_csv
from pipeline.learning.job import Job
from pipeline.learning.launch import launch
from pipeline.models import require_own_model, save_model, save_note
from pipeline.outputs import begin_results, require_apart, require_can_write, require_own_results
from pipeline.params import OBSERVING, Distill, Params
from pipeline.provenance import code_fingerprint, fingerprint
from pipeline.results import write_results
from pipeline.store.ownership import require_own_selection
from stages.distill.inputs import FITTED
from stages.distill.measures import COSTS
from stages.distill.rounds import leave_no_rounds
from stages.distill.training import Distillation, Paths

_ASKING = {"template", "chat", "system", "max_tokens"}  # what a response depends on, beside models and seeds
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
    prompts_path: Path | None = None,
    rounds_out: Path | None = None,
) -> dict:
    """Distil the model in `student_path` into the folder `out`; returns the closing metrics, also in `metrics_out`.

    reward_path: folder of the reward stage, needed for the rewards `frozen`, `shuffled` and `joint`. scored_path: what
    the stage `score` had scored, with the references that `sft` learns. prompts_path: prompts that the student answers
    in on-policy rounds. rounds_out: folder of the selection of these rounds, by default one beside `out` where there
    are any; a given one is written in any case. Raises UserError where tokenizers, vocabularies, residuals or teachers
    do not match.
    """
    settings = params.distill
    if settings.rounds:
        rounds_out = rounds_out or sibling(out, "rounds")
    require_apart({"--out": out, "--rounds": rounds_out}, {"--metrics": metrics_out, "--runs": runs / "distill"})
    require_apart({"--metrics": metrics_out}, {"--runs": runs / "distill"})
    require_own_model(out)
    if rounds_out is not None:
        require_apart({"--rounds": rounds_out}, {"--selection": selection_path, "--scored": scored_path})
        require_own_selection(rounds_out, "--rounds")
    require_own_results(metrics_out, "distill", "--metrics")
    require_can_write(runs)
    seed = params.seed + settings.seed
    store = None if store is None else str(store)
    paths = Paths(selection_path, student_path, reward_path, scored_path, store, prompts_path, rounds_out)
    plan = Distillation.open(params, seed, paths)
    origins = {"selection": plan.selection.fingerprint, "student": fingerprint(student_path)}
    origins["scored"] = plan.scored and plan.scored.fingerprint
    origins["reward"] = fingerprint(reward_path) if settings.reward in FITTED else None
    if plan.answering:
        origins["prompts"] = fingerprint(prompts_path)
    job = _job(plan, runs, origins)
    training = plan.training(job.run)
    trained = launch(job, training)
    rounds = plan.rounds.finish(_kept_step(settings, trained.history)) if plan.rounds else []
    if rounds_out is not None and not plan.rounds:
        leave_no_rounds(rounds_out)
    student = plan.student.whole()

    begin_results(metrics_out, "distill", "--metrics")
    metrics = _write_curves(settings, trained.history, plan.inputs.scale, metrics_out)
    metrics |= {"objective": plan.name, "samples": len(plan.rows["train"]), "parameters": student.num_parameters()}
    cost = {"seconds_to_first_step": trained.seconds_to_first_step} | _cost_of(rounds)
    write_results(
        metrics_out / "results.json", "distill", metrics | {"rounds": rounds}, cost,
        seed=params.seed, parameters=settings.model_dump(), teacher=plan.selection.teacher["identity"], **origins,
    )  # fmt: skip
    save_model(out, student, plan.student.tokenizer, _card(plan, metrics, origins["student"]), plan.stops)
    shutil.rmtree(job.run, ignore_errors=True)
    facts = [("cached responses", f"{metrics['samples']:,}")]
    facts += [(name, f"{value:.4g}") for name, value in metrics.items() if isinstance(value, float)]
    facts += [("first step after", f"{trained.seconds_to_first_step or 0:.0f} s")]
    console.facts(f"student distilled with {plan.name}", [*facts, ("student", out), ("metrics", metrics_out)])
    return metrics


def _job(plan: Distillation, runs: Path, origins: dict) -> Job:
    """The training; its checkpoints are resumed by a run of the same inputs and the same code alone."""
    params, settings = plan.params, plan.settings
    form = params.reward.model_dump(include={"head", "encoder", "sigma_min"})
    of = [params.seed, settings.model_dump(exclude=OBSERVING), form]
    of += [code_fingerprint("stages.distill.training"), origins]
    if plan.answering:
        teacher = plan.answering.teacher
        of += [params.model_dump(include=_ASKING), teacher.identity, teacher.k, teacher.support]
    folder = runs / "distill" / digest(of)[:16]
    return Job(
        what=f"distilling ({plan.name})",
        make="stages.distill.training:training",
        inputs={"params": params.model_dump(), "seed": plan.seed, "run": str(folder)} | plan.paths.as_texts(),
        run=folder,
        seed=plan.seed,
        train=params.train,
        **{name: getattr(settings, name) for name in _JOB},
    )


def leave_out(out: Path, metrics_out: Path, rounds_out: Path | None) -> None:
    """Leave a note in the place of the plain student, and no rounds, where distill.plain is false."""
    begin_results(metrics_out, "distill", "--metrics")
    save_note(out, "No plain student was trained: distill.plain is false.")
    if rounds_out is not None:
        require_own_selection(rounds_out, "--rounds")
        leave_no_rounds(rounds_out)
    console.say(f"no plain student is trained (distill.plain is false); {out} says so")


def _kept_step(settings: Distill, history: list[dict]) -> int:
    """The step of the student that is kept."""
    _, held_out = split_history(history)
    if settings.best and held_out:
        return min(held_out, key=lambda row: row[settings.best])["step"]
    return max((row["step"] for row in history), default=settings.optimisation.steps)


def _cost_of(rounds: list[dict]) -> dict[str, float]:
    """What the rounds found and took together."""
    return {name: sum(each[name] for each in rounds) for name in COSTS} if rounds else {}


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

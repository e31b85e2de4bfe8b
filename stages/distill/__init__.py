"""Train the student on the cached teacher: L_KD, likelihood and the X term, the reward read from its cache."""

import json
import shutil
from functools import partial
from pathlib import Path

from transformers import EarlyStoppingCallback

from pipeline import console
from pipeline.errors import UserError
from pipeline.files import digest, write_json_atomically
from pipeline.learning.curves import split_history, write_csv
from pipeline.learning.dropout import set_dropout
from pipeline.learning.learner import StudentLearner, require_plain_head
from pipeline.learning.posterior import RewardPosterior
from pipeline.learning.rows import collate_rows
from pipeline.learning.trainer import FirstStep, seed_everything, train
from pipeline.models import (
    load_lm,
    load_tokenizer,
    require_context,
    require_own_model,
    require_same_tokenizer,
    save_model,
    save_note,
    stop_token_ids,
)
from pipeline.objectives.sparse import sparse_divergence
from pipeline.outputs import begin_results, require_apart, require_can_write, require_own_results
from pipeline.params import OBSERVING, TOKEN_OBJECTIVES, Distill, Lora, Params
from pipeline.provenance import code_fingerprint, fingerprint, git_commit, seconds_since_start, versions
from pipeline.store.rows import RowLoader, TeacherRows
from pipeline.store.selection import Selection
from stages.distill.inputs import FITTED, RewardInputs, posterior_for, reward_inputs

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
    selection = Selection(selection_path, store)
    sampled = selection.support == "sampled"
    name = name_of(settings, sampled)
    if settings.objective not in TOKEN_OBJECTIVES or settings.reward != "none":
        selection.require_teacher(name)
    if settings.objective not in TOKEN_OBJECTIVES:
        require_tokens(settings, selection, sampled)
    tokenizer = load_tokenizer(student_path)
    require_same_tokenizer(selection.teacher["tokenizer"], tokenizer, student_path)
    scored = _opened_scored(selection, scored_path, store) if settings.objective == "sft" else None
    rows = _rows(settings, selection, scored)
    seed = params.seed + settings.seed
    inputs = reward_inputs(settings, selection, rows, reward_path, seed)
    seed_everything(seed)
    student = load_lm(student_path).train()
    require_plain_head(student, f"the student {student_path}")
    set_dropout(student, settings.dropout)
    adapted = _with_adapters(student, settings.lora) if settings.lora.rank else None
    _require_vocabulary(student.config.get_text_config().vocab_size, rows, student_path)
    posterior = posterior_for(params, student_path, reward_path)
    topk = settings.objective not in TOKEN_OBJECTIVES
    lengths = (pair for part in rows.values() for pair in zip(part.prompt_tokens, part.response_tokens, strict=True))
    require_context(student.config, lengths, f"the student {student_path}")
    if settings.best and "validation" not in rows:
        raise UserError(f"distill.best needs held-out responses, and {selection_path} has no part validation")
    origins = {"selection": selection.fingerprint, "student": fingerprint(student_path)}
    origins["scored"] = scored and scored.fingerprint
    origins["reward"] = fingerprint(reward_path) if settings.reward in FITTED else None
    form = params.reward.model_dump(include={"head", "encoder", "sigma_min"})
    said = settings.model_dump(exclude=OBSERVING)
    run_of = [params.seed, said, form, inputs.scale, inputs.offset, code_fingerprint(), origins]
    run = runs / "distill" / digest(run_of)[:16]
    first_step = FirstStep()
    history = train(
        f"distilling ({name})",
        _learner(settings, student, posterior, inputs, sampled),
        rows["train"],
        rows.get("validation"),
        settings.optimisation,
        run,
        seed,
        log_every=settings.log_every,
        evaluate_every=settings.evaluate_every if "validation" in rows else None,
        save_every=settings.save_every,
        best=settings.best or None,
        callbacks=[first_step, *([EarlyStoppingCallback(settings.patience)] if settings.patience else [])],
        report_to=settings.report_to,
        collator=partial(collate_rows, topk=topk, extras=inputs.extras),
        workers=settings.workers,
        loader=partial(RowLoader, window=settings.window),
    )
    if adapted is not None:
        student = adapted.merge_and_unload()
    begin_results(metrics_out, "distill", "--metrics")
    metrics = _write_curves(settings, history, inputs.scale, metrics_out)
    metrics |= {"objective": name, "samples": len(rows["train"]), "parameters": student.num_parameters()}
    provenance = {
        "stage": "distill",
        "seed": params.seed,
        "parameters": settings.model_dump(),
        "teacher": selection.teacher["identity"],
        **origins,
        "git_commit": git_commit(),
        "versions": versions(),
    }
    cost = {"seconds_to_first_step": first_step.seconds, "seconds": seconds_since_start()}
    write_json_atomically(metrics_out / "results.json", metrics | {"cost": cost, "provenance": provenance})
    drawn = selection.parts.get("train", {}).get("request", {}).get("sampling")  # absent where responses were given
    stops = tuple(drawn["stop_token_ids"]) if drawn else stop_token_ids(student_path, tokenizer)
    save_model(out, student, tokenizer, _card(settings, selection, metrics, origins["student"], sampled), stops)
    shutil.rmtree(run, ignore_errors=True)
    console.facts(
        f"student distilled with {name}",
        [
            ("cached responses", f"{len(rows['train']):,}"),
            *((name, f"{value:.4g}") for name, value in metrics.items() if isinstance(value, float)),
            ("first step after", f"{first_step.seconds or 0:.0f} s"),
            ("student", out),
            ("metrics", metrics_out),
        ],
    )
    return metrics


def leave_out(out: Path, metrics_out: Path) -> None:
    """In the place of the plain student, where none is wanted."""
    begin_results(metrics_out, "distill", "--metrics")
    save_note(out, "No plain student was trained: distill.plain is false.")
    console.say(f"no plain student is trained (distill.plain is false); {out} says so")


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


def name_of(settings: Distill, sampled: bool) -> str:
    """The objective as the tables call it: `fkl`, `x-fkl (frozen)`, `jsd(0.5) + 0.5 nll`; a tail that is not auto's."""
    weight = _mixture(settings)
    name = settings.objective + ("" if weight is None else f"({weight:g})")
    usual = settings.tail in ("auto", _usual_tail(sampled))
    name += "" if usual or settings.objective in TOKEN_OBJECTIVES else f" {settings.tail}"
    name += f" + {settings.nll_weight:g} nll" if settings.nll_weight else ""
    return name if settings.reward == "none" else f"x-{name} ({settings.reward})"


def _usual_tail(sampled: bool) -> str:
    """What tail: auto stands for."""
    return "sampled" if sampled else "bucket"


def require_tokens(settings: Distill, selection: Selection, sampled: bool) -> None:
    """Raises UserError where the cache does not keep the tokens of the teacher that a loss needs."""
    if selection.k == 0:
        raise UserError(
            f"distill.objective: {settings.objective} compares tokens of the teacher's distribution, and "
            f"{selection.folder} keeps none of them (generate.k: 0): generate with a larger generate.k, or use "
            "distill.objective=seqkd"
        )
    if settings.tail == "sampled" and not sampled:
        raise UserError(
            f"distill.tail: sampled needs sampled tokens, and {selection.folder} keeps a plain top k "
            "(generate.support: topk): use distill.tail=auto, or generate with generate.support=sampled"
        )


def _mixture(settings: Distill) -> float | None:
    """beta or alpha, where the objective has one."""
    if settings.objective == "jsd":
        return settings.beta
    return settings.alpha if settings.objective.startswith("skew_") else None


def _opened_scored(selection: Selection, path: Path | None, store: str | Path | None) -> Selection:
    """The scored references that `sft` learns."""
    if path is None:
        raise UserError("distill.objective: sft learns the scored references: pass --scored (out of the stage score)")
    scored = Selection(path, store)
    scored.require_same_teacher(selection)
    if "references" not in scored.parts:
        raise UserError(f"{path} holds no references: do the training prompts have any?")
    return scored


def _rows(settings: Distill, selection: Selection, scored: Selection | None) -> dict[str, TeacherRows]:
    """The responses to learn and to validate on: the teacher's samples, or the references that were scored."""
    topk = settings.objective not in TOKEN_OBJECTIVES
    if scored is None:
        parts = [name for name in ("train", "validation") if name in selection.parts]
        rows = {name: TeacherRows(selection, name, topk, text=False) for name in parts}
        if not len(rows.get("train", ())):
            raise UserError(f"{selection.folder} holds no training responses")
        return rows
    rows = {"train": TeacherRows(scored, "references", topk, text=False)}
    held_out = TeacherRows(selection, "scored", topk, "reference", text=False) if "scored" in selection.parts else ()
    return rows | ({"validation": held_out} if len(held_out) else {})


def _require_vocabulary(size: int, rows: dict[str, TeacherRows], student: Path) -> None:
    """Raises UserError where a response has a token that the student cannot say.

    The teacher's top k may have such tokens: the padding of a larger embedding counts to the tail.
    """
    for part in rows.values():
        if found := part.beyond(size):
            row, highest = found
            raise UserError(
                f"row {row.key} (prompt '{row.prompt_id}') has token {highest}, and the student {student} has {size} "
                "embeddings: use a student whose vocabulary is as large as the teacher's"
            )


def _learner(
    settings: Distill, student, posterior: RewardPosterior | None, inputs: RewardInputs, sampled: bool
) -> StudentLearner:
    on_tokens = settings.objective in TOKEN_OBJECTIVES
    tail = _usual_tail(sampled) if settings.tail == "auto" else settings.tail
    return StudentLearner(
        student,
        None if on_tokens else sparse_divergence(settings.objective, _mixture(settings) or 0.0, tail),
        nll_weight=settings.nll_weight + on_tokens,
        td=None if settings.reward == "none" else settings.td,
        reward="given" if settings.reward in ("frozen", "shuffled") else settings.reward,
        posterior=posterior,
        lam=settings.lam,
        kl_weight=settings.kl_weight,
        phi_kl=inputs.phi_kl,
        scale=inputs.scale,
        offset=inputs.offset,
        chunk=settings.chunk,
        **settings.residual.model_dump(),
    )


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
    found = {f"heldout_{name}": value for name, value in kept.items() if name != "step"}
    if settings.best:
        found["best_step"] = kept["step"]
    return found | {"train_loss": training[-1]["loss"]} if training else found


def _card(settings: Distill, selection: Selection, metrics: dict, started_from: str, sampled: bool) -> str:
    teacher, k = selection.teacher, selection.k
    kept = f"{k} sampled tokens" if sampled else f"top {k} tokens"
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
        "Held out, in nats a token where it is a loss:",
        "",
        *(f"- {name}: {value:.4g}" for name, value in metrics.items() if isinstance(value, float)),
    ]
    return "\n".join(lines) + "\n"

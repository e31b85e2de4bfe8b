"""Score models side by side on the test prompts: quality greedy and sampled, diversity, divergence from the teacher."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from pipeline import console
from pipeline.engines.hf import HfEngine
from pipeline.errors import UserError
from pipeline.learning.closeness import HeldOut, LogitSource, live_teacher
from pipeline.learning.forward import head_is_not_plain
from pipeline.models import (
    best_device,
    load_lm,
    load_tokenizer,
    local_folder,
    require_context,
    require_same_tokenizer,
    resolve,
    source_of,
    stop_token_ids,
)
from pipeline.outputs import begin_results, require_own_results
from pipeline.params import Params
from pipeline.prompts import Prompt, PromptFormat, read_prompts
from pipeline.provenance import fingerprint
from pipeline.results import CUT_WARNING, KL_NAMES, headline_kl, headline_metric, write_metrics, write_results
from pipeline.store.kept_mass import KeptMass, kept_mass_warning, say_kept_mass
from pipeline.store.selection import Selection
from pipeline.tasks import get_task
from pipeline.tasks.intervals import say_interval
from pipeline.tasks.metrics import Metric
from stages.evaluate.answers import Asking, cached_answers
from stages.evaluate.scores import Outcome, lengths, scores


def evaluate(
    params: Params,
    prompts_path: Path,
    models: Mapping[str, str | Path],
    selection_path: Path,
    out: Path,
    store: str | Path | None = None,
    answers_path: Path | None = None,
) -> dict:
    """Write metrics.json, results.json, quality.csv and predictions.parquet to `out`; returns the results.

    models: name -> folder; the last one is compared with each of the others. The teacher's own answers, if it is one
    of them, are read from the selection `answers_path`; without it the teacher is asked like any other model.
    """
    require_own_results(out, "evaluate")
    task = get_task(params.prepare.task, params.evaluate.stemmer)
    prompts = [prompt for prompt in read_prompts(prompts_path, ("test",)) if prompt.references]
    if not prompts:
        raise UserError(f"{prompts_path} has no test prompts with references")
    selection = Selection(selection_path, store)
    answered = None if answers_path is None else Selection(answers_path, store)
    rows = []
    if "validation" in selection.parts and selection.support:
        rows = list(selection.rows("validation"))
    teacher = live_teacher(params.generate, selection, params.evaluate.kl) if rows else None
    held_out = HeldOut(rows, teacher, params.evaluate.batch_size)
    outcomes = {}
    for name, path in models.items():
        is_teacher = _is_teacher(path, params)
        if is_teacher and answered is None:
            console.warn(f"{name} is asked for its answers: with --answers, those that generate keeps are read")
        if is_teacher and answered is not None:
            answered.require_same_teacher(selection)
            outcomes[name] = _of_the_teacher(answered, prompts, held_out, params)
        else:
            outcomes[name] = _of(name, path, prompts, held_out, selection.teacher["tokenizer"], params)

    candidate, references = list(models)[-1], [prompt.references for prompt in prompts]
    metrics, differences = scores(task.metrics, outcomes, prompts, params.evaluate, params.seed, candidate)
    results = {
        "metrics": metrics,
        "differences": differences,
        "candidate": candidate,
        "kl": ("live" if teacher else "cache") if rows else None,
        "kept_mass": KeptMass.of(rows).describe(selection.k, selection.support) if rows else None,
        "answers": {name: lengths(outcome.answers) for name, outcome in outcomes.items()},
        "parameters": {name: outcome.parameters for name, outcome in outcomes.items()},
        "sources": {name: source_of(path) for name, path in models.items()},
        "counts": {"test": len(prompts), "heldout": len({row.prompt_id for row in rows})},
        "checked": task.checked,
        "higher_is_better": {metric.name: metric.higher_is_better for metric in task.metrics},
        "signatures": {metric.name: metric.signature(references) for metric in task.metrics},
    }
    begin_results(out, "evaluate")
    write_metrics(out / "metrics.json", results)
    results = write_results(
        out / "results.json", "evaluate", results,
        task={"name": task.name, "version": task.version}, seed=params.seed, evaluate=params.evaluate.model_dump(),
        models={name: outcome.identity for name, outcome in outcomes.items()}, prompts=fingerprint(prompts_path),
        teacher=selection.teacher["identity"], date=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    _write_quality(out / "quality.csv", metrics)
    _write_predictions(out / "predictions.parquet", outcomes, prompts, task.metrics[0])
    _report(results, out)
    _warn(results, params)
    return results


def _is_teacher(path: str | Path, params: Params) -> bool:
    """Whether a model is the one that `generate.teacher` names."""
    places = [resolve(source) for source in (path, params.generate.teacher)]
    first, second = (str(Path(place).resolve()) if Path(place).is_dir() else str(place) for place in places)
    return first == second


def _of_the_teacher(answered: Selection, prompts: Sequence[Prompt], held_out: HeldOut, params: Params) -> Outcome:
    """The teacher, from its cached answers: no token is drawn from it."""
    parameters = held_out.teacher.model.num_parameters() if held_out.teacher else None
    answers = cached_answers(answered, params, prompts)
    return Outcome(answers, *held_out.of_the_teacher(), parameters, answered.teacher["identity"])


def _of(
    name: str, path: str | Path, prompts: Sequence[Prompt], held_out: HeldOut, tokenizer_identity: str, params: Params
) -> Outcome:
    """A model that is asked: greedy answers to all prompts, several samples of the first ones, and its closeness."""
    settings, tokenizer = params.evaluate, load_tokenizer(path)
    if held_out.rows:
        require_same_tokenizer(tokenizer_identity, tokenizer, path)
    model = load_lm(path).to(best_device())
    what = f"the model {path}"
    source = LogitSource(model, what) if held_out.rows else None
    if source and not source.plain:
        raise head_is_not_plain(model, what)
    ids = PromptFormat.of(params).encode(tokenizer, prompts)
    own = held_out.prompts if held_out.teacher else {}
    lengths = [(len(prompt), params.max_tokens) for prompt in [*ids, *own.values()]]
    lengths += [(len(row.prompt_ids), len(row.response_ids)) for row in held_out.rows]
    require_context(model.config, lengths, what)
    asking = Asking(HfEngine(model, settings.batch_size), tokenizer, params, stop_token_ids(path, tokenizer))
    answers = asking.answers(prompts, ids, name)
    measures = held_out.of(source) if source else {}
    on_own = held_out.of_own_samples(source, asking.samples(own, name)) if own else {}
    return Outcome(answers, measures, on_own, model.num_parameters(), fingerprint(local_folder(path)))


def _write_quality(path: Path, metrics: dict) -> None:
    """One line per model, mode and metric, for plots."""
    rows = [
        {"measure": f"{mode} {metric}: {name}", "mode": mode, "metric": metric, "model": name, **interval}
        for name, modes in metrics.items()
        for mode in ("greedy", "sampled")
        for metric, interval in modes[mode].items()
    ]
    pl.DataFrame(rows).write_csv(path, float_precision=3)


def _write_predictions(path: Path, outcomes: Mapping[str, Outcome], prompts: Sequence[Prompt], metric: Metric) -> None:
    """Every answer with its prompt and references, and its own score by `metric`: plain columns, for reading."""
    rows = []
    for name, outcome in outcomes.items():
        answers = [("greedy", i, 0, answer) for i, answer in enumerate(outcome.answers.greedy)]
        answers += [("sampled", i, s, answer) for i, several in enumerate(outcome.answers.sampled)
                    for s, answer in enumerate(several)]  # fmt: skip
        for mode, i, sample, answer in answers:
            prompt = prompts[i]
            rows.append(
                {"model": name, "mode": mode, "prompt_id": prompt.id, "sample": sample, "prompt": prompt.prompt,
                 "response": answer.text, "score": metric([answer.text], [prompt.references]), "tokens": answer.tokens,
                 "cut": answer.cut, "references": list(prompt.references)}
            )  # fmt: skip
    pl.DataFrame(rows).write_parquet(path)


def _report(results: dict, out: Path) -> None:
    metrics, candidate = results["metrics"], results["candidate"]
    headline = headline_metric(results)
    measure, _ = headline_kl(metrics[candidate])

    def both(modes: dict) -> tuple[str, str]:
        return say_interval(modes["greedy"][headline]), say_interval(modes["sampled"][headline])

    kls = {name: headline_kl(modes)[1] for name, modes in metrics.items()}
    said = {name: say_interval(kl, ".3f") if kl else "-" for name, kl in kls.items()}
    console.table(
        f"{headline} on the test prompts; {KL_NAMES[measure]} on held-out samples of the teacher, nats per token",
        ("model", "greedy", "sampled", "KL"),
        [(name, *both(modes), said[name]) for name, modes in metrics.items()],
    )
    measures = [
        (mode, name) for mode in ("heldout", "own") for name in KL_NAMES if name in metrics[candidate].get(mode, {})
    ]
    if measures:
        places = {"heldout": "the teacher's samples", "own": "its own samples"}
        rows = [
            (KL_NAMES[name], places[mode], *(f"{modes[mode][name]['value']:.3f}" for modes in metrics.values()))
            for mode, name in measures
        ]
        title = "divergence from the teacher on held-out prompts, nats per token"
        console.table(title, ("measure", "on", *metrics), rows)
    diversities = {name: modes["diversity"] for name, modes in metrics.items()}
    rows = [
        (name, f"{d['distinct_1']:.2f}", f"{d['distinct_2']:.2f}", f"{d['self_bleu']:.1f}")
        for name, d in diversities.items()
    ]
    console.table("diversity of the sampled answers", ("model", "distinct-1", "distinct-2", "Self-BLEU"), rows)
    if differences := results["differences"]:
        title = f"{headline} of {candidate} minus that of (paired over prompts, 95 % intervals)"
        rows = [(name, *both(modes)) for name, modes in differences.items()]
        console.table(title, ("model", "greedy", "sampled"), rows)
    facts = list(results["signatures"].items())
    if kept := results["kept_mass"]:
        facts.append(("kept mass", say_kept_mass(kept)))
    files = {"metrics": "metrics.json", "results": "results.json", "answers": "predictions.parquet"}
    console.facts("evaluated", [*facts, *((name, out / file) for name, file in files.items())])


def _warn(results: dict, params: Params) -> None:
    """Warn of what makes the numbers less than they seem."""
    cut = {name: modes["greedy"]["cut"] for name, modes in results["answers"].items()}
    if many := {name: share for name, share in cut.items() if share > CUT_WARNING}:
        shares = ", ".join(f"{share:.0%} of {name}" for name, share in many.items())
        console.warn(f"greedy answers were cut at max_tokens ({params.max_tokens}): {shares}")
    if word := kept_mass_warning(results["kept_mass"]):
        console.warn(word)

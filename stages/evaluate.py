"""Score models side by side on the test prompts: quality greedy and sampled, diversity, divergence from the teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from pipeline import console
from pipeline.errors import UserError
from pipeline.models import (
    best_device,
    load_lm,
    load_tokenizer,
    local_folder,
    require_context,
    require_same_tokenizer,
    stop_token_ids,
)
from pipeline.outputs import begin_results, require_own_results
from pipeline.params import Evaluate, Params
from pipeline.prompts import Prompt, PromptFormat, read_prompts
from pipeline.provenance import fingerprint, git_commit, seconds_since_start, versions
from pipeline.shards.files import digest, write_json_atomically
from pipeline.shards.identity import Sampling, sample_seed
from pipeline.shards.schema import Row
from pipeline.shards.selection import Selection
from pipeline.tasks import get_task
from pipeline.tasks.diversity import distinct_n, self_bleu
from pipeline.teachers import Ask
from pipeline.teachers.base import needed
from pipeline.teachers.hf import HfEngine
from stages.bootstrap import intervals, say_interval
from stages.objectives.sparse import sparse_divergence
from stages.rows import per_response
from stages.students import require_plain_head, score_tokens


@dataclass(frozen=True)
class Outputs:
    """What one model said."""

    greedy: list[str]  # [test prompts]
    sampled: list[list[str]]  # [sampled prompts][samples]
    kl: np.ndarray  # [held-out prompts, 2]: sum of KL(T || S) over the tokens, number of tokens


def evaluate(
    params: Params,
    prompts_path: Path,
    models: Mapping[str, str | Path],
    selection_path: Path,
    out: Path,
    store: str | Path | None = None,
) -> dict:
    """Write metrics.json, results.json, quality.csv and predictions.parquet to `out`; returns the results.

    models: name -> folder; the last one is compared with each of the others.
    """
    require_own_results(out, "evaluate")
    settings, task = params.evaluate, get_task(params.prepare.task)
    prompts = [prompt for prompt in read_prompts(prompts_path, ("test",)) if prompt.references]
    if not prompts:
        raise UserError(f"{prompts_path} has no test prompts with references")
    selection = Selection(selection_path, store)
    has_teacher = "validation" in selection.parts and selection.manifest["k"] > 0
    rows = list(selection.rows("validation")) if has_teacher else []
    outputs = {
        name: _run(name, path, prompts, rows, selection.teacher["tokenizer"], params) for name, path in models.items()
    }

    candidate = list(models)[-1]
    metrics, differences = _scores(task.metrics, outputs, prompts, settings, params.seed, candidate)
    provenance = {
        "stage": "evaluate",
        "task": {"name": task.name, "version": task.version},
        "seed": params.seed,
        "evaluate": settings.model_dump(),
        "models": {name: fingerprint(local_folder(path)) for name, path in models.items()},
        "prompts": fingerprint(prompts_path),
        "teacher": selection.teacher["identity"],
        "git_commit": git_commit(),
        "versions": versions(),
    }
    results = {
        "metrics": metrics,
        "differences": differences,
        "candidate": candidate,
        "counts": {"test": len(prompts), "heldout": len({row.prompt_id for row in rows})},
        "higher_is_better": {metric.name: metric.higher_is_better for metric in task.metrics},
        "cost": {"seconds": seconds_since_start()},
        "provenance": provenance,
    }
    begin_results(out, "evaluate")
    write_json_atomically(out / "metrics.json", _headline(metrics, task.metrics[0].name))
    write_json_atomically(out / "results.json", results)
    _write_quality(out / "quality.csv", metrics)
    _write_predictions(out / "predictions.parquet", outputs, prompts)
    _report(results, task.metrics[0].name, out)
    return results


def _run(
    name: str, path: str | Path, prompts: Sequence[Prompt], rows: Sequence[Row], teacher: str, params: Params
) -> Outputs:
    """Greedy answers to all prompts, several samples of the first ones, and the divergence on held-out samples."""
    settings, tokenizer = params.evaluate, load_tokenizer(path)
    if rows:
        require_same_tokenizer(teacher, tokenizer, path)
    model = load_lm(path).to(best_device())
    if rows:
        require_plain_head(model, f"the model {path}")
    engine = HfEngine(model, settings.batch_size)
    stops = stop_token_ids(path, tokenizer)
    ids = PromptFormat.of(params).encode(tokenizer, prompts)
    lengths = [(len(prompt), params.max_tokens) for prompt in ids]
    lengths += [(len(row.prompt_ids), len(row.response_ids)) for row in rows]
    require_context(model.config, lengths, f"the model {path}")
    first = range(min(settings.sampled_prompts, len(prompts)))
    asks = [Ask(f"greedy/{i}", ids[i]) for i in range(len(prompts))]
    drawn = [
        Ask(f"{i}/{sample}", ids[i], sample_seed(digest([params.seed, prompts[i].id, sample])))
        for i in first
        for sample in range(settings.samples)
    ]
    texts: dict[str, str] = {}
    with console.progress(f"answers of {name}", len(asks) + len(drawn)) as advance:
        for batch, temperature in ((asks, 0.0), (drawn, settings.temperature)):
            sampling = Sampling(temperature, 1.0, params.max_tokens, stops)
            for answer in needed(engine.sample(batch, sampling, k=1), f"the model {path}"):
                texts[answer.key] = tokenizer.decode(answer.response_ids, skip_special_tokens=True)
                advance()
    return Outputs(
        [texts[f"greedy/{i}"] for i in range(len(prompts))],
        [[texts[f"{i}/{sample}"] for sample in range(settings.samples)] for i in first],
        _kl_to_teacher(model, rows, settings.batch_size),
    )


def _kl_to_teacher(model, rows: Sequence[Row], batch_size: int) -> np.ndarray:
    """KL(T || S) on cached responses (top k and one tail: a lower bound), [prompts with tokens, 2] of sum and count."""
    kl = sparse_divergence("fkl")
    sums = {row.prompt_id: np.zeros(2) for row in rows}
    found = per_response(rows, lambda b: [score_tokens(model, b, kl).divergence], model.device, True, batch_size)
    for row, (values,) in found:
        sums[row.prompt_id] += (values.sum(dtype=np.float64), len(values))
    return np.array([value for value in sums.values() if value[1]]).reshape(-1, 2)


def _scores(task_metrics, outputs: Mapping[str, Outputs], prompts, settings: Evaluate, seed: int, candidate: str):
    """Nested metrics: model -> mode -> metric -> value and interval; and the candidate's paired differences."""
    metrics: dict[str, dict] = {name: {"greedy": {}, "sampled": {}} for name in outputs}
    differences: dict[str, dict] = {name: {"greedy": {}, "sampled": {}} for name in outputs if name != candidate}
    references = [prompt.references for prompt in prompts]

    def add(mode: str, metric: str, statistics: dict[str, np.ndarray], score) -> None:
        scores, differing = intervals(statistics, score, settings.bootstrap, seed, candidate)
        for name in outputs:
            metrics[name].setdefault(mode, {})[metric] = scores[name]
        for name, difference in differing.items():
            differences[name].setdefault(mode, {})[metric] = difference

    for metric in task_metrics:
        add(
            "greedy",
            metric.name,
            {n: metric.statistics(o.greedy, references) for n, o in outputs.items()},
            metric.score,
        )
        sampled = {name: metric.pooled(o.sampled, references[: len(o.sampled)]) for name, o in outputs.items()}
        add("sampled", metric.name, sampled, metric.score)
    if all(len(o.kl) for o in outputs.values()):
        add("heldout", "kl_to_teacher", {n: o.kl for n, o in outputs.items()}, lambda mean: float(mean[0] / mean[1]))
    for name, o in outputs.items():
        metrics[name]["diversity"] = {
            "distinct_1": distinct_n(o.sampled, 1),
            "distinct_2": distinct_n(o.sampled, 2),
            "self_bleu": self_bleu(o.sampled),
        }
    return metrics, differences


def _headline(metrics: dict, headline: str) -> dict[str, dict[str, float]]:
    """The few numbers that `dvc metrics` shows; all are in results.json, with intervals."""
    shown = {}
    for name, modes in metrics.items():
        shown[name] = {headline: modes["greedy"][headline]["value"]}
        shown[name][f"sampled_{headline}"] = modes["sampled"][headline]["value"]
        if "heldout" in modes:
            shown[name]["kl"] = modes["heldout"]["kl_to_teacher"]["value"]
    return shown


def _write_quality(path: Path, metrics: dict) -> None:
    """One line a model, mode and metric, for plots."""
    rows = [
        {"measure": f"{mode} {metric}: {name}", "mode": mode, "metric": metric, "model": name, **interval}
        for name, modes in metrics.items()
        for mode in ("greedy", "sampled")
        for metric, interval in modes[mode].items()
    ]
    pl.DataFrame(rows).write_csv(path, float_precision=3)


def _write_predictions(path: Path, outputs: Mapping[str, Outputs], prompts: Sequence[Prompt]) -> None:
    """Every answer with its prompt and references: plain columns, for reading."""
    rows = []
    for name, o in outputs.items():
        answers = [("greedy", i, 0, text) for i, text in enumerate(o.greedy)]
        answers += [("sampled", i, s, text) for i, texts in enumerate(o.sampled) for s, text in enumerate(texts)]
        for mode, i, sample, text in answers:
            prompt = prompts[i]
            rows.append(
                {"model": name, "mode": mode, "prompt_id": prompt.id, "sample": sample, "prompt": prompt.prompt,
                 "response": text, "references": list(prompt.references)}
            )  # fmt: skip
    pl.DataFrame(rows).write_parquet(path)


def _report(results: dict, headline: str, out: Path) -> None:
    metrics, candidate = results["metrics"], results["candidate"]

    console.table(
        f"{headline} on the test prompts, KL(teacher || model) on held-out samples",
        ("model", "greedy", "sampled", "KL, nats a token"),
        [
            (
                name, say_interval(modes["greedy"][headline]), say_interval(modes["sampled"][headline]),
                say_interval(modes["heldout"]["kl_to_teacher"], ".3f") if "heldout" in modes else "-",
            )
            for name, modes in metrics.items()
        ],
    )  # fmt: skip
    console.table(
        "diversity of the sampled answers",
        ("model", "distinct-1", "distinct-2", "Self-BLEU"),
        [
            (name, f"{d['distinct_1']:.2f}", f"{d['distinct_2']:.2f}", f"{d['self_bleu']:.1f}")
            for name, d in ((name, modes["diversity"]) for name, modes in metrics.items())
        ],
    )
    console.table(
        f"{headline} of {candidate} minus that of (paired over prompts, 95 % intervals)",
        ("model", "greedy", "sampled"),
        [
            (name, say_interval(d["greedy"][headline]), say_interval(d["sampled"][headline]))
            for name, d in results["differences"].items()
        ],
    )
    console.facts(
        "evaluated",
        [
            ("metrics", out / "metrics.json"),
            ("results", out / "results.json"),
            ("answers", out / "predictions.parquet"),
        ],
    )

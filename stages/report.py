"""One page about one experiment: quality, curves, the reward on its tokens, samples, costs, provenance."""

import json
from pathlib import Path

import polars as pl

from pipeline import console
from pipeline.errors import UserError, in_one_line
from pipeline.outputs import require_own_file
from pipeline.params import Report
from pipeline.shards.files import write_atomically
from stages.bootstrap import say_interval
from stages.reporting import figures
from stages.reporting.curves import curve_of
from stages.reporting.page import GENERATOR, Block, Card, Figure, Sample, Section, Table, render_page
from stages.reporting.results import Asking, Audit, Distill, read_evaluation, read_results
from stages.reporting.reward import reward_section

_KL = "KL(teacher ‖ model) on held-out teacher samples, nats a token, over the top k and the rest (a lower bound)"
# What is read beside the evaluation: the results of each folder, and the stage that writes them.
_KINDS = {
    "distill": (Distill, "distill"), "audit": (Audit, "reward"), "generate": (Asking, "generate"),
    "score": (Asking, "score"),
}  # fmt: skip


def report(settings: Report, data: Path, out: Path, store: str | Path | None = None) -> None:
    """Write the page `out` from the folder `data` that the stages filled.

    What a stage has not written is left out and named. Raises UserError where not even an evaluation is there.
    """
    require_own_file(out, _is_report)
    if not (data / "evaluation" / "results.json").is_file():
        raise UserError(f"no evaluation at {data / 'evaluation'}: run `xkd-pipeline evaluate` (or `dvc repro`) first")
    found = {"evaluation": read_evaluation(data / "evaluation" / "results.json")}
    for name, (kind, stage) in _KINDS.items():
        path = data / name / "results.json"
        found[name] = read_results(path, kind, stage) if path.is_file() else {}
    sections = [
        _quality(found["evaluation"]),
        _diversity(found["evaluation"]),
        _training(found["distill"], data / "distill"),
        reward_section(found["audit"], data, store, settings.rewarded_prompts),
        _samples(data / "evaluation" / "predictions.parquet", found["evaluation"], settings.samples),
        _costs(found),
        _provenance(found, data),
    ]
    absent = [name for name, results in found.items() if not results]
    if absent:
        console.warn(f"left out of the report, no results in {data}: {', '.join(absent)}")
    objective = found["distill"].get("objective", "student")
    task = found["evaluation"]["provenance"]["task"]["name"]
    page = render_page(
        f"{task}: {objective}",
        _subtitle(found),
        _cards(found),
        [section for section in sections if section],
    )
    write_atomically(out.parent, lambda path: path.write_text(page, encoding="utf-8"), out.name)
    console.facts("report written", [("page", out), ("size", f"{out.stat().st_size / 1024:,.0f} KiB")])


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(4096)


def _headline(evaluation: dict) -> str:
    return next(iter(evaluation["higher_is_better"]))


def _subtitle(found: dict) -> str:
    evaluation = found["evaluation"]
    teacher = found["generate"].get("provenance", {}).get("teacher", {})
    name = teacher.get("name") or "a local model"
    counts = evaluation.get("counts", {})
    test = f"{counts['test']:,} test prompts, " if counts else ""
    return f"Teacher: {name} ({evaluation['provenance']['teacher']}). {test}95 % intervals over prompts."


def _cards(found: dict) -> list[Card]:
    evaluation = found["evaluation"]
    metric, metrics = _headline(evaluation), evaluation["metrics"]
    cards = [Card(f"{modes['greedy'][metric]['value']:.1f}", f"{metric}, {name}") for name, modes in metrics.items()]
    kls = {name: modes["heldout"]["kl_to_teacher"]["value"] for name, modes in metrics.items() if "heldout" in modes}
    if "undistilled" in kls and "distilled" in kls:
        cards.append(Card(f"{kls['undistilled']:.2f} → {kls['distilled']:.2f}", "KL to the teacher, nats a token"))
    if cost := found["generate"].get("cost"):
        cards.append(Card(f"{cost['tokens_selected']:,}", "cached teacher tokens"))
    return cards


def _quality(evaluation: dict) -> Section:
    metrics, names = evaluation["metrics"], list(evaluation["higher_is_better"])
    section = Section("quality", "Quality", [f"KL: {_KL}."])
    columns = ["model", *names, f"{names[0]}, sampled", "KL"]
    title = "Scores on the test prompts, greedy unless said otherwise"
    scores = [[model, *_scores(modes, names)] for model, modes in metrics.items()]
    section.tables.append(Table(columns, scores, title))
    if evaluation.get("differences"):
        title = f"{evaluation['candidate']} minus the others, paired over prompts"
        differences = [
            [f"− {model}", *_scores(modes, names, "+")] for model, modes in evaluation["differences"].items()
        ]
        section.tables.append(Table(columns, differences, title))
    drawn = {model: modes["greedy"][names[0]] for model, modes in metrics.items()}
    section.figures.append(Figure(figures.intervals(drawn, f"{names[0]}, greedy"), f"{names[0]} of the greedy answers"))
    kls = {model: modes["heldout"]["kl_to_teacher"] for model, modes in metrics.items() if "heldout" in modes}
    if kls:
        section.figures.append(Figure(figures.intervals(kls, "nats a token"), "KL(teacher ‖ model)"))
    return section


def _scores(modes: dict, names: list[str], sign: str = "") -> list[str]:
    """Cells of one model, or of one difference: all metrics greedy, the headline sampled, KL."""
    kl = modes.get("heldout", {}).get("kl_to_teacher")
    return [
        *(say_interval(modes["greedy"][name], sign=sign) for name in names),
        say_interval(modes["sampled"][names[0]], sign=sign),
        say_interval(kl, ".3f", sign) if kl else "-",
    ]


def _diversity(evaluation: dict) -> Section:
    metrics, metric = evaluation["metrics"], _headline(evaluation)
    section = Section(
        "diversity",
        "Quality and diversity",
        ["Of several sampled answers to each prompt. Lower Self-BLEU and higher distinct-n mean more diverse."],
    )
    section.tables.append(
        Table(
            ["model", f"{metric}, sampled", "distinct-1", "distinct-2", "Self-BLEU"],
            [
                [
                    model,
                    say_interval(modes["sampled"][metric]),
                    *(f"{modes['diversity'][name]:.2f}" for name in ("distinct_1", "distinct_2")),
                    f"{modes['diversity']['self_bleu']:.1f}",
                ]
                for model, modes in metrics.items()
            ],
        )
    )
    points = {
        model: (modes["diversity"]["self_bleu"], modes["sampled"][metric]["value"]) for model, modes in metrics.items()
    }
    caption = f"{metric} of sampled answers against their Self-BLEU: up and to the left is better"
    section.figures.append(Figure(figures.trade_off(points, "Self-BLEU", f"{metric}, sampled"), caption))
    return section


def _training(distill: dict, folder: Path) -> Section | None:
    if not distill:
        return None
    section = Section("training", "Distillation", [f"{distill['samples']:,} cached responses, {distill['objective']}."])
    curves = {name: curve_of(folder / f"{name}.csv") for name in ("training", "heldout")}
    for term, caption in (
        ("kd", "Distillation loss"),
        ("nll", "Negative log-likelihood of the teacher's tokens"),
        ("td_nll", "TD consistency, −log N(δ/c; μ, σ²)"),
    ):
        drawn = {
            name.replace("heldout", "held out"): (curve["step"], curve[term])
            for name, curve in curves.items()
            if term in curve
        }
        if drawn:
            section.figures.append(Figure(figures.lines(drawn, "step", "nats"), caption))
    return section


def _samples(path: Path, evaluation: dict, count: int) -> Section | None:
    if not path.is_file() or not count:
        return None
    with in_one_line(f"{path} holds no answers of `xkd-pipeline evaluate`"):
        columns = ["prompt_id", "prompt", "references", "model", "response"]
        frame = pl.read_parquet(path).filter(pl.col("mode") == "greedy").select(columns)
    section = Section("samples", "Answers side by side", [f"The first {count} test prompts, greedy."])
    for group in frame.partition_by("prompt_id", maintain_order=True)[:count]:
        rows = group.to_dicts()
        answers = [("reference", rows[0]["references"][0]), *((row["model"], row["response"]) for row in rows)]
        section.samples.append(Sample(rows[0]["prompt"], answers))
    return section


def _costs(found: dict[str, dict]) -> Section | None:
    section = Section("costs", "Cache and cost")
    if cost := found["generate"].get("cost"):
        speed = f"{cost['tokens_per_second']:,.0f}" if cost["tokens_per_second"] else "- (all cached)"
        section.tables.append(
            Table(
                ["teacher cache", ""],
                [
                    ["rows found in the store", f"{cost['rows_found']:,}"],
                    ["rows made by this run", f"{cost['rows_made']:,}"],
                    ["rows left out", f"{cost['rows_left_out']:,}"],
                    ["tokens in this selection", f"{cost['tokens_selected']:,}"],
                    ["tokens made by this run", f"{cost['tokens_made']:,}"],
                    ["tokens a second, without loading", speed],
                    ["bytes a token in the store", f"{cost['bytes_per_token'] or 0:,.0f}"],
                    ["size of these requests in the store", f"{cost['store_bytes'] / 2**20:,.1f} MiB"],
                ],
            )
        )
    times = {
        {"audit": "reward", "evaluation": "evaluate"}.get(name, name): results["cost"]
        for name, results in found.items()
        if "cost" in results
    }
    order = [stage for stage in ("generate", "score", "reward", "distill", "evaluate") if stage in times]
    rows = [[stage, f"{times[stage]['seconds']:,.0f}"] for stage in order]
    if first := times.get("distill", {}).get("seconds_to_first_step"):
        rows.append(["distill, from its start to the first step", f"{first:,.1f}"])
    section.tables.append(Table(["stage", "seconds"], rows))
    return section


def _provenance(found: dict[str, dict], data: Path) -> Section:
    section = Section("provenance", "Provenance")
    path = data / "prompts" / "counts.json"
    if path.is_file():
        counts = read_results(path, dict[str, dict[str, int]], "prepare")
        section.tables.append(
            Table(
                ["split", "kept", "left out"],
                [
                    [
                        split, f"{reasons.get('kept', 0):,}",
                        ", ".join(f"{n:,} {why}" for why, n in reasons.items() if why != "kept") or "none",
                    ]
                    for split, reasons in counts.items()
                    if reasons
                ],
            )
        )  # fmt: skip
    for name, results in found.items():
        if results:
            text = json.dumps(results["provenance"], indent=2, ensure_ascii=False)
            section.blocks.append(Block(f"{name}: inputs, parameters, versions", text))
    return section

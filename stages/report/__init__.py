"""One page about one experiment: quality, curves, the reward on its tokens, samples, costs, provenance."""

from collections.abc import Sequence
from pathlib import Path

from pipeline import console
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.layout import RESULTS, Layout, sibling
from pipeline.outputs import require_own_file
from pipeline.params import Report
from pipeline.results import KL_NAMES, headline_kl, headline_metric
from stages.report import figures
from stages.report.answered import answers
from stages.report.experiments import Experiment, differ, read_experiments
from stages.report.own_samples import own_samples
from stages.report.page import GENERATOR, Figure, Section, render_page
from stages.report.quality import beside, closeness, diversity, quality
from stages.report.results import Asking, Audit, Distill, Made, Prepared, read_curve, read_evaluation, read_results
from stages.report.reward_section import reward_section
from stages.report.setting import costs, glossary, provenance, setting

# What is read beside the evaluation: its name on the page, and the stage that writes it.
_KINDS = {
    "distill": (Distill, "distill"), "plain-metrics": (Distill, "distill"), "audit": (Audit, "reward"),
    "generate": (Asking, "generate"), "score": (Asking, "score"), "prepare": (Prepared, "prepare"),
    "teach/teacher": (Made, "teach"), "teach/student": (Made, "teach"),
}  # fmt: skip


def report(
    settings: Report, layout: Layout, out: Path, store: str | Path | None = None, also: Sequence[str] = ()
) -> None:
    """Write the page `out` from what the stages left in a layout.

    also: further experiments, whose students are shown beside this one's; names as for `read_experiments`. What a
    stage has not written is left out and named. Raises UserError where there is no evaluation.
    """
    require_own_file(out, _is_report)
    if not (evaluated := layout.results("evaluate")).is_file():
        raise UserError(f"no evaluation at {evaluated.parent}: run `xkd-pipeline evaluate` (or `dvc repro`) first")
    results = {"evaluation": read_evaluation(evaluated)}
    for name, (kind, stage) in _KINDS.items():
        path = layout.results(stage, name.partition("/")[2])
        if name == "plain-metrics":
            path = sibling(layout.plain, "metrics") / RESULTS
        results[name] = read_results(path, kind, stage) if path.is_file() else {}
    objective = results["distill"].get("objective", "student")
    experiments = [Experiment("this one", results["evaluation"], objective), *read_experiments(also, layout)]
    if differ(experiments):
        console.warn("the results beside this one are of other prompts, tasks or teachers: they do not compare")
    sections = [
        setting(results),
        quality(results["evaluation"]),
        beside(experiments),
        closeness(results["evaluation"]),
        diversity(results["evaluation"]),
        _training(results["distill"], layout.distillation),
        own_samples(results),
        reward_section(results["audit"], layout, store, settings.rewarded_prompts),
        answers(layout.predictions, results["evaluation"], settings.samples),
        costs(results),
        glossary(results),
        provenance(results, layout.prompts),
    ]
    absent = [name for name, read in results.items() if not read and name != "plain-metrics"]
    if absent:
        console.warn(f"left out of the report, no results in {layout.data}: {', '.join(absent)}")
    task = results["evaluation"]["provenance"]["task"]["name"]
    page = render_page(f"{task}: {objective}", _subtitle(results), _cards(results), list(filter(None, sections)))
    write_atomically(out.parent, lambda path: path.write_text(page, encoding="utf-8"), out.name)
    console.facts("report written", [("page", out), ("size", f"{out.stat().st_size / 1024:,.0f} KiB")])


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(4096)


def _subtitle(results: dict) -> str:
    evaluation = results["evaluation"]
    teacher = results["generate"].get("provenance", {}).get("teacher", {})
    name = teacher.get("name") or evaluation.get("sources", {}).get("teacher") or "a local model"
    counts = evaluation.get("counts", {})
    test = f"{counts['test']:,} test prompts, " if counts else ""
    date = evaluation["provenance"].get("date", "")[:10]
    return f"Teacher: {name}. {test}95 % intervals over prompts.{date and f' Evaluated on {date}.'}"


def _cards(results: dict) -> list[tuple[str, str]]:
    evaluation = results["evaluation"]
    metric, metrics = headline_metric(evaluation), evaluation["metrics"]
    cards = [(f"{modes['greedy'][metric]['value']:.1f}", f"{metric}, {name}") for name, modes in metrics.items()]
    kls = {name: headline_kl(modes) for name, modes in metrics.items()}
    if all(kls.get(name, (None, None))[1] for name in ("undistilled", "distilled")):
        measure = kls["distilled"][0]
        values = (f"{kls[name][1]['value']:.2f}" for name in ("undistilled", "distilled"))
        cards.append((" → ".join(values), f"{KL_NAMES[measure]}, nats per token"))
    if cost := results["generate"].get("cost"):
        cards.append((f"{cost['tokens_selected']:,}", "cached teacher tokens"))
    return cards


def _training(distill: dict, folder: Path) -> Section | None:
    if not distill:
        return None
    section = Section("training", "Distillation", [f"{distill['samples']:,} cached responses, {distill['objective']}."])
    curves = {"training": read_curve(folder / "training.csv"), "held out": read_curve(folder / "heldout.csv")}
    for term, caption in (
        ("kd", "Distillation loss"),
        ("nll", "Negative log-likelihood of the teacher's tokens"),
        ("td_nll", "TD consistency, −log N(δ/c; μ, σ²)"),
    ):
        drawn = {name: (curve["step"], curve[term]) for name, curve in curves.items() if term in curve}
        if drawn:
            section.figures.append(Figure(figures.lines(drawn, "step", "nats"), caption))
    return section

"""The page's answers side by side: prompts drawn at random, and prompts that the student fails at."""

from pathlib import Path
from random import Random

import polars as pl

from pipeline.errors import in_one_line
from pipeline.results import headline_metric
from stages.report.page import Sample, Section

_COLUMNS = ["prompt_id", "prompt", "references", "model", "response", "score", "cut"]


def answers(path: Path, evaluation: dict, count: int) -> Section | None:
    """Greedy answers to `count` test prompts: half at random, half of those where the candidate scores least."""
    if not path.is_file() or not count:
        return None
    with in_one_line(f"{path} holds no answers of `xkd-pipeline evaluate`"):
        frame = pl.read_parquet(path).filter(pl.col("mode") == "greedy").select(_COLUMNS)
    groups = {group["prompt_id"][0]: group.to_dicts() for group in frame.partition_by("prompt_id", maintain_order=True)}
    candidate, checked = evaluation["candidate"], evaluation.get("checked", False)
    metric, best = headline_metric(evaluation), 100.0
    scores = {
        prompt: next((row["score"] for row in rows if row["model"] == candidate), best)
        for prompt, rows in groups.items()
    }
    order = list(groups)
    Random(0).shuffle(order)  # the same prompts whenever the page is written
    at_random = order[: (count + 1) // 2]
    rest = [prompt for prompt in order if prompt not in at_random and scores[prompt] < best]
    failures = sorted(rest, key=scores.get)[: count // 2]
    section = Section("samples", "Answers side by side", ["Greedy."])
    for prompts, what in ((at_random, "drawn at random"), (failures, f"{candidate} fails, or does worst")):
        for prompt in prompts:
            rows = groups[prompt]
            shown = [("reference", text, "") for text in rows[0]["references"]]
            shown += [(row["model"], row["response"], _mark(row, checked, metric)) for row in rows]
            section.samples.append(Sample(rows[0]["prompt"], shown, what))
    return section


def _mark(row: dict, checked: bool, metric: str) -> str:
    """Whether an answer is right, or its own score."""
    mark = ("right" if row["score"] > 0 else "wrong") if checked else f"{metric} {row['score']:.0f}"
    return mark + (", cut" if row["cut"] else "")

"""From answers and per-token sums to metrics, diversity and divergences, with intervals paired over the prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.params import Evaluate
from pipeline.prompts import Prompt
from pipeline.tasks.diversity import distinct_n, self_bleu
from pipeline.tasks.intervals import intervals
from pipeline.tasks.metrics import Metric
from stages.evaluate.answers import Answers


@dataclass(frozen=True)
class Outcome:
    """All that was measured of one model. The sums are [held-out prompts, 2]: over the tokens, and their number."""

    answers: Answers
    heldout: dict[str, np.ndarray]  # measure on the teacher's samples -> sums
    own: dict[str, np.ndarray]  # measure on the model's own samples -> sums; empty without a live teacher
    parameters: int | None
    identity: str


def scores(
    metrics: Sequence[Metric],
    outcomes: Mapping[str, Outcome],
    prompts: Sequence[Prompt],
    settings: Evaluate,
    seed: int,
    candidate: str,
) -> tuple[dict, dict]:
    """model -> mode -> measure -> value and interval; and those of the candidate minus each other model."""
    results: dict[str, dict] = {name: {} for name in outcomes}
    differences: dict[str, dict] = {name: {} for name in outcomes if name != candidate}
    references = [prompt.references for prompt in prompts]

    def add(mode: str, measure: str, statistics: dict[str, np.ndarray], score: Callable) -> None:
        scored, differing = intervals(statistics, score, settings.bootstrap, seed, candidate)
        for name in outcomes:
            results[name].setdefault(mode, {})[measure] = scored[name]
        for name, difference in differing.items():
            differences[name].setdefault(mode, {})[measure] = difference

    greedy = {name: [a.text for a in o.answers.greedy] for name, o in outcomes.items()}
    sampled = {name: [[a.text for a in several] for several in o.answers.sampled] for name, o in outcomes.items()}
    for metric in metrics:
        add("greedy", metric.name, {n: metric.statistics(each, references) for n, each in greedy.items()}, metric.score)
        drawn = {name: metric.pooled(each, references[: len(each)]) for name, each in sampled.items()}
        add("sampled", metric.name, drawn, metric.score)
    for mode in ("heldout", "own"):
        sums = {name: getattr(outcome, mode) for name, outcome in outcomes.items()}
        for measure in next(iter(sums.values())):
            if all(measure in each and len(each[measure]) for each in sums.values()):
                add(mode, measure, {name: each[measure] for name, each in sums.items()}, _mean_of_tokens)
    for name, each in sampled.items():
        distinct = {f"distinct_{n}": distinct_n(each, n) for n in (1, 2)}
        results[name]["diversity"] = {**distinct, "self_bleu": self_bleu(each)}
    return results, differences


def lengths(answers: Answers) -> dict[str, dict[str, float]]:
    """Mean number of tokens and share of the answers that were cut, by mode."""
    modes = {"greedy": answers.greedy, "sampled": [each for several in answers.sampled for each in several]}
    return {
        mode: {"tokens": float(np.mean([a.tokens for a in group])), "cut": float(np.mean([a.cut for a in group]))}
        for mode, group in modes.items()
    }


def _mean_of_tokens(mean: np.ndarray) -> float:
    return float(mean[0] / mean[1])

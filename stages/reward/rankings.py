"""The reward's audit on held-out prompts: what is to be ranked, by which judges, and how well each of them does it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.learning.forward import per_row, score_tokens
from pipeline.learning.posterior import RewardPosterior
from pipeline.models import best_device, load_lm
from pipeline.prompts import Prompt
from pipeline.store.schema import Row
from pipeline.tasks.base import Task

Ranking = list[tuple[Row, bool]]  # responses, and whether each is right; every prompt has both kinds
Judge = Mapping[str, np.ndarray]  # key of a row -> its values [T]


@dataclass(frozen=True)
class Scored:
    """A response with a judge's value at every token."""

    prompt_id: str
    right: bool
    values: np.ndarray  # [T]


def held_out_rankings(
    scored: Sequence[Row], samples: Sequence[Row], prompts: Sequence[Prompt], task: Task
) -> dict[str, Ranking]:
    """What the held-out prompts give to rank, without the kinds that no prompt has both sides of.

    `corrupted`: references over corrupted ones. `samples`: samples of the student that the task's checker accepts over
    those that it does not; for a task without a checker, above over below the prompt's median of its headline metric.
    Equal samples of a prompt are one. Raises UserError where the prompts are not those that were answered.
    """
    rankings = {"corrupted": rankable([(row, row.origin == "reference") for row in scored])}
    by_id = {prompt.id: prompt for prompt in prompts}
    judged: dict[str, list[tuple[Row, float]]] = {}
    for row in samples:
        prompt = by_id.get(row.prompt_id)
        if prompt is None or not prompt.references:
            continue
        if " ".join(prompt.prompt.split()) not in " ".join(row.prompt.split()):  # templates may change the spaces
            raise UserError(
                f"row {row.key} was asked something else than prompt '{prompt.id}' of the prompt file: "
                "run `xkd-pipeline score` again for these prompts"
            )
        value = task.metrics[0]([row.response], [prompt.references])
        judged.setdefault(row.prompt_id, []).append((row, value))
    if task.checked:
        labelled = [(row, value > 0) for responses in judged.values() for row, value in responses]
    else:
        labelled = above_the_median(judged)
    rankings["samples"] = rankable(labelled)
    return {name: ranking for name, ranking in rankings.items() if ranking}


def halves(rankings: Mapping[str, Ranking]) -> tuple[dict[str, Ranking], dict[str, Ranking]]:
    """The rankings of every other prompt, to choose by, and of the others, to report."""
    ids = sorted({row.prompt_id for ranking in rankings.values() for row, _ in ranking})
    sides = []
    for chosen in (set(ids[0::2]), set(ids[1::2])):
        side = {name: [(row, right) for row, right in r if row.prompt_id in chosen] for name, r in rankings.items()}
        sides.append({name: ranking for name, ranking in side.items() if ranking})
    return sides[0], sides[1]


def rows_of(rankings: Mapping[str, Ranking]) -> list[Row]:
    """Every row that is ranked, once."""
    return list({row.key: row for ranking in rankings.values() for row, _ in ranking}.values())


def reward_judge(rows: Sequence[Row], posterior: RewardPosterior) -> Judge:
    """mu of every token."""
    return {row.key: mu for row, (mu, _) in zip(rows, per_row(rows, posterior, posterior.device), strict=True)}


def student_judge(rows: Sequence[Row], student: Path) -> Judge:
    """Log-probabilities by the student's starting point."""
    model = load_lm(student).to(best_device())
    scores = per_row(rows, lambda batch: [score_tokens(model, batch).logprob], model.device)
    return {row.key: values for row, (values,) in zip(rows, scores, strict=True)}


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """Share of (right, wrong) pairs that are ranked correctly; ties count half."""
    ordered = np.sort(wrong)
    below, not_above = np.searchsorted(ordered, right, "left"), np.searchsorted(ordered, right, "right")
    return float((below + not_above).mean() / (2 * len(wrong)))


def rankable(labelled: Sequence[tuple[Row, bool]]) -> list[tuple[Row, bool]]:
    """The responses of prompts that have both right and wrong ones."""
    sides: dict[str, set[bool]] = {}
    for row, right in labelled:
        sides.setdefault(row.prompt_id, set()).add(right)
    return [(row, right) for row, right in labelled if len(sides[row.prompt_id]) == 2]


def above_the_median(values: Mapping[str, Sequence[tuple[Row, float]]]) -> list[tuple[Row, bool]]:
    """Per prompt, whether each response is above the median of its values; those that equal it are left out."""
    labelled = []
    for responses in values.values():
        median = float(np.median([value for _, value in responses]))
        labelled += [(row, value > median) for row, value in responses if value != median]
    return labelled


def audit(examples: Sequence[Scored], resamples: int, seed: int) -> dict[str, dict[str, float]]:
    """AUC of the values' mean and sum over a response, with 95 % intervals by resampling prompts.

    `within_*`: the mean over prompts of the AUC inside a prompt, so that a prompt's difficulty does not count;
    `pooled_*`: over all pairs. Every prompt must have right and wrong responses (see `rankable`).
    """
    prompts: dict[str, tuple[list[Scored], list[Scored]]] = {}
    for example in examples:
        prompts.setdefault(example.prompt_id, ([], []))[0 if example.right else 1].append(example)
    pairs = list(prompts.values())
    picks = np.random.default_rng(seed).integers(len(pairs), size=(resamples, len(pairs)))
    result: dict[str, dict[str, float]] = {}
    for name, aggregate in (("mean", np.mean), ("sum", np.sum)):
        values = [tuple(np.array([aggregate(e.values) for e in side]) for side in pair) for pair in pairs]
        within = np.array([auc(*sides) for sides in values])
        result[f"within_{name}"] = _interval(float(within.mean()), within[picks].mean(axis=1))
        pooled = np.array([_pooled(values, pick) for pick in picks])
        result[f"pooled_{name}"] = _interval(_pooled(values, np.arange(len(pairs))), pooled)
    return result


def _pooled(values: Sequence[tuple[np.ndarray, np.ndarray]], pick: np.ndarray) -> float:
    right, wrong = (np.concatenate([values[i][side] for i in pick]) for side in (0, 1))
    return auc(right, wrong)


def _interval(estimate: float, resampled: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"auc": estimate, "low": float(low), "high": float(high)}


def judge_all(
    rankings: Mapping[str, Ranking], judges: Mapping[str, Judge], resamples: int, seed: int
) -> dict[str, dict[str, dict]]:
    """ranking -> judge -> aggregate -> AUC with its interval."""
    return {
        name: {
            judge: audit([Scored(row.prompt_id, right, values[row.key]) for row, right in ranking], resamples, seed)
            for judge, values in judges.items()
        }
        for name, ranking in rankings.items()
    }


def mean_auc(rankings: Mapping[str, Ranking], judge: Judge) -> float:
    """The AUC within prompts of the mean over tokens, averaged over the rankings: what a reward is chosen by."""
    results = judge_all(rankings, {"": judge}, resamples=1, seed=0)
    return float(np.mean([by_judge[""]["within_mean"]["auc"] for by_judge in results.values()]))

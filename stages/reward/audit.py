"""Does a judge rank right responses over wrong ones? AUC within prompts, bootstrapped by prompt; calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.store.schema import Row


@dataclass(frozen=True)
class Scored:
    """A response with a judge's value at every token."""

    prompt_id: str
    right: bool
    values: np.ndarray  # [T]


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


def calibration(
    posterior: dict[str, tuple[np.ndarray, np.ndarray]],
    delta: dict[str, np.ndarray],
    log_floor: float,
    kept: dict[str, np.ndarray],
) -> dict[str, float]:
    """Shares of held-out residuals inside 1 and 2 sigma, and of sigmas at their floor, over the kept steps."""
    mu, log_sigma, residuals = (
        np.concatenate([values[key][kept[key]] for key in posterior])
        for values in ({k: p[0] for k, p in posterior.items()}, {k: p[1] for k, p in posterior.items()}, delta)
    )
    distance = np.abs(residuals - mu) / np.exp(log_sigma)
    return {
        "inside_1_sigma": float((distance <= 1).mean()),
        "inside_2_sigma": float((distance <= 2).mean()),
        "sigma_at_floor": float((log_sigma <= log_floor + 1e-6).mean()),
    }

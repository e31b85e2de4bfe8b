"""Intervals by resampling prompts: of one model's score, and of the difference of two on the same prompts."""

from collections.abc import Callable, Mapping

import numpy as np

Score = Callable[[np.ndarray], float]


def resample(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn in each resample, divided by the number of prompts: [resamples, prompts]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts


def intervals(
    statistics: Mapping[str, np.ndarray], score: Score, resamples: int, seed: int, against: str
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Scores of models with 95 % intervals, and the differences of model `against` minus each other one.

    statistics: model -> [n, D], the same n prompts in the same order; score: mean statistics [D] -> score. The same
    resampled prompts serve all models, so a difference's interval is paired.
    """
    (prompts,) = {len(values) for values in statistics.values()}
    weights = resample(prompts, resamples, seed)
    estimates = {model: score(values.mean(axis=0)) for model, values in statistics.items()}
    drawn = {model: np.array([score(mean) for mean in weights @ values]) for model, values in statistics.items()}
    scores = {model: _summary(estimates[model], drawn[model]) for model in statistics}
    differences = {
        model: _summary(estimates[against] - estimates[model], drawn[against] - drawn[model])
        for model in statistics
        if model != against
    }
    return scores, differences


def _summary(value: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def say_interval(found: Mapping[str, float], form: str = ".1f", sign: str = "", of: str = "value") -> str:
    """`77.5 [73.5, 81.5]`; sign "+" for differences; of: the estimate's name beside low and high."""
    value, low, high = (f"{found[name]:{sign}{form}}" for name in (of, "low", "high"))
    return f"{value} [{low}, {high}]"

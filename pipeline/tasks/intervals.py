"""95 % intervals over prompts: of one model's score, and of the difference of two on the same prompts.

Scores with ends (percentages) have intervals in closed form, which hold near the ends, where resampling fails: no
resample of 40 right answers has a wrong one. Other scores are resampled. Coverage: docs/metrics.md.
"""

from collections.abc import Callable, Mapping
from math import sqrt
from statistics import NormalDist

import numpy as np

Score = Callable[[np.ndarray], float]  # may have `ends`, its least and greatest value

Z = NormalDist().inv_cdf(0.975)
DOUBT = 0.1  # prompts of maximal difference that are added to the observed ones, since few differences say little


def resample(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn in each resample, divided by the number of prompts: [resamples, prompts]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts


def intervals(
    statistics: Mapping[str, np.ndarray], score: Score, resamples: int, seed: int, against: str
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Scores of models with 95 % intervals, and the differences of model `against` minus every other model.

    statistics: model -> [n, D], the same n prompts in the same order; score: mean statistics [D] -> score. Differences
    are paired. A difference of exactly zero has an interval too, since other prompts might show one.
    """
    (prompts,) = {len(values) for values in statistics.values()}
    ends = getattr(score, "ends", None)
    value = {model: score(values.mean(axis=0)) for model, values in statistics.items()}
    if ends is None:
        weights = resample(prompts, resamples, seed)
        drawn = {model: np.array([score(mean) for mean in weights @ values]) for model, values in statistics.items()}
        single = {model: np.percentile(drawn[model], [2.5, 97.5]) for model in statistics}
        paired = {model: np.percentile(drawn[against] - drawn[model], [2.5, 97.5]) for model in statistics}
    else:
        low, span = ends[0], ends[1] - ends[0]
        shares = {model: (contributions(values, score) - low) / span for model, values in statistics.items()}
        single = {model: low + span * share_interval(shares[model]) for model in statistics}
        paired = {model: span * difference_interval(shares[against], shares[model]) for model in statistics}
    scores = {model: _summary(value[model], single[model]) for model in statistics}
    differences = {
        model: _summary(value[against] - value[model], paired[model]) for model in statistics if model != against
    }
    return scores, differences


def contributions(values: np.ndarray, score: Score) -> np.ndarray:
    """What each prompt adds to a score [n], by leaving it out (centred jackknife pseudo-values, whose mean it is)."""
    n, mean = len(values), values.mean(axis=0)
    if n == 1:
        return np.array([score(mean)])
    without = np.array([score(rest) for rest in (n * mean - values) / (n - 1)])
    return score(mean) + (n - 1) * (without.mean() - without)


def share_interval(shares: np.ndarray) -> np.ndarray:
    """Interval of the mean of shares [n]: Agresti and Coull (1998), which adds about two prompts at either end.

    It is made for prompts that are right or wrong. Other shares vary less about the same mean, so they count as more
    prompts (the effective sample size of Korn and Graubard 1998).
    """
    mean = min(max(float(shares.mean()), 0.0), 1.0)
    n = len(shares) / _ratio(shares)
    center = (n * mean + Z**2 / 2) / (n + Z**2)
    half = Z * sqrt(center * (1 - center) / (n + Z**2))
    return np.clip([center - half, center + half], 0, 1)


def difference_interval(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Interval of the mean of `first` - `second`, shares [n] of the same prompts: Bonett and Price (2012).

    It adds one prompt that the first wins and one that the second wins. Differences other than 0 and 1 count as in
    `share_interval`; where there are hardly any, their scale is that of the two models' own shares.
    """
    difference = first - second
    won, lost = np.maximum(difference, 0).mean(), np.maximum(-difference, 0).mean()
    worst = len(difference) * (won + lost - (won - lost) ** 2)
    scale = max(_ratio(first), _ratio(second))
    n = len(difference) * (worst + DOUBT) / (len(difference) * difference.var() + DOUBT * scale)
    won, lost = (n * won + 1) / (n + 2), (n * lost + 1) / (n + 2)
    half = Z * sqrt((won + lost - (won - lost) ** 2) / (n + 2))
    return np.clip([won - lost - half, won - lost + half], -1, 1)


def _ratio(shares: np.ndarray) -> float:
    """The variance of shares over that of right and wrong prompts with their mean: 1 for these, less for others."""
    mean = min(max(float(shares.mean()), 0.0), 1.0)
    return (len(shares) * float(shares.var()) + DOUBT) / (len(shares) * mean * (1 - mean) + DOUBT)


def _summary(value: float, interval: np.ndarray) -> dict[str, float]:
    return {"value": float(value), "low": float(interval[0]), "high": float(interval[1])}


def say_interval(interval: Mapping[str, float], form: str = ".1f", sign: str = "", of: str = "value") -> str:
    """`77.5 [73.5, 81.5]`; sign "+" for differences; of: the estimate's name beside low and high."""
    value, low, high = (f"{interval[name]:{sign}{form}}" for name in (of, "low", "high"))
    return f"{value} [{low}, {high}]"

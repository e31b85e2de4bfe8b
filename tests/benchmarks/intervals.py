"""How often do the 95 % intervals hold the truth? Simulated evaluations of two models, as a table in Markdown.

    python -m tests.benchmarks.intervals [--quick] [--repetitions 1000] [--seed 0]

Draws test sets of n prompts from a large population, whose scores are the truth, and counts the intervals that hold
it: by `pipeline.tasks.intervals.intervals`, and by the percentiles of 1000 resamples, used before for all scores.
Each cell is `percentiles / now`, in %. Pairs of models are the *same* on 95 % of the prompts and independent on the
others, where the second is worse; or *related*: the same prompts are hard for both, and the second is worse.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from random import Random

import numpy as np

from pipeline.tasks import TASKS, metrics
from pipeline.tasks.intervals import intervals, resample
from pipeline.tasks.shipped import translation

SIZES = (20, 40, 100, 400)
RESAMPLES = 1000
PAIRS = ("same", "related")
Population = tuple[np.ndarray, np.ndarray]  # statistics [N, D] of two models on the same N prompts


def difficulties(rng: np.random.Generator, count: int, pair: str) -> Iterator[np.ndarray]:
    """Standard normal, one per prompt [count], of each model."""
    first, second = rng.normal(size=(2, count))
    yield first
    if pair == "same":
        yield np.where(rng.random(count) < 0.95, first, second - 0.3)
    else:
        yield 0.8 * first + 0.6 * second - 0.1


def accuracies(mean: float, samples: int) -> Callable[[np.random.Generator, int, str], Population]:
    """Right or wrong for one sample, shares of right samples for more; `mean` is the first model's accuracy."""

    def draw(rng: np.random.Generator, count: int, pair: str) -> Population:
        first, second = difficulties(rng, count, pair)
        noise = 0.0 if samples == 1 else 1.0  # from one sample of a prompt to the next
        least = np.quantile(first + noise * rng.normal(size=count), 1 - mean)
        between = noise * rng.normal(size=(samples, count))
        others = noise * rng.normal(size=(samples, count))
        others = np.where(second == first, between, others)  # the same model draws the same samples
        return tuple((each > least).mean(axis=0)[:, None] for each in (first + between, second + others))

    return draw


def overlaps(center: float, zeros: float) -> Callable[[np.random.Generator, int, str], Population]:
    """Like ROUGE: shares between 0 and 1 around the logit `center`, a part of them 0."""

    def draw(rng: np.random.Generator, count: int, pair: str) -> Population:
        none = rng.random(count) < zeros
        return tuple(
            np.where(none, 0, 1 / (1 + np.exp(-center - each)))[:, None] for each in difficulties(rng, count, pair)
        )

    return draw


def translations(exact: float) -> Callable[[np.random.Generator, int, str], Population]:
    """BLEU counts of references of the built-in task with words left out, `exact` of the first model's with none."""

    def draw(rng: np.random.Generator, count: int, pair: str) -> Population:
        source = Random(0)
        references = [translation.example(source).references for _ in range(count)]
        first, second = difficulties(rng, count, pair)
        least, places = np.quantile(first, 1 - exact), rng.random(size=(count, 40))

        def answers(hardness: np.ndarray) -> list[str]:
            lost = np.ceil(np.clip(2 * (least - hardness), 0, 6)).astype(int)
            return [
                " ".join(np.delete(refs[0].split(), np.argsort(where[: len(refs[0].split())])[:missing]))
                for refs, where, missing in zip(references, places, lost, strict=True)
            ]

        # The last statistic is the number of segments of a test set; it acts on counts of zero alone.
        return tuple(metrics.bleu().statistics(answers(each), references) for each in (first, second))

    return draw


def divergences(rng: np.random.Generator, count: int, pair: str) -> Population:
    """Like a KL: sums over the tokens of a response and their number; a score without ends."""
    tokens = rng.integers(5, 40, count)
    return tuple(
        np.stack([np.exp(0.8 * each - 2.5) * tokens, tokens], axis=1) for each in difficulties(rng, count, pair)
    )


def _ratio(mean: np.ndarray) -> float:
    return float(mean[0] / mean[1])


_share, _bleu = TASKS["arithmetic"].metrics[0].score, metrics.bleu().score
CASES = {
    **{f"accuracy {mean:.0%}": (accuracies(mean, 1), _share) for mean in (0.5, 0.9, 0.97, 0.99)},
    **{f"accuracy {mean:.0%}, 4 samples": (accuracies(mean, 4), _share) for mean in (0.5, 0.9, 0.97, 0.99)},
    "ROUGE, about 30": (overlaps(-1, 0.05), _share),
    "ROUGE, about 4": (overlaps(-3, 0.4), _share),
    "BLEU, half of the answers exact": (translations(0.5), _bleu),
    "BLEU, 97 % of the answers exact": (translations(0.97), _bleu),
    "KL (no ends)": (divergences, _ratio),
}


def percentiles(statistics: dict[str, np.ndarray], score, weights: np.ndarray) -> list[np.ndarray]:
    """Intervals of the first model and of the difference, as they were made before."""
    first, second = (np.array([score(mean) for mean in weights @ values]) for values in statistics.values())
    return [np.percentile(drawn, [2.5, 97.5]) for drawn in (first, first - second)]


def coverage(population: Population, score, prompts: int, repetitions: int, seed: int) -> np.ndarray:
    """Shares of intervals that hold the truth, [score, difference] by [percentiles, now]."""
    truth = [score(values.mean(axis=0)) for values in population]
    truth = [truth[0], truth[0] - truth[1]]
    rng, weights = np.random.default_rng(seed), resample(prompts, RESAMPLES, seed)
    held = np.zeros((2, 2))
    for _ in range(repetitions):
        drawn = rng.integers(len(population[0]), size=prompts)
        statistics = {name: values[drawn] for name, values in zip("ab", population, strict=True)}
        scores, differences = intervals(statistics, score, RESAMPLES, seed, "a")
        now = [[interval["low"], interval["high"]] for interval in (scores["a"], differences["b"])]
        for column, ends in enumerate((percentiles(statistics, score, weights), now)):
            held[:, column] += [
                low - 1e-9 <= true <= high + 1e-9 for (low, high), true in zip(ends, truth, strict=True)
            ]
    return held / repetitions


def table(names, sizes: tuple[int, ...], repetitions: int, seed: int, size: int = 100_000) -> Iterator[str]:
    yield "| | n | score | difference, same | difference, related |"
    yield "|---|---|---|---|---|"
    for name in names:
        draw, score = CASES[name]
        corpus = score is _bleu  # slower
        rng = np.random.default_rng(seed)
        populations = [draw(rng, size // 50 if corpus else size, pair) for pair in PAIRS]
        for prompts in sizes:
            shares = [coverage(each, score, prompts, repetitions // (2 if corpus else 1), seed) for each in populations]
            cells = [shares[0][0], shares[0][1], shares[1][1]]
            yield f"| {name} | {prompts} | " + " | ".join(f"{100 * a:.0f} / {100 * b:.0f}" for a, b in cells) + " |"


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cases, small: to see that it runs")
    parser.add_argument("--repetitions", type=int, default=1000, help="test sets per cell; half as many for BLEU")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names, sizes = (("accuracy 97%", "ROUGE, about 30"), (40,)) if options.quick else (tuple(CASES), SIZES)
    for line in table(names, sizes, 200 if options.quick else options.repetitions, options.seed):
        print(line, flush=True)


if __name__ == "__main__":
    main()

"""What holds for intervals of scores and of their differences, near the ends too."""

from math import sqrt

import numpy as np
import pytest

from pipeline.tasks.intervals import contributions, intervals, resample
from pipeline.tasks.metrics import Percentage, bleu

RNG = np.random.default_rng(0)
percent = Percentage(lambda mean: 100 * float(mean[0]))


def column(*runs: tuple[float, int]) -> np.ndarray:
    """Statistics [n, 1]: each value as often as it says."""
    return np.concatenate([np.full((count, 1), value) for value, count in runs])


def of_one(values: np.ndarray, score=percent) -> tuple[float, float]:
    scores, _ = intervals({"m": values}, score, 1000, 0, "m")
    return scores["m"]["low"], scores["m"]["high"]


def of_two(first: np.ndarray, second: np.ndarray, score=percent) -> tuple[float, float]:
    _, differences = intervals({"a": first, "b": second}, score, 1000, 0, "a")
    return differences["b"]["low"], differences["b"]["high"]


# Scores without ends


def test_resamples_keep_the_number_of_prompts():
    weights = resample(7, 100, 0)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert weights.shape == (100, 7) and len({tuple(row) for row in weights}) > 90


def test_the_interval_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(0).normal(3, 2, (400, 1))
    scores, _ = intervals({"m": values}, lambda mean: float(mean[0]), 4000, 0, "m")
    half = 1.96 * values.std() / 20
    assert scores["m"]["value"] == pytest.approx(values.mean())
    assert scores["m"]["low"] == pytest.approx(values.mean() - half, abs=0.05)
    assert scores["m"]["high"] == pytest.approx(values.mean() + half, abs=0.05)


def test_differences_are_paired_over_the_prompts():
    """Two models that always differ by one point: the scores are uncertain, their difference is not."""
    hard = np.random.default_rng(0).normal(0, 10, (50, 1))
    scores, differences = intervals({"a": hard, "b": hard + 1}, lambda mean: float(mean[0]), 500, 0, "b")
    assert scores["a"]["high"] - scores["a"]["low"] > 3
    assert differences["a"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})


# Percentages


@pytest.mark.parametrize(("right", "low", "high"), [(39, 86, 100), (40, 89.6, 100), (20, 35.2, 64.8), (0, 0, 10.4)])
def test_an_accuracy_has_the_interval_of_agresti_and_coull(right, low, high):
    n = 40 + 1.959964**2
    center = (right + 1.959964**2 / 2) / n
    half = 196 * sqrt(center * (1 - center) / n)
    found = of_one(column((1, right), (0, 40 - right)))
    assert found == pytest.approx((max(100 * center - half, 0), min(100 * center + half, 100)), abs=0.01)
    assert found == pytest.approx((low, high), abs=0.1)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (7, 3), (0, 40)])
def test_a_difference_of_accuracies_has_the_interval_of_bonett_and_price(won, lost):
    same = 40 - won - lost
    first = column((1, won), (0, lost), (1, same))
    second = column((0, won), (1, lost), (1, same))
    up, down = (won + 1) / 42, (lost + 1) / 42
    half = 1.959964 * sqrt((up + down - (up - down) ** 2) / 42)
    expected = 100 * np.clip([up - down - half, up - down + half], -1, 1)
    assert of_two(first, second) == pytest.approx(expected, abs=0.01)


def test_no_difference_on_few_prompts_is_not_proof_of_none():
    """40 prompts on which two models are right and wrong alike bound their difference; they do not make it zero."""
    alike = column((1, 30), (0, 10))
    _, differences = intervals({"a": alike, "b": alike.copy()}, percent, 1000, 0, "a")
    found = differences["b"]
    assert found["value"] == 0 and found["low"] == -found["high"] and found["high"] == pytest.approx(6.6, abs=0.1)
    low, high = of_two(np.tile(alike, (10, 1)), np.tile(alike, (10, 1)))
    assert high == -low == pytest.approx(0.7, abs=0.1)


def test_shares_that_vary_less_than_right_and_wrong_have_shorter_intervals():
    shares = RNG.beta(6, 14, (100, 1))  # like ROUGE
    low, high = of_one(shares)
    half = 196 * shares.std() / 10
    assert (low, high) == pytest.approx((100 * shares.mean() - half, 100 * shares.mean() + half), abs=0.15)
    wide = of_one((shares > 0.3).astype(float))
    assert wide[1] - wide[0] > 3 * (high - low)
    moved = np.clip(shares + RNG.normal(0.02, 0.05, (100, 1)), 0, 1)
    difference = moved - shares
    half = 196 * difference.std() / 10
    expected = (100 * difference.mean() - half, 100 * difference.mean() + half)
    assert of_two(moved, shares) == pytest.approx(expected, abs=0.15)


def test_equal_answers_are_no_difference_on_the_scale_of_the_scores_themselves():
    shares = RNG.beta(6, 14, (40, 1))
    low, high = of_two(shares, shares.copy())
    assert high == -low and 0.2 < high < 1  # 6.6 where prompts are right or wrong


def test_every_interval_holds_its_value_and_stays_within_the_ends():
    for _ in range(500):
        n, mean = int(RNG.integers(1, 60)), RNG.choice([0, 0.01, 0.5, 0.97, 1])
        first = RNG.choice([(RNG.random((n, 1)) < mean) * 1.0, RNG.beta(0.3, 0.1 + mean, (n, 1))])
        second = np.where(RNG.random((n, 1)) < 0.8, first, 1 - first)
        scores, differences = intervals({"a": first, "b": second}, percent, 10, 0, "a")
        for found, least in ((scores["a"], 0), (scores["b"], 0), (differences["b"], -100)):
            assert least <= found["low"] <= found["value"] + 1e-9 and found["value"] - 1e-9 <= found["high"] <= 100


def test_the_contributions_of_prompts_are_their_shares_or_average_to_the_corpus_score():
    right = column((1, 5), (0, 2))
    np.testing.assert_allclose(contributions(right, percent), 100 * right[:, 0], atol=1e-9)
    said, references = ["a b c d e", "a b c x", "y", "a b c d"], [["a b c d e"], ["a b c d"], ["y z"], ["a b c d"]]
    metric = bleu()
    found = contributions(metric.statistics(said, references), metric.score)
    assert found.mean() == pytest.approx(metric(said, references)) and found.argmin() == 1 < 100 < found.max()


def test_a_corpus_score_has_an_interval_around_it():
    said, references = ["a b c d e", "x y z w v"], [["a b c d e"], ["no match here at all"]]
    scores, _ = intervals({"m": bleu().statistics(said, references)}, bleu().score, 200, 0, "m")
    assert 0 <= scores["m"]["low"] < scores["m"]["value"] == bleu()(said, references) < scores["m"]["high"] <= 100

"""What holds for intervals, diversity and corruption."""

import numpy as np
import pytest

from pipeline.tasks.corruption import corruptions
from pipeline.tasks.diversity import distinct_n, self_bleu
from pipeline.tasks.metrics import accuracy, bleu
from stages.bootstrap import intervals, resample


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


def test_metrics_are_resampled_as_corpus_scores():
    hypotheses, references = ["a b c d e", "x y z w v"], [["a b c d e"], ["no match here at all"]]
    scores, _ = intervals({"m": bleu().statistics(hypotheses, references)}, bleu().score, 200, 0, "m")
    assert 0 <= scores["m"]["low"] < scores["m"]["value"] < scores["m"]["high"] == pytest.approx(100)
    right = accuracy(str.strip)
    assert right(["a ", "b"], [["a"], ["c", "d"]]) == 50.0


def test_diversity_by_hand():
    assert distinct_n([["a b a b", "a b"]], 2) == 2 / 4  # ab ba ab + ab
    assert distinct_n([["a", "b"]], 2) == 0.0
    assert self_bleu([["a b c d", "a b c d"]]) == pytest.approx(100)
    assert self_bleu([["a b c d", "e f g h"]]) < 10
    assert self_bleu([["a b c d"] * 2, ["a b c d", "e f g h"]]) < 60


def test_corruptions_are_wrong_different_and_end_as_they_should():
    reference = np.array([10, 11, 12, 13, 14, 2], np.int32)
    found = corruptions([reference, np.array([10, 12, 11, 13, 14, 2])], 20, 0)
    assert len({tuple(wrong) for wrong in found}) == 20
    assert all(wrong[-1] == 2 and 2 not in wrong[:-1] and wrong.dtype == np.int32 for wrong in found)
    assert not {(10, 11, 12, 13, 14, 2), (10, 12, 11, 13, 14, 2)} & {tuple(wrong) for wrong in found}
    assert all(4 <= len(wrong) <= 8 for wrong in found)
    assert {int(wrong[-2]) for wrong in found} > {14}  # the last token, often the answer, is changed too
    assert [tuple(wrong) for wrong in corruptions([reference], 5, 0)] == [
        tuple(w) for w in corruptions([reference], 5, 0)
    ]
    assert corruptions([np.array([10, 2], np.int32)], 3, 0) == []

"""What holds for accuracy, diversity and corruption."""

import numpy as np
import pytest

from pipeline.tasks.diversity import distinct_n, self_bleu
from pipeline.tasks.metrics import accuracy
from pipeline.teacher.corruption import corruptions


def test_an_answer_is_right_if_it_is_that_of_any_reference():
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

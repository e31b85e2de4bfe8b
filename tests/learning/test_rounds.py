"""What holds for the rows that each step of a round learns from."""

from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from pipeline.learning.rounds import OwnSamples, Round, RoundLoader, RoundRows, schedule
from pipeline.store.schema import Row
from pipeline.store.selection import Selection
from pipeline.store.training_rows import TeacherRows


@pytest.mark.parametrize(
    "arguments, starts",
    [
        ({"steps": 10, "refreshes": 1}, [0]),
        ({"steps": 10, "refreshes": 3}, [0, 3, 6]),
        ({"steps": 10, "refreshes": 4}, [0, 2, 5, 7]),
        ({"steps": 10, "refreshes": 10}, list(range(10))),
        ({"steps": 10, "every": 4}, [0, 4, 8]),
        ({"steps": 10, "every": 5}, [0, 5]),
        ({"steps": 10, "every": 99}, [0]),
        ({"steps": 3, "every": 1}, [0, 1, 2]),
    ],
)
def test_rounds_are_spread_over_all_steps(arguments, starts):
    rounds = schedule(**arguments)
    assert [each.start for each in rounds] == starts and [each.number for each in rounds] == list(range(len(starts)))
    assert [each.stop for each in rounds] == [*starts[1:], arguments["steps"]]


def own_samples(round_: Round) -> OwnSamples:
    """Five rows, of which the first was drawn twice, with a value for each token."""
    rows = [replace(Row.bare(np.arange(3), np.full(2, number)), key=f"{round_.number}-{number}") for number in range(5)]
    extras = {"old": {row.key: np.full(2, round_.number, np.float32) for row in rows}}
    return OwnSamples(rows, np.array([0, 0, 1, 2, 3, 4]), np.zeros(6, int), extras)


def mixed(cache, rounds, share, replay=0, seed=0, batch_size=8) -> RoundRows:
    data = TeacherRows(Selection(cache / "selection"), "train")
    return RoundRows(rounds, own_samples, data, batch_size, share, replay, seed, {})


def keys_of(rows: RoundRows, step: int) -> list[str]:
    size = rows.batch_size
    return [row.key for row in rows.__getitems__(range(step * size, (step + 1) * size))]


def is_own(key: str) -> bool:
    return "/" in key


def test_a_row_is_the_students_with_probability_share(cache):
    rows = mixed(cache, schedule(200, 2), share=0.3)
    own = [sum(map(is_own, keys_of(rows, step))) for step in range(200)]
    assert np.mean(own) / 8 == pytest.approx(0.3, abs=0.035)  # three deviations
    assert np.var(own) == pytest.approx(8 * 0.3 * 0.7, rel=0.4)
    for share in (0, 1):
        rows = mixed(cache, schedule(4, 2), share)
        assert {is_own(key) for step in range(4) for key in keys_of(rows, step)} == {bool(share)}


@pytest.mark.parametrize("share", [0.4, 1])
def test_a_step_has_the_same_rows_whichever_is_asked_for_first(cache, share):
    """So a killed run goes on with the batches that it would have had."""
    rounds = schedule(12, 3)
    whole = mixed(cache, rounds, share, replay=1)
    in_order = [keys_of(whole, step) for step in range(12)]
    for step in (11, 5, 7, 4, 0):
        assert keys_of(mixed(cache, rounds, share, replay=1), step) == in_order[step]
        assert keys_of(whole, step) == in_order[step]
        assert [whole[step * 8 + place].key for place in range(8)] == in_order[step]
    assert in_order != [keys_of(mixed(cache, rounds, share, replay=1, seed=1), step) for step in range(12)]


def test_micro_batches_are_the_parts_of_a_step(cache):
    rows = mixed(cache, schedule(6, 2), share=0.5)
    steps = [keys_of(rows, step) for step in range(6)]
    parts = list(RoundLoader(rows, 8, 0, lambda batch, extras: [row.key for row in batch], parts=4))
    assert [len(part) for part in parts] == [2] * 24
    assert list(chain(*parts)) == list(chain(*steps))


@pytest.mark.parametrize("replay", [0, 1, 2, 9])
def test_replay_learns_from_so_many_earlier_rounds(cache, replay):
    rounds = schedule(40, 4)
    rows = mixed(cache, rounds, share=1, replay=replay)
    for round_ in rounds:
        keys = [key for step in range(round_.start, round_.stop) for key in keys_of(rows, step)]
        kept = range(max(round_.number - replay, 0), round_.number + 1)
        assert {int(key.partition("/")[0]) for key in keys} == set(kept)
        assert {key: values[0] for key, values in rows.extras["old"].items()} == {
            f"{number}/{number}-{place}": number for number in kept for place in range(5)
        }


def test_samples_are_used_evenly_within_their_round_and_data_within_an_epoch(cache):
    """What was drawn twice is used twice as often."""
    rounds, data = schedule(60, 3), Counter()
    rows = mixed(cache, rounds, share=0.5, replay=1)
    for round_ in rounds:
        keys = [key for step in range(round_.start, round_.stop) for key in keys_of(rows, step)]
        used = Counter(filter(is_own, keys))
        data.update(key for key in keys if not is_own(key))
        once = [count for key, count in used.items() if not key.endswith("-0")]
        twice = [count for key, count in used.items() if key.endswith("-0")]
        assert max(once) - min(once) <= 1
        assert all(2 * min(once) <= count <= 2 * max(once) for count in twice)
    assert len(data) == len(rows.data) and max(data.values()) - min(data.values()) <= 1

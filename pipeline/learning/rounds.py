"""Rounds: the student answers prompts anew, and the steps up to the next round learn from these samples and the data.

Which rows a step learns from follows from its number, the seed and the rounds' rows alone, so that a training is taken
up at any step. A round is made when the step that begins it asks for its rows: by then the student is the one of the
step before.
"""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.store.schema import Row
from pipeline.store.training_rows import TeacherRows, shuffled


@dataclass(frozen=True)
class Round:
    """The steps [start, stop) that learn from what the student said at its beginning."""

    number: int
    start: int
    stop: int


def schedule(steps: int, refreshes: int = 0, every: int = 0) -> list[Round]:
    """The rounds of a training: `refreshes` of them of about equal length, or one `every` so many steps."""
    starts = range(0, steps, every) if every else [number * steps // refreshes for number in range(refreshes)]
    return [Round(number, *ends) for number, ends in enumerate(zip(starts, [*starts[1:], steps], strict=True))]


@dataclass
class OwnSamples:
    """The student's samples of one round, as training rows."""

    rows: Sequence[Row]  # the distinct ones
    places: np.ndarray  # int [S], the row of each sample: what was drawn twice counts twice
    groups: np.ndarray  # int [S], which rows are decoded together
    extras: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)  # name -> key -> values [T]


class Stream:
    """Endless row numbers: epoch after epoch, each in an order of its own."""

    def __init__(self, groups: np.ndarray, *seed: int):
        """groups: int [N], which rows are decoded together."""
        self.groups, self.seed = groups, seed
        self._order: tuple[int, np.ndarray] = (-1, groups)  # of the epoch that was asked for last

    def __call__(self, start: int, stop: int) -> list[int]:
        """Those at the places [start, stop)."""
        return [self._epoch(place // len(self.groups))[place % len(self.groups)] for place in range(start, stop)]

    def _epoch(self, number: int) -> np.ndarray:
        if self._order[0] != number:
            self._order = number, shuffled(self.groups, np.random.default_rng([*self.seed, number]))
        return self._order[1]


class RoundRows(Dataset):
    """The rows of every step: at place i of step s, item s * batch_size + i.

    Each row is a student's sample with probability `share`, else one of the data. Samples are evenly used within their
    round, data within an epoch. The key of a sample's row has the number of its round before it.
    """

    def __init__(
        self,
        rounds: Sequence[Round],
        own: Callable[[Round], OwnSamples],
        data: TeacherRows,
        batch_size: int,
        share: float,
        replay: int,
        seed: int,
        extras: Mapping[str, Mapping[str, np.ndarray]],
    ):
        """own: makes or reads a round's samples. replay: rounds before the current one to learn from as well.

        extras: of the data, by name and key.
        """
        self.rounds, self.own, self.data, self.batch_size, self.replay = rounds, own, data, batch_size, replay
        self.seed, self.steps, self._data_extras = seed, rounds[-1].stop, extras
        counts = np.random.default_rng([seed, 1]).binomial(batch_size, share, self.steps)
        self.own_before = np.concatenate([[0], np.cumsum(counts)])  # student's samples in the steps before each
        self.extras: dict[str, Mapping[str, np.ndarray]] = dict(extras)  # of the current round and the data
        self._data_stream = Stream(data.groups, seed, 2) if share < 1 else None
        if share < 1:
            data.keep_pool(batch_size)
        self._loaded: dict[int, OwnSamples] = {}
        self._current: Round | None = None
        self._samples: list[tuple[int, int]] = []  # round and place of all samples that are learned from now
        self._stream: Stream | None = None

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, item: int) -> Row:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[Row]:
        """The rows of places of one step."""
        step = items[0] // self.batch_size
        self._enter(step)
        first, last = self.own_before[step : step + 2]
        count, before = last - first, first - self.own_before[self._current.start]
        places = [item - step * self.batch_size for item in items]
        own = [place for place in places if place < count]
        rows = [self._sample(number) for number in self._at(self._stream, before, own)]
        if len(own) < len(places):
            data_before = step * self.batch_size - first - count
            given = self._at(self._data_stream, data_before, [place for place in places if place >= count])
            rows += self.data.__getitems__(given)
        return rows

    @staticmethod
    def _at(stream: Stream, before: int, places: Sequence[int]) -> list[int]:
        return stream(before + places[0], before + places[-1] + 1) if places else []

    def _sample(self, number: int) -> Row:
        round_, place = self._samples[number]
        samples = self._loaded[round_]
        row = samples.rows[int(samples.places[place])]
        return replace(row, key=own_key(round_, row.key))

    def _enter(self, step: int) -> None:
        """Have the samples of the step's round, and of those before it that are replayed."""
        current = next(each for each in self.rounds if each.start <= step < each.stop)
        if current is self._current:
            return
        kept = self.rounds[max(current.number - self.replay, 0) : current.number + 1]
        loaded = {each.number: self._loaded.get(each.number) for each in kept}
        self._loaded = {n: samples or self.own(self.rounds[n]) for n, samples in loaded.items()}
        self._samples = [(n, place) for n, samples in self._loaded.items() for place in range(len(samples.places))]
        groups, last = [], 0
        for samples in self._loaded.values():
            groups.append(samples.groups + last)
            last = int(groups[-1].max()) + 1
        self._stream, self._current = Stream(np.concatenate(groups), self.seed, 3, current.number), current
        names = {name for samples in self._loaded.values() for name in samples.extras}
        of_samples = {
            name: {own_key(n, k): v for n, s in self._loaded.items() for k, v in s.extras[name].items()}
            for name in names
        }
        self.extras = {
            name: ChainMap(of_samples.get(name, {}), self._data_extras.get(name, _Nothing()))
            for name in {*names, *self._data_extras}
        }


class _Nothing(dict):
    """Extras that only samples have: None for any row of the data."""

    def __missing__(self, key: str) -> None:
        return None


def own_key(round_: int, key: str) -> str:
    """The key of a sample's row in training: another one in every round, since the student was another one."""
    return f"{round_}/{key}"


class RoundLoader(DataLoader):
    """Batches of RoundRows, step by step, in this process: making a round needs the student as it is."""

    def __init__(
        self,
        rows: RoundRows,
        batch_size: int,
        seed: int,
        collate: Callable[..., dict],
        workers: int = 0,
        parts: int = 1,
    ):
        """collate: makes a batch of rows and `extras`. workers: not used. parts: micro-batches per batch."""
        super().__init__(
            rows,
            batch_sampler=_Steps(rows.steps, batch_size, parts),
            collate_fn=lambda batch: collate(batch, extras=rows.extras),
        )


class _Steps(Sampler[list[int]]):
    """The items of each step's micro-batches."""

    def __init__(self, steps: int, batch_size: int, parts: int):
        self.count, self.size = steps * parts, batch_size // parts

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.count):
            yield list(range(number * self.size, (number + 1) * self.size))

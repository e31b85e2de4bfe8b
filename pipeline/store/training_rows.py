"""A selection for training: a torch dataset that decodes what is asked for, and batches of similar length.

Memory is bounded by the batch: rows are decoded by row group, a few groups at a time, and an epoch is ordered so that
each group is decoded about once (once per worker process). The order follows from seed and epoch alone: an epoch
can be left in its middle and taken up again. Files stay open, so that a training goes on with its own rows when its
selection is rewritten, or when `cache gc` removes what it reads.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.store.schema import KEPT, SUPPORT, TEXT, Columns, Row, group_ends, to_table
from pipeline.store.selection import Selection, read_group

POOL = 8  # row groups whose rows are shuffled together
KEPT_ROWS = 1024  # decoded rows that are remembered where nothing else is said
_LIGHT = ["key", "origin", "prompt_ids", "response_ids"]


class TeacherRows(Dataset):
    """The rows of one part of a selection, in its canonical order.

    keys: key of each row. prompt_tokens, response_tokens: int [N]. groups: int [N], which rows are decoded together.
    """

    def __init__(
        self, selection: Selection, part: str, topk: bool = True, origin: str | None = None, text: bool = True
    ):
        """topk, text: whether rows have their kept tokens and their texts. origin: only rows of this one.

        Raises UserError where rows have left the store.
        """
        source = _Files if selection.manifest["materialized"] else _Stored
        self._source = source(selection, part, (() if topk else KEPT) + (() if text else TEXT))
        count = selection.part(part)["rows"]
        keys, fits = np.empty(count, object), np.zeros(count, bool)
        prompts, responses, groups, places = (np.zeros(count, np.int32) for _ in range(4))
        self._highest: list[int] = []  # highest token id of each group
        for number, at in enumerate(self._source.rows):
            group_keys, origins, table = self._source.read_light(number)
            keys[at], fits[at] = group_keys, [origin in (None, each) for each in origins]
            prompts[at], responses[at] = (pc.list_value_length(table.column(name)) for name in _LIGHT[2:])
            groups[at], places[at] = number, np.arange(len(at))
            highest = (pc.max(pc.list_flatten(table.column(name))).as_py() for name in _LIGHT[2:])
            self._highest.append(max(-1 if value is None else value for value in highest))
        self.keys: list[str] = keys[fits].tolist()
        self.prompt_tokens, self.response_tokens = prompts[fits], responses[fits]
        self.groups, self._places = groups[fits], places[fits]
        self._decoded: OrderedDict[int, Columns] = OrderedDict()
        self.keep_rows = KEPT_ROWS  # decoded rows that are remembered beyond the group that was read last

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt and response together, int [N]."""
        return self.prompt_tokens + self.response_tokens

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> "Rows":
        groups, places = self.groups[indices].tolist(), self._places[indices].tolist()
        return Rows([self._group(group) for group in groups], places)

    def _group(self, number: int) -> Columns:
        if number not in self._decoded:
            self._decoded[number] = self._source.load(number)
            while len(self._decoded) > 1 and sum(map(len, self._decoded.values())) > self.keep_rows:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(number)
        return self._decoded[number]

    def keep_pool(self, batch_size: int) -> None:
        """Remember the decoded rows of a pool, and what is left of the one before: then each is decoded once."""
        self.keep_rows = (POOL + 1) * int(np.bincount(self.groups).max(initial=0)) + batch_size

    def beyond(self, vocabulary: int) -> tuple[Row, int] | None:
        """A row with a token id outside a vocabulary of this size, and the id; None where there is none."""
        for index, number in enumerate(self.groups):
            if self._highest[number] >= vocabulary:
                row = self[index]
                highest = max(row.prompt_ids.max(initial=-1), row.response_ids.max(initial=-1))
                if highest >= vocabulary:
                    return row, int(highest)
        return None


class Rows(Sequence[Row]):
    """Rows out of decoded groups, made when they are asked for."""

    def __init__(self, groups: Sequence[Columns], places: Sequence[int]):
        """groups, places: of each row."""
        self._groups, self._places = groups, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Row:
        return self._groups[index][self._places[index]]

    def column(self, name: str) -> list:
        """The values of one column, without making the rows."""
        return [group.value(name, place) for group, place in zip(self._groups, self._places, strict=True)]


class _Files:
    """Row groups of a selection's own files.

    rows: the places of each group's rows in the canonical order. places: file of each group, and its number there.
    """

    def __init__(self, selection: Selection, part: str, without: tuple[str, ...]):
        self.files, self.without, self.rows, self.places, start = selection.files, without, [], [], 0
        for file in selection.part(part)["files"]:
            path = selection.folder / file["name"]
            with self.files.reader(path) as reader:
                ends = start + group_ends(reader.metadata)
            for number, end in enumerate(ends.tolist()):
                self.rows.append(np.arange(start, end))
                self.places.append((path, number))
                start = end

    def read_light(self, group: int) -> tuple[list[str], list[str], pa.Table]:
        path, number = self.places[group]
        with self.files.reader(path) as reader:
            table = reader.read_row_group(number, columns=_LIGHT)
        return table.column("key").to_pylist(), table.column("origin").to_pylist(), table

    def load(self, group: int) -> Columns:
        path, number = self.places[group]
        with self.files.reader(path) as reader:
            return read_group(reader, number, self.without)


class _Stored:
    """Rows that stayed in the store, which the selection labels; those of one row group of a shard are a group."""

    def __init__(self, selection: Selection, part: str, without: tuple[str, ...]):
        self.k = 0 if set(KEPT) & set(without) else selection.k
        self.support = selection.support
        self.unread = dict.fromkeys(name for name in (*TEXT, *SUPPORT) if name in without)
        self.folder, self.labels, self.locations = selection.checked(part)
        self.rows, self.places = [], []  # of each group: places in the canonical order; shard, number, rows in it
        for places, *of_shard in self.folder.row_groups(self.locations):
            self.rows.append(places)
            self.places.append(of_shard)

    def read_light(self, group: int) -> tuple[list[str], list[str], pa.Table]:
        shard, number, rows = self.places[group]
        with self.folder.reading(shard) as reader:
            table = reader.read_row_group(number, columns=_LIGHT).take(rows)
        labels = [self.labels[place] for place in self.rows[group]]
        return [label.key for label in labels], [label.origin for label in labels], table

    def load(self, group: int) -> Columns:
        at = self.rows[group]
        rows = self.folder.read(self.locations[place] for place in at)
        labelled = (self.labels[place].apply(row, self.k, self.support) for place, row in zip(at, rows, strict=True))
        return Columns(to_table([replace(row, **self.unread) for row in labelled]))


def shuffled(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All row numbers once, int [N]: groups (int [N]) in random order, the rows of POOL of them shuffled together."""
    members = _members(groups)
    order = rng.permutation(len(members))
    pools = (np.concatenate([members[g] for g in order[start : start + POOL]]) for start in range(0, len(order), POOL))
    return np.concatenate([rng.permutation(pool) for pool in pools])


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """The row numbers of each group."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []


class BucketedBatches(Sampler[list[int]]):
    """Batches of row numbers for one epoch after the other, of similar length, shuffled by seed and epoch.

    Groups come in random order, and the rows of POOL of them are shuffled together. Every `window` batches of them are
    sorted by length before they are cut, and come in random order; a window of 1 sorts nothing. All rows come once per
    epoch; only the last batch may be smaller.
    """

    def __init__(
        self, lengths: np.ndarray, groups: np.ndarray, batch_size: int, seed: int, parts: int = 1, window: int = 16
    ):
        """lengths, groups: int [N]. parts: micro-batches per batch."""
        if batch_size % parts:
            raise ValueError(f"{batch_size} rows cannot be handed out in {parts} equal parts")
        self.lengths, self.batch_size, self.seed, self.parts, self.window = lengths, batch_size, seed, parts, window
        self.groups = _members(groups)
        self.epoch = self.start = 0  # start: micro-batches of the epoch to skip

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full * self.parts + -(-rest // (self.batch_size // self.parts))

    def __iter__(self) -> Iterator[list[int]]:
        micro, passed, skipped = self.batch_size // self.parts, 0, self.start
        for batch in self._batches(np.random.default_rng([self.seed, self.epoch])):
            for start in range(0, len(batch), micro):
                passed += 1
                if passed > skipped:
                    yield batch[start : start + micro].tolist()

    def _batches(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        waiting, size = np.empty(0, np.int64), self.window * self.batch_size
        order = rng.permutation(len(self.groups))
        for start in range(0, len(order), POOL):
            pool = rng.permutation(np.concatenate([waiting, *(self.groups[g] for g in order[start : start + POOL])]))
            full = len(pool) - len(pool) % self.batch_size
            for window in np.split(pool[:full], range(size, full, size)):
                window = window[np.argsort(self.lengths[window], kind="stable")] if self.window > 1 else window
                yield from rng.permutation(window.reshape(-1, self.batch_size))
            waiting = pool[full:]
        if len(waiting):
            yield waiting


class RowLoader(DataLoader):
    """A DataLoader over TeacherRows that knows where it is: `state_dict` and `load_state_dict` resume in mid-epoch."""

    def __init__(
        self,
        rows: TeacherRows,
        batch_size: int,
        seed: int,
        collate: Callable[[list[Row]], Any],
        workers: int = 0,
        parts: int = 1,
        window: int = 16,
    ):
        """collate: makes a batch of rows. workers: processes that decode. parts: micro-batches per batch.

        window: batches that are sorted by length together, which saves padding; 1 mixes all lengths.
        """
        batches = BucketedBatches(rows.lengths, rows.groups, batch_size, seed, parts, window)
        rows.keep_pool(batch_size)
        super().__init__(rows, batch_sampler=batches, collate_fn=collate, num_workers=workers)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of, from its start."""
        self.batch_sampler.epoch, self.batch_sampler.start = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        batches = self.batch_sampler
        for batch in super().__iter__():
            batches.start += 1  # what was handed out, not what workers have decoded ahead
            yield batch
        self.set_epoch(batches.epoch + 1)

    def state_dict(self) -> dict[str, int]:
        """Epoch, and micro-batches of it that were handed out."""
        return {"epoch": self.batch_sampler.epoch, "batches": self.batch_sampler.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.batch_sampler.epoch, self.batch_sampler.start = state["epoch"], state["batches"]

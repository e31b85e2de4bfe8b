"""Rows in a given order, out of files that hold them in another order, in bounded memory.

Each row group is decoded once, when its first row is needed. Rows whose turn has not come wait in memory; where too
many do, as with a store whose prompts were shuffled since, they wait in a temporary file, sorted.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

import numpy as np
import pyarrow as pa

from pipeline.files import writing_to
from pipeline.store.schema import SCHEMA, Row, from_table, to_table

IN_MEMORY = 2**28  # bytes of rows that wait in memory
READ_AT_ONCE = 2**19  # bytes of each sorted run that are in memory while runs are merged


@dataclass
class Group:
    """Rows that were decoded together, in `size` bytes of memory, and the place of each in the order asked for."""

    places: Sequence[int]
    rows: Sequence[Row]
    size: int

    def __post_init__(self):
        self.left = len(self.rows)
        self.in_a_row = self.places[-1] - self.places[0] == len(self.places) - 1


def in_order(groups: Iterable[Group], folder: Path | None = None) -> Iterator[Row]:
    """The rows of all groups by their places, which are 0, 1, 2, ... with none left out.

    folder: for a temporary file without a name; by default the system's. Raises UserError where it cannot be written.
    """
    with ExitStack() as stack:
        waiting = _Waiting(folder or Path(gettempdir()), stack)
        for group in groups:
            waiting.add(group)
            yield from waiting.ready()
            if waiting.size > IN_MEMORY:
                waiting.spill()


def _alone(row: Row) -> Row:
    """A copy of the row, so that keeping it does not keep its whole group in memory."""
    values = {field.name: getattr(row, field.name) for field in fields(Row)}
    return Row(**{name: value.copy() if isinstance(value, np.ndarray) else value for name, value in values.items()})


class _Waiting:
    """Rows that were decoded before their turn."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.stack, self.file = folder, stack, None
        self.next, self.size = 0, 0
        self.rows: dict[int, tuple[Row, Group]] = {}
        self.runs: list[tuple[int, Row, Iterator[tuple[int, Row]]]] = []  # a heap: first place, its row, the rest

    def add(self, group: Group) -> None:
        self.size += group.size
        for place, row in zip(group.places, group.rows, strict=True):
            self.rows[place] = row, group

    def ready(self) -> Iterator[Row]:
        """The rows whose turn has come."""
        while True:
            if self.next in self.rows:
                row, group = self.rows.pop(self.next)
                group.left -= 1
                self.size -= 0 if group.left else group.size
                row = row if group.in_a_row else _alone(row)
            elif self.runs and self.runs[0][0] == self.next:
                _, row, rest = self.runs[0]
                if following := next(rest, None):
                    heapq.heapreplace(self.runs, (*following, rest))
                else:
                    heapq.heappop(self.runs)
            else:
                return
            self.next += 1
            yield row

    def spill(self) -> None:
        """Move all that waits in memory to the file, as a run in the order of places."""
        with writing_to(self.folder):
            if self.file is None:
                self.file = self.stack.enter_context(TemporaryFile(dir=self.folder))  # noqa: SIM115
            places = sorted(self.rows)
            count = max(1, len(places) * READ_AT_ONCE // self.size)
            pieces = [places[start : start + count] for start in range(0, len(places), count)]
            self.file.seek(0, 2)
            sizes = [
                self.file.write(to_table([self.rows[place][0] for place in piece]).to_batches()[0].serialize())
                for piece in pieces
            ]
            begin = self.file.tell() - sum(sizes)
        self.rows, self.size = {}, 0
        run = self._run(pieces, begin, sizes)
        heapq.heappush(self.runs, (*next(run), run))

    def _run(self, pieces: list[list[int]], begin: int, sizes: list[int]) -> Iterator[tuple[int, Row]]:
        for piece, size in zip(pieces, sizes, strict=True):
            self.file.seek(begin)
            batch = pa.ipc.read_record_batch(pa.py_buffer(self.file.read(size)), SCHEMA)
            yield from zip(piece, from_table(pa.Table.from_batches([batch])), strict=True)
            begin += size

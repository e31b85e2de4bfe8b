"""Batches for several processes: all go through the batches of one, and each takes its part of every micro-batch.

So the order of rows, what a step learns, and where an epoch is left and taken up do not depend on their number.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from pipeline.learning import processes
from pipeline.learning.batches import IGNORED
from pipeline.store.schema import Row

Collate = Callable[[Sequence[Row]], dict[str, Tensor]]


class SharedLoader(DataLoader):
    """This process's parts of the micro-batches of another loader."""

    def __init__(self, whole: DataLoader):
        parts = Parts(whole.batch_sampler, processes.rank(), processes.count())
        super().__init__(
            _Rows(whole.dataset), batch_sampler=parts, collate_fn=_Collate(whole.collate_fn),
            num_workers=whole.num_workers,
        )  # fmt: skip

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def in_memory(rows: Sequence[Row], size: int, seed: int, collate: Collate) -> DataLoader:
    """Micro-batches of `size` rows in the order in which the Trainer reads rows that are in memory."""
    order = SeedableRandomSampler(data_source=rows, data_seed=seed)
    return DataLoader(rows, batch_sampler=BatchSampler(order, size, drop_last=False), collate_fn=collate)


class _Nothing(list):
    """The part of a process for which a micro-batch has no row: one of another's, of which nothing is learned."""


class Parts(Sampler[list[int]]):
    """Part `rank` of `count` of the row numbers of every micro-batch: consecutive ones, as evenly as possible."""

    def __init__(self, batches: Sampler[list[int]], rank: int, count: int):
        self.batches, self.rank, self.count = batches, rank, count

    def set_epoch(self, epoch: int) -> None:
        orders = (self.batches, getattr(self.batches, "sampler", None))
        order = next((each for each in orders if hasattr(each, "set_epoch")), None)
        if order is not None:
            order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            part = np.array_split(np.asarray(batch), self.count)[self.rank].tolist()
            yield part or _Nothing(batch[:1])


class _Rows(Dataset):
    """Rows, and whether they are to be learned from."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __getitems__(self, indices: list[int]) -> tuple[Sequence[Row], bool]:
        several = getattr(self.rows, "__getitems__", None)
        found = several(indices) if several else [self.rows[index] for index in indices]
        return found, not isinstance(indices, _Nothing)


class _Collate:
    """Makes a batch, without a token to learn where there is nothing."""

    def __init__(self, collate: Collate):
        self.collate = collate

    def __call__(self, part: tuple[Sequence[Row], bool]) -> dict[str, Tensor]:
        rows, learned = part
        batch = self.collate(rows)
        if not learned:
            batch["labels"].fill_(IGNORED)
        return batch

"""What one actor of the ray engine does: a table of asks in, a table with a row for each of them out."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline import console
from pipeline.engines.base import Answer, Answers, Ask, Engine, EngineDead, Failure, Loading
from pipeline.errors import reason_of
from pipeline.store.identity import Sampling
from pipeline.store.schema import Columns, to_table

_IDS, _VALUES = pa.list_(pa.int32()), pa.list_(pa.float32())
ASKS = pa.schema([("key", pa.string()), ("prompt_ids", _IDS), ("seed", pa.int64()), ("response_ids", _IDS)])
ANSWERS = pa.schema([  # a failure has a key and a reason alone
    ("key", pa.string()), ("reason", pa.string()), ("response_ids", _IDS), ("finish", pa.string()),
    ("logprobs", _VALUES), ("topk_ids", _IDS), ("topk_logprobs", _VALUES), ("lse", _VALUES), ("tau", _VALUES),
    ("tail", _VALUES), ("dropped", pa.float64()),
])  # fmt: skip


def from_answers(table: pa.Table) -> Answers:
    """The rows of a table of ANSWERS."""
    columns = Columns(table)
    for number in range(len(columns)):
        values = columns.values(number)
        reason = values.pop("reason")
        yield Answer(**values) if reason is None else Failure(values["key"], reason)


@dataclass(frozen=True)
class Job:
    """What is asked of every replica: to sample, or where `sampling` is None to score."""

    k: int
    sampling: Sampling | None = None
    stop_token_ids: tuple[int, ...] = ()
    support: str = "topk"

    def ask(self, engine: Engine, asks: Iterable[Ask]) -> Answers:
        if self.sampling is not None:
            return engine.sample(asks, self.sampling, self.k, support=self.support)
        return engine.score(asks, self.k, self.stop_token_ids, support=self.support)


class Replica:
    """One engine in a process of its own."""

    def __init__(self, folder: Path, loading: Loading):
        self.folder, self.loading, self.engine = folder, loading, None

    def load(self) -> None:
        """Open the engine."""
        console.quiet_libraries()
        from pipeline.engines import open_engine

        self.engine = open_engine(self.loading.replica_engine, self.folder, self.loading)

    def answer(self, job: Job, table: pa.Table) -> pa.Table:
        """A row for each ask. Raises what the engine raises where it cannot serve the job, which is no row's fault."""
        try:
            list(job.ask(self.engine, []))
        except EngineDead as error:
            _end(error)
        columns = Columns(table)
        asks = [Ask(**columns.values(number)) for number in range(len(columns))]
        return to_table(self._answers(job, asks), ANSWERS)

    def _answers(self, job: Job, asks: list[Ask]) -> list[Answer | Failure]:
        """One for each ask: what an exception leaves open is asked again row by row."""
        answers, reason = {}, "the engine gave no answer"
        try:
            for answer in job.ask(self.engine, asks):
                answers[answer.key] = answer
        except EngineDead as error:
            _end(error)
        except Exception as error:
            reason = reason_of(error)
        left = [ask for ask in asks if ask.key not in answers]
        if len(asks) == 1 and left:
            return [Failure(asks[0].key, reason)]
        return [*answers.values(), *(answer for ask in left for answer in self._answers(job, [ask]))]


def _end(error: EngineDead) -> None:
    """End this process: its table is given to another one."""
    print(f"{reason_of(error)}; this replica ends", file=sys.stderr, flush=True)  # to Ray's log of the worker
    os._exit(1)

"""What one actor of the ray engine does: a table of asks in, a table with a row for each of them out."""

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline import console
from pipeline.engines.base import Answer, Ask, Engine, EngineDead, Failure, Loading
from pipeline.errors import reason_of
from pipeline.store.identity import Sampling
from pipeline.store.schema import Columns, to_table

_IDS, _VALUES = pa.list_(pa.int32()), pa.list_(pa.float32())
ASKS = pa.schema([("key", pa.string()), ("prompt_ids", _IDS), ("seed", pa.int64()), ("response_ids", _IDS)])
ANSWERS = pa.schema(
    [
        ("key", pa.string()),
        ("reason", pa.string()),  # of a failure, which has nothing else
        ("response_ids", _IDS),
        ("finish", pa.string()),
        ("logprobs", _VALUES),
        ("topk_ids", _IDS),
        ("topk_logprobs", _VALUES),
        ("lse", _VALUES),
        ("tau", _VALUES),
        ("tail", _VALUES),
        ("dropped", pa.float64()),
    ]
)


def from_answers(table: pa.Table) -> Iterator[Answer | Failure]:
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

    def ask(self, engine: Engine, asks: Iterable[Ask]) -> Iterator[Answer | Failure]:
        if self.sampling is not None:
            return engine.sample(asks, self.sampling, self.k, support=self.support)
        return engine.score(asks, self.k, self.stop_token_ids, support=self.support)


class Replica:
    """One engine in a process of its own."""

    def __init__(self, folder: Path, loading: Loading, job: Job):
        console.quiet_libraries()
        from pipeline.engines import open_engine

        self.engine, self.job = open_engine(loading.replica_engine, folder, loading), job
        list(job.ask(self.engine, []))  # an engine that cannot serve the job fails here, and not at each row

    def __call__(self, table: pa.Table) -> pa.Table:
        columns = Columns(table)
        asks = [Ask(**columns.values(number)) for number in range(len(columns))]
        return to_table(self._answers(asks), ANSWERS)

    def _answers(self, asks: list[Ask]) -> list[Answer | Failure]:
        """One for each ask: what an exception leaves open is asked again row by row."""
        answers, reason = {}, "the engine gave no answer"
        try:
            for answer in self.job.ask(self.engine, asks):
                answers[answer.key] = answer
        except EngineDead as error:
            print(f"{reason_of(error)}; this replica ends", file=sys.stderr, flush=True)  # to Ray's log of the worker
            os._exit(1)  # Ray gives the table to a new process
        except Exception as error:
            reason = reason_of(error)
        left = [ask for ask in asks if ask.key not in answers]
        if len(asks) == 1 and left:
            return [Failure(asks[0].key, reason)]
        return [*answers.values(), *(answer for ask in left for answer in self._answers([ask]))]

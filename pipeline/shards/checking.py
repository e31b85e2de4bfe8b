"""Is a shard what it should be? A quick check whenever a store is read, and a thorough one of every row."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.files import digest, sha256_file
from pipeline.shards.identity import key_of_sample, score_key
from pipeline.shards.schema import SCHEMA, Row, from_table, read_metadata

SHARD = re.compile(r"part-([0-9a-f]{16})\.parquet")
_UNREADABLE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError)
_ROWS_AT_ONCE = 512


class Damaged(Exception):
    """Why a shard cannot be used."""


@dataclass(frozen=True)
class Header:
    """What is known of a shard that passed: tokens a position, and the key of every row."""

    k: int
    keys: list[str]


def check_shard(path: Path, teacher: str, request: str) -> Header:
    """Check a shard's bytes against its name, and what it says of itself against the folder it lies in.

    teacher, request: the identities that name the folder. Raises Damaged.
    """
    name = SHARD.fullmatch(path.name)
    if name is None:
        raise Damaged("not a shard's name")
    try:
        if not sha256_file(path).startswith(name[1]):
            raise Damaged("its content does not match its name")
        metadata = read_metadata(path)
        table = pq.read_table(path, columns=["key"])
        schema = pq.read_schema(path)
    except _UNREADABLE as error:
        raise Damaged(_reason(error)) from error
    if metadata["teacher"]["identity"] != teacher or digest(metadata["request"])[:16] != request:
        raise Damaged("it answers another teacher or request than the folder is for")
    if not schema.equals(SCHEMA):
        raise Damaged("its columns are not those of a shard")
    if not isinstance(metadata["k"], int) or metadata["k"] < 0 or table.column(0).null_count:
        raise Damaged("it has no k, or rows without a key")
    return Header(metadata["k"], table.column(0).to_pylist())


def row_faults(path: Path) -> Iterator[str]:
    """What is wrong with the rows of a readable shard: keys that are not of their tokens, values that cannot be."""
    metadata = read_metadata(path)
    identity, vocabulary = digest(metadata["request"])[:16], metadata["vocab_size"]
    seen: set[str] = set()
    try:
        for batch in pq.ParquetFile(path).iter_batches(_ROWS_AT_ONCE):
            for row in from_table(pa.Table.from_batches([batch]).cast(SCHEMA)):
                problem = _row_fault(row, metadata["request"]["kind"], identity, metadata["k"], vocabulary)
                if row.key in seen:
                    problem = "is there twice"
                seen.add(row.key)
                if problem:
                    yield f"row {row.key} {problem}"
    except _UNREADABLE as error:
        yield f"its rows cannot be read: {_reason(error)}"


def _row_fault(row: Row, kind: str, request: str, k: int, vocabulary: int) -> str | None:
    steps = len(row.response_ids)
    if kind == "sample":
        expected = key_of_sample(request, row.prompt_ids, row.sample)
    else:
        expected = score_key(row.prompt_ids, row.response_ids)
    if row.key != expected:
        return "has a key that is not of its tokens"
    if row.topk_ids.shape != (steps, k) or row.topk_logprobs.shape != (steps, k):
        return f"has not {k} tokens at each of its {steps} positions"
    if k == 0:
        return None
    if row.logprobs is None or len(row.logprobs) != steps or (row.lse is not None and len(row.lse) != steps):
        return f"has not a value for each of its {steps} positions"
    ids = np.concatenate([row.topk_ids.ravel(), row.response_ids, row.prompt_ids])
    if ids.min(initial=0) < 0 or row.topk_ids.max(initial=0) >= vocabulary:
        return f"has token ids outside the vocabulary of {vocabulary}"
    # -inf is a token that cannot be said; rounding may put a certain one a little above 0.
    values = np.concatenate([row.logprobs, row.topk_logprobs.astype(np.float32).ravel()])
    if np.isnan(values).any() or values.max(initial=-1) > 0.01:
        return "has log-probabilities that are none"
    if (np.diff(row.topk_logprobs.astype(np.float32), axis=1) > 0).any():
        return "has its top k out of order"
    if row.lse is not None and not np.isfinite(row.lse).all():
        return "has normalisers that are no numbers"
    return None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

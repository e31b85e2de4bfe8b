"""Is a shard what it should be? A quick check whenever a store is read, and a thorough check of every row."""

import errno
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import cannot_read, digest, sha256_file
from pipeline.store import schema
from pipeline.store.identity import key_of_sample, score_key
from pipeline.store.narrowing import stored_weights
from pipeline.store.schema import SCHEMAS, SUPPORT, Columns, Malformed, Row, value_fault

SHARD = re.compile(r"part-([0-9a-f]{16})\.parquet")
# What a reader can raise because of a file's bytes, beside OSError. Anything else is an error of our own code, or too
# little memory, and must never set a shard aside.
UNREADABLE = (
    Malformed, pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, pa.ArrowKeyError, pa.ArrowIndexError,
    pa.ArrowSerializationError, pa.ArrowCapacityError, UnicodeDecodeError,
)  # fmt: skip
_OF_THE_FILE = (None, errno.ENOENT, errno.ELOOP)  # errors of the system that do not pass
_ROWS_AT_ONCE = 512
_ORIGINS, _FINISHES = {"teacher", "reference", "student", "corrupted"}, {"stop", "length"}
_NEVER_NULL = [name for name in schema.SCHEMA.names if name not in ("logprobs", "lse", *SUPPORT)]
_ROUNDING = 0.05  # of log-probabilities: float16, and two ways of adding up
_WEIGHTS = 5e-3  # how far from 1 the weights of a position may sum: float16 is off by 2^-11 of a log-probability


class Damaged(Exception):
    """Why a shard cannot be used."""


@dataclass(frozen=True)
class Header:
    """What is known of a shard that passed: tokens per position, which ones, and the key of every row."""

    k: int
    support: str | None
    keys: list[str]


def check_shard(path: Path, teacher: str, request: str) -> Header:
    """Check a shard's bytes against its name, and its footer against its rows and the folder it lies in.

    teacher, request: the identities that name the folder. Raises Damaged, and UserError for a file that may be whole
    but cannot be read now.
    """
    name = SHARD.fullmatch(path.name)
    if name is None:
        raise Damaged("not a shard's name")
    try:
        if not sha256_file(path).startswith(name[1]):
            raise Damaged("its content does not match its name")
        with pq.ParquetFile(path) as file:
            metadata = schema.checked_metadata(file.schema_arrow)
            if metadata["teacher"]["identity"] != teacher or digest(metadata["request"])[:16] != request:
                raise Damaged("it answers another teacher or request than the folder is for")
            if not file.schema_arrow.equals(SCHEMAS[metadata["schema_version"]]):
                raise Damaged("its columns are not those of a shard")
            if fault := _count_fault(file.metadata, metadata):
                raise Damaged(fault)
            keys = file.read(columns=["key"]).column(0)
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            raise Damaged(text_of(error)) from error
        raise cannot_read(path, error) from error
    except UNREADABLE as error:
        raise Damaged(text_of(error)) from error
    if keys.null_count:
        raise Damaged("it has rows without a key")
    return Header(metadata["k"], metadata["support"], keys.to_pylist())


def _count_fault(metadata: pq.FileMetaData, footer: dict) -> str | None:
    """What the footer counts that the columns do not hold, or None."""
    rows, tokens, k = footer.get("rows"), footer.get("tokens"), footer["k"]
    if rows != metadata.num_rows or rows == 0:
        return f"its footer counts {rows} rows, but it has {metadata.num_rows}"
    values: Counter[str] = Counter()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            values[column.path_in_schema.split(".")[0]] += column.num_values
    # Responses without tokens: each counts as a value.
    empty = values["response_ids"] - (-1 if tokens is None else tokens)
    if not 0 <= empty <= rows:
        return f"its footer counts {tokens} tokens, which its responses do not have"
    if any(values[name] != (tokens * k + empty if k else rows) for name in ("topk_ids", "topk_logprobs")):
        return f"it does not have the {k} tokens per position that its footer promises"
    support, steps = footer["support"], values["response_ids"]  # a null counts as a value too
    if values["logprobs"] != (steps if support else rows) or values["lse"] not in (steps if support else rows, rows):
        return "it does not have one log-probability and normaliser per token"
    tau, tail = (values.get(name, rows) for name in SUPPORT)
    if tau != (steps if support == "sampled" else rows) or tail not in (steps if support == "topk" else rows, rows):
        return f"it does not have the tau and tail of its support, {support or 'text alone'}"
    return None


def row_faults(path: Path) -> Iterator[str]:
    """What is wrong with the rows of a readable shard: keys that do not fit their tokens, impossible values."""
    seen, number = set(), -1
    try:
        metadata = schema.read_metadata(path)
        request = metadata["request"]
        check = RowCheck(request, digest(request)[:16], metadata["k"], metadata["vocab_size"], metadata["support"])
        for batch in pq.ParquetFile(path).iter_batches(_ROWS_AT_ONCE):
            rows = Columns(pa.Table.from_batches([batch]))
            for place in range(len(rows)):
                number += 1
                row = rows[place]
                problem = "is there twice" if row.key in seen else check.fault(row)
                seen.add(row.key)
                if problem:
                    yield f"row {row.key} {problem}"
    except (*UNREADABLE, OSError) as error:
        yield f"{f'row {number} (from 0)' if number >= 0 else 'it'} cannot be read: {text_of(error)}"


class RowCheck:
    """Checks the rows of one file: are they what the footer says, and can a teacher have said that?"""

    def __init__(self, request: dict, identity: str, k: int, vocabulary: int, support: str | None):
        """request: the footer's; identity: its digest, on which the keys of samples depend."""
        self.request, self.identity, self.k, self.vocabulary, self.support = request, identity, k, vocabulary, support
        sampling = request.get("sampling") or {}
        self.longest = sampling.get("max_tokens") if request.get("kind") == "sample" else None

    def fault(self, row: Row) -> str | None:
        """What is wrong with a row, or None."""
        if absent := [name for name in _NEVER_NULL if getattr(row, name) is None]:
            return f"has no {' and no '.join(absent)}"
        if row.key != self._key(row):
            return "has a key that does not fit its tokens"
        if row.origin not in _ORIGINS or row.finish not in _FINISHES:
            return f"has an unknown origin or finish: '{row.origin}', '{row.finish}'"
        steps = len(row.response_ids)
        if self.longest is not None and steps > self.longest:
            return f"has {steps} tokens, but at most {self.longest} were asked for"
        ids = np.concatenate([row.topk_ids.ravel(), row.response_ids, row.prompt_ids])
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= self.vocabulary:
            return f"has token ids outside the vocabulary of {self.vocabulary}"
        if steps and (row.topk_ids.shape != (steps, self.k) or row.topk_logprobs.shape != (steps, self.k)):
            return f"does not have {self.k} tokens at each of its {steps} positions"
        if (row.logprobs is None) != (self.support is None):
            return "has log-probabilities in a file of text alone, or none in one that has them"
        if (row.tau is None) == (self.support == "sampled") or (row.tail is not None and self.support != "topk"):
            return f"does not have the tau and tail of its support, {self.support or 'text alone'}"
        return self._value_fault(row, steps) if self.support else None

    def _key(self, row: Row) -> str:
        if self.request.get("kind") == "sample":
            return key_of_sample(self.identity, row.prompt_ids, row.sample)
        return score_key(row.prompt_ids, row.response_ids)

    def _value_fault(self, row: Row, steps: int) -> str | None:
        values = (row.logprobs, row.lse, row.tau, row.tail)
        if any(each is not None and len(each) != steps for each in values):
            return f"does not have a value for each of its {steps} positions"
        if not steps:
            return None
        if fault := value_fault(row):  # what `generate` would refuse to select
            return fault.removeprefix("it ")
        topk = row.topk_logprobs.astype(np.float32)
        if max(topk.max(initial=-np.inf), row.logprobs.max()) > 0.01:  # rounding may put a certain token a little above
            return "has log-probabilities above 0"
        if (topk[:, 1:] > topk[:, :-1]).any():
            return "has its top k out of order"
        if (np.diff(np.sort(row.topk_ids, axis=1), axis=1) == 0).any():
            return "has a token twice in the top k of a position"
        if fault := _plain_fault(topk, row.tail) if row.tau is None else _tau_fault(topk, row.tau):
            return fault
        said = row.topk_ids == row.response_ids[:, None]
        listed = said.any(axis=1)
        if (np.abs(row.logprobs[listed] - topk[said]) > _ROUNDING + np.abs(topk[said]) / 512).any():
            return "has log-probabilities that are not those of its tokens in the top k"
        if row.tau is not None:  # 1e-6: for tokens that exist only as padding of the embedding and are never kept
            if (row.logprobs[~listed] > np.log(row.tau[~listed] + 1e-6) + _ROUNDING).any():
                return "has a token that was not kept and is likelier than its tau"
        elif self.k and (row.logprobs[~listed] > topk[~listed, -1] + _ROUNDING).any():
            return "has a token outside the top k that is likelier than those in it"
        return None


def _plain_fault(topk: np.ndarray, tail: np.ndarray | None) -> str | None:
    """What is wrong with the mass of a top k [T, k] and that of the other tokens [T]."""
    mass = np.exp(topk.astype(np.float64)).sum(axis=1)
    if mass.max() > 1.02 or (topk.size and mass.min() == 0):
        return f"has a top k of probability {mass.max() if mass.max() > 1.02 else 0:.3g}"
    # A row stored with fewer tokens per position keeps those, and its tail is from a second reading.
    if tail is not None and (tail.max() > 1.001 or np.abs(mass + tail - 1).max() > _ROUNDING):
        return f"has a tail of {tail[np.abs(mass + tail - 1).argmax()]:.3g} that is not the rest of its top k"
    return None


def _tau_fault(topk: np.ndarray, tau: np.ndarray) -> str | None:
    """What is wrong with tau [T]: with it the weights max(p, tau) of the kept tokens [T, k] sum to 1."""
    if tau.max() > 1.001:
        return f"has a tau of {tau.max():.3g}"
    weights = stored_weights(topk, tau).sum(axis=1)
    wrong = weights[np.abs(weights - 1).argmax()]
    return f"has kept tokens whose weights sum to {wrong:.3g}: its tau is wrong" if abs(wrong - 1) > _WEIGHTS else None


def text_of(error: Exception) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__

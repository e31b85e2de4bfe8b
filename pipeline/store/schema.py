"""What a shard holds: plain Arrow columns, one row per response, and its self-describing footer."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 2
METADATA_KEY = b"xkd"
_IDS, _VALUES = pa.list_(pa.int32()), pa.list_(pa.float32())
SCHEMA = pa.schema([
    ("key", pa.string()), ("origin", pa.string()), ("prompt_id", pa.string()), ("sample", pa.int16()),
    ("prompt", pa.string()), ("response", pa.string()), ("prompt_ids", _IDS), ("response_ids", _IDS),
    ("finish", pa.string()), ("logprobs", _VALUES), ("topk_ids", _IDS), ("topk_logprobs", pa.list_(pa.float16())),
    ("lse", _VALUES), ("tau", _VALUES), ("tail", _VALUES),
])  # fmt: skip
SUPPORT = ("tau", "tail")  # columns that version 1 did not have: null there
SCHEMAS = {1: pa.schema([field for field in SCHEMA if field.name not in SUPPORT]), SCHEMA_VERSION: SCHEMA}
_SAMPLING = {"temperature": (int, float), "top_p": (int, float), "max_tokens": (int,), "stop_token_ids": (list,)}
TEXT, TOPK = ("prompt", "response"), ("topk_ids", "topk_logprobs")
KEPT = (*TOPK, *SUPPORT)  # like TEXT, columns that readers may leave out
# The high bytes of ids are predictable and the low ones are not: split, they take a fifth less (docs/store-cost.md).
# DuckDB 2.0 cannot read byte-split float16, so `topk_logprobs` stays plain (about 22 bytes per token more at k = 50).
_BYTE_SPLIT = ("prompt_ids", "response_ids", "topk_ids", "logprobs", "lse", "tau", "tail")
ROW_GROUP_VALUES = 2**19  # top-k entries of a row group: what a reader must have in memory, about 3 MB
_DICTIONARY = ["origin", "prompt_id", "prompt", "finish"]


class Malformed(ValueError):
    """A file that is not what this version writes; its bytes are the reason, not an error of ours."""


@dataclass(frozen=True, slots=True)
class Row:
    """One response of T tokens with the teacher's view of it. The names are the columns'."""

    key: str
    origin: str  # teacher | reference | student | corrupted
    prompt_id: str
    sample: int
    prompt: str  # None, as `response`, where it was not read
    response: str
    prompt_ids: np.ndarray  # int32 [P]
    response_ids: np.ndarray  # int32 [T]
    finish: str  # stop | length
    logprobs: np.ndarray | None  # float32 [T], full vocabulary, temperature 1; None in text-only rows
    topk_ids: np.ndarray  # int32 [T, k], kept tokens in rank order
    topk_logprobs: np.ndarray  # float16 [T, k]
    lse: np.ndarray | None  # float32 [T], log-sum-exp of the raw logits
    tau: np.ndarray | None = None  # float32 [T], threshold of a sampled support; None for a plain top k
    tail: np.ndarray | None = None  # float32 [T], mass outside a plain top k, taken before rounding

    @property
    def k(self) -> int:
        return self.topk_ids.shape[1]

    @classmethod
    def bare(cls, prompt_ids: np.ndarray, response_ids: np.ndarray, finish: str = "stop") -> "Row":
        """Tokens that no teacher has seen."""
        none = np.empty((len(response_ids), 0))
        return cls("", "", "", 0, "", "", prompt_ids, response_ids, finish, None, none, none, None)


def value_fault(row) -> str | None:
    """Which values of a row (or answer) no teacher can have given, or None.

    In the top k, below its first entry, -inf is valid: a token of probability 0.
    """
    if row.logprobs is None or not len(row.logprobs):
        return None
    if not np.isfinite(row.logprobs).all():
        return "it has log-probabilities of its tokens that are not finite"
    if row.lse is not None and not np.isfinite(row.lse).all():
        return "it has normalisers that are not finite"
    topk = np.asarray(row.topk_logprobs)
    if np.isnan(topk).any() or np.isposinf(topk).any() or not np.isfinite(topk[:, :1]).all():
        return "it has a top k with log-probabilities that are NaN or infinite"
    for name in SUPPORT:
        values = getattr(row, name)
        if values is not None and not (np.isfinite(values).all() and (values >= 0).all()):
            return f"it has values of {name} that are negative or not finite"
    return None


def finish_of(response_ids: np.ndarray, stop_token_ids: Sequence[int]) -> str:
    """`stop` where a response ends with a stop token, else `length`."""
    return "stop" if len(response_ids) and int(response_ids[-1]) in stop_token_ids else "length"


def row_digest(row: Row) -> bytes:
    """sha256 of a row's labels, tokens and values; the same as version 1 made of the rows that it wrote."""
    hasher = hashlib.sha256(f"{row.key} {row.origin} {row.prompt_id} {row.sample} {row.finish}".encode())
    for values in (row.prompt_ids, row.response_ids, row.logprobs, row.topk_ids, row.topk_logprobs, row.lse):
        hasher.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())
    for name in SUPPORT:
        if (values := getattr(row, name)) is not None:
            hasher.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return hasher.digest()


def to_table(rows: Sequence, schema: pa.Schema = SCHEMA) -> pa.Table:
    """A table of rows: objects with the columns as attributes, null where one is absent."""
    columns = []
    for field in schema:
        values = [getattr(row, field.name, None) for row in rows]
        if pa.types.is_list(field.type):
            dtype = field.type.value_type.to_pandas_dtype()
            values = [None if value is None else np.asarray(value, dtype).ravel() for value in values]
        columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


class Columns(Sequence[Row]):
    """The rows of a table, made when they are asked for; their arrays are views of Arrow memory, the top k as [T, k].

    Raises Malformed, when it is made, for a row whose top k does not fit its response.
    """

    def __init__(self, table: pa.Table):
        self._length = len(table)
        self._columns = {
            field.name: _Lists(column) if pa.types.is_list(field.type) else column.to_pylist()
            for field, column in zip(table.schema, table.columns, strict=True)
        }

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        return Row(**self.values(index))

    def values(self, index: int) -> dict:
        """A row's value of every column, also in a table with other columns than SCHEMA."""
        return {name: self.value(name, index) for name in self._columns}

    def value(self, name: str, index: int):
        """A row's value of one column; None where the table has no such column."""
        value = self._columns[name][index] if name in self._columns else None
        if value is None or name not in TOPK:
            return value
        response = self._columns["response_ids"][index]
        steps = 0 if response is None else len(response)
        if value.size % steps if steps else value.size:
            raise Malformed(f"row {index} has {value.size} entries in {name} for {steps} tokens")
        return value.reshape(steps, -1) if steps else value.reshape(0, self._k(name))

    def _k(self, name: str) -> int:
        """Tokens per position, also for a row without positions; 0 where no row has one."""
        return len(self._columns[name].flat) // max(len(self._columns["response_ids"].flat), 1)


class _Lists:
    """A column of lists, each a view [T] of one array; None for a null."""

    def __init__(self, column: pa.ChunkedArray):
        lists = column.combine_chunks()
        self.flat = lists.values.to_numpy(zero_copy_only=True)
        self.bounds = lists.offsets.to_pylist()
        self.valid = lists.is_valid().to_pylist() if lists.null_count else None

    def __getitem__(self, index: int) -> np.ndarray | None:
        if self.valid and not self.valid[index]:
            return None
        return self.flat[self.bounds[index] : self.bounds[index + 1]]


def from_table(table: pa.Table) -> list[Row]:
    """All rows of a table of any version's schema."""
    return list(Columns(table))


def footer(teacher: dict, request: dict, k: int, support: str | None = "topk", **more) -> dict:
    """What every file says of itself: whose answers to what, how many tokens per position, which ones, and `more`.

    support: sampled (pipeline.objectives.supports) or topk; None for text alone.
    """
    return {
        "schema_version": SCHEMA_VERSION, "teacher": teacher, "request": request, "k": k, "support": support,
        "vocab_size": teacher["vocab_size"], **more,
    }  # fmt: skip


def write_shard(path: Path, rows: Sequence[Row], metadata: dict) -> None:
    """One Parquet file; `metadata` goes into its footer as JSON, with the numbers of `rows` and response `tokens`."""
    counts = {"rows": len(rows), "tokens": sum(len(row.response_ids) for row in rows)}
    write_row_groups(path, row_groups(rows), metadata | counts)


def row_groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in groups of about as many values, so that a reader's memory does not depend on their lengths."""
    group: list[Row] = []
    values = 0
    for row in rows:
        group.append(row)
        values += len(row.prompt_ids) + len(row.response_ids) * (1 + row.k)
        if values >= ROW_GROUP_VALUES:
            yield group
            group, values = [], 0
    if group:
        yield group


def write_row_groups(
    path: Path, groups: Iterable[Sequence[Row]], metadata: dict, more: Sequence[pa.Field] = ()
) -> None:
    """One Parquet file with a row group for each of `groups`: zstd, no dictionary on values, 4-byte ones byte-split.

    more: further columns, which the rows have as attributes.
    """
    schema = pa.schema([*SCHEMA, *more], {METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    encoding = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _BYTE_SPLIT}
    options = {"compression": "zstd", "use_dictionary": _DICTIONARY, "column_encoding": encoding}
    with pq.ParquetWriter(path, schema, **options) as writer:
        for rows in groups:
            writer.write_table(to_table(rows, schema))


def group_ends(metadata: pq.FileMetaData) -> np.ndarray:
    """Number of the row after the last of each row group, int [G]."""
    return np.cumsum([metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)])


def read_metadata(source: Path | BinaryIO) -> dict:
    """The footer's JSON, of any version with its `support`. Raises Malformed where it lacks what `footer` writes."""
    return checked_metadata(pq.read_schema(source))


def checked_metadata(schema: pa.Schema) -> dict:
    """`read_metadata` of a schema that was read already."""
    metadata = schema.metadata or {}
    if METADATA_KEY not in metadata:
        raise Malformed("the footer has no xkd metadata")
    try:
        entries = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the footer's xkd metadata is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise Malformed("the footer's xkd metadata is not a JSON object")
    version = entries.get("schema_version")
    if type(version) is not int or version not in SCHEMAS:
        raise Malformed(f"schema version {version}, expected one of {', '.join(map(str, SCHEMAS))}")
    teacher = entries.get("teacher")
    wrong = [name for name in ("k", "vocab_size") if type(entries.get(name)) is not int or entries[name] < 0]
    wrong += [name for name in ("rows", "tokens") if type(entries.get(name, 0)) is not int or entries.get(name, 0) < 0]
    wrong += [name for name in ("engine",) if not isinstance(entries.get(name, {}), dict)]
    if not isinstance(teacher, dict) or not isinstance(teacher.get("identity"), str):
        wrong.append("teacher")
    if not _is_request(entries.get("request")):
        wrong.append("request")
    if version > 1 and not is_support(entries.get("support", ""), entries.get("k")):
        wrong.append("support")
    if wrong:
        raise Malformed(f"the footer's xkd metadata has no valid {' or '.join(wrong)}")
    return with_support(entries)


def is_support(support: object, k: object) -> bool:
    """Whether k tokens per position can be of that support: a sample has at least one, text alone has none."""
    return support == "topk" or (support == "sampled" and k != 0) or (support is None and k == 0)


def with_support(described: dict) -> dict:
    """A footer or manifest with its `support`, which version 1 did not say: a top k, or text alone."""
    return described if "support" in described else described | {"support": "topk" if described["k"] else None}


def _is_request(request: object) -> bool:
    """Whether it is of the form that `Request.describe` writes."""
    if not isinstance(request, dict) or request.get("kind") not in ("sample", "score"):
        return False
    if request["kind"] == "score":
        return request.get("sampling") is None
    sampling = request.get("sampling")
    return isinstance(sampling, dict) and all(type(sampling.get(name)) in types for name, types in _SAMPLING.items())


def response_lengths(path: Path) -> dict[str, int]:
    """Response tokens of every row of a shard, by key."""
    import pyarrow.compute as pc

    keys, responses = pq.read_table(path, columns=["key", "response_ids"]).columns
    return dict(zip(keys.to_pylist(), pc.list_value_length(responses).to_pylist(), strict=True))

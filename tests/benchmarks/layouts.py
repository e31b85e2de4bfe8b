"""Can plain Parquet keep the top k in fewer bytes? Types, encodings, levels and orders of the two columns.

    python -m tests.benchmarks.layouts OUT [--k 50]      # after tests.benchmarks.fidelity, whose OUT this is

Each layout is written to a file of its own, read back and compared; bytes per token are of the compressed columns. For
values: the largest error of a probability and KL(true || stored) over the k + 1 outcomes, in nats per token.
Prints Markdown tables, the last of whole shards with what keeps the schema.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store import schema
from pipeline.store.narrowing import narrowed
from pipeline.store.schema import Row
from tests.benchmarks.fidelity import loss, read, read_truth, size

SPLIT, DELTA, DICTIONARY = "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "dictionary"


@dataclass(frozen=True)
class Layout:
    """How [N, k] numbers are kept in a column of lists, one per response."""

    name: str
    stored: np.ndarray  # [N, k]
    decode: Callable[[np.ndarray], np.ndarray] = lambda stored: stored
    encoding: str | None = None  # None: plain
    level: int = 1  # of zstd; 1 is what pyarrow takes, and `write_shard`
    order: str = "row"  # row: a token's k ranks together; rank: a rank's tokens together; columns: one column per rank
    page: int = 2**20  # bytes


def quickest(do: Callable[[], object]) -> float:
    """Seconds of the fastest of three."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        do()
        times.append(time.perf_counter() - begun)
    return min(times)


def readable_by_duckdb(path: Path) -> bool:
    try:
        duckdb.sql(f"select * from read_parquet('{path}')").fetchall()
    except duckdb.Error:
        return False
    return True


def columns(layout: Layout, lengths: np.ndarray) -> dict[str, pa.Array]:
    """The layout as columns of lists, `lengths` tokens per response."""

    def lists(values: np.ndarray, width: int) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(lengths * width)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    k = layout.stored.shape[1]
    if layout.order == "columns":
        return {f"rank_{rank:03}": lists(np.ascontiguousarray(layout.stored[:, rank]), 1) for rank in range(k)}
    responses = np.split(layout.stored, np.cumsum(lengths)[:-1])
    turned = [response.T if layout.order == "rank" else response for response in responses]
    return {"top": lists(np.concatenate([response.ravel() for response in turned]), k)}


def stored_in(table: pa.Table, layout: Layout, lengths: np.ndarray) -> np.ndarray:
    """[N, k] of what `columns` made."""
    flat = [table.column(name).combine_chunks().values.to_numpy() for name in table.column_names]
    if layout.order == "columns":
        return np.stack(flat, 1)
    k = layout.stored.shape[1]
    if layout.order == "row":
        return flat[0].reshape(-1, k)
    return np.concatenate([part.reshape(k, -1).T for part in np.split(flat[0], np.cumsum(lengths)[:-1] * k)])


def measure(layout: Layout, lengths: np.ndarray, path: Path) -> dict:
    """Bytes per token, tokens written and read per second, whether DuckDB reads it, and [N, k] as decoded."""
    table, tokens = pa.table(columns(layout, lengths)), len(layout.stored)
    encodings = {f"{name}.list.element": layout.encoding for name in table.column_names}

    def write() -> None:
        pq.write_table(
            table, path, compression="zstd", compression_level=layout.level, data_page_size=layout.page,
            use_dictionary=layout.encoding == DICTIONARY,
            column_encoding=encodings if layout.encoding in (SPLIT, DELTA) else None,
        )  # fmt: skip

    writing, reading = quickest(write), quickest(lambda: pq.read_table(path))
    back = stored_in(pq.read_table(path), layout, lengths)
    np.testing.assert_array_equal(back, layout.stored)
    group = pq.ParquetFile(path).metadata.row_group(0)
    return {
        "bytes": sum(group.column(i).total_compressed_size for i in range(group.num_columns)) / tokens,
        "written": tokens / writing,
        "read": tokens / reading,
        "duckdb": readable_by_duckdb(path),
        "decoded": layout.decode(back),
    }


def on_a_grid(values: np.ndarray, error: float = 9e-4, coarsest: float = 0.125) -> np.ndarray:
    """Log-probabilities [N, k] rounded to multiples of a power of two, the coarser the smaller the probability.

    A probability moves by at most about `error`, a log-probability by at most `coarsest` / 2. Ranks stay in order,
    since every step begins at a multiple of itself. The likeliest token keeps its value: the tail depends on it most.
    """
    rounded, step = values.astype(np.float64), 2.0**-10
    original = rounded.copy()
    while step <= coarsest:
        below = np.floor(np.log(2 * error / step) / step) * step  # where exp(x) * step / 2 is at most the error
        rounded = np.where(original < min(below, 0.0), np.round(original / step) * step, rounded)
        step *= 2
    rounded[:, 0] = values[:, 0]
    return np.minimum(rounded, rounded[:, :1])


def by_frequency(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids renumbered from the most to the least frequent one, and the table that undoes it."""
    distinct, counts = np.unique(ids, return_counts=True)
    table = distinct[np.argsort(-counts, kind="stable")]
    number = np.empty(ids.max() + 1, np.int32)
    number[table] = np.arange(len(table))
    return number[ids], table


def of_ids(ids: np.ndarray) -> Iterator[Layout]:
    """Everything that keeps the ids [N, k] exactly."""
    yield Layout("int32", ids)
    yield Layout("int32, zstd 3", ids, level=3)
    yield Layout("int32, zstd 9", ids, level=9)
    yield Layout("int32, zstd 19", ids, level=19)
    yield Layout("int32, zstd 19, pages of 16 MiB", ids, level=19, page=2**24)
    yield Layout("int32, byte-split, as `write_shard` writes it", ids, encoding=SPLIT)
    yield Layout("int32, byte-split, zstd 9", ids, encoding=SPLIT, level=9)
    yield Layout("int32, byte-split, zstd 19", ids, encoding=SPLIT, level=19)
    yield Layout("int32, byte-split, zstd 9, pages of 16 MiB", ids, encoding=SPLIT, level=9, page=2**24)
    yield Layout("int32, delta", ids, encoding=DELTA)
    yield Layout("int32, dictionary", ids, encoding=DICTIONARY)
    if ids.max() < 2**16:
        yield Layout("uint16, zstd 19", ids.astype(np.uint16), level=19)
        yield Layout("uint16, byte-split, zstd 9", ids.astype(np.uint16), encoding=SPLIT, level=9)
    yield Layout("int32, ranks together", ids, order="rank")
    yield Layout("int32, ranks together, byte-split, zstd 9", ids, encoding=SPLIT, level=9, order="rank")
    yield Layout("one column per rank, byte-split, zstd 9", ids, encoding=SPLIT, level=9, order="columns")
    yield Layout("one column per rank, dictionary, zstd 9", ids, encoding=DICTIONARY, level=9, order="columns")
    renumbered, table = by_frequency(ids)
    yield Layout("renumbered by frequency, byte-split, zstd 9", renumbered, lambda n: table[n], SPLIT, 9)
    yield Layout("sorted by id, delta, zstd 9 (loses the ranks)", np.sort(ids, 1), encoding=DELTA, level=9)


def of_values(values: np.ndarray) -> Iterator[Layout]:
    """Log-probabilities [N, k], float32, more or less exactly."""
    half, grid = values.astype(np.float16), on_a_grid(values).astype(np.float16)
    finer = on_a_grid(values, coarsest=1 / 32).astype(np.float16)
    yield Layout("float32, byte-split", values, encoding=SPLIT)
    yield Layout("float16's values in float32, byte-split", half.astype(np.float32), encoding=SPLIT)
    yield Layout("float16, as `write_shard` writes it", half)
    yield Layout("float16, zstd 9", half, level=9)
    yield Layout("float16, zstd 19", half, level=19)
    yield Layout("float16, byte-split", half, encoding=SPLIT)
    yield Layout("float16, dictionary", half, encoding=DICTIONARY)
    yield Layout("float16, ranks together, zstd 9", half, level=9, order="rank")
    yield Layout("float16, one column per rank, zstd 9", half, level=9, order="columns")
    yield Layout("float16 on a grid", grid)
    yield Layout("float16 on a grid, zstd 9", grid, level=9)
    yield Layout("float16 on a grid, zstd 19", grid, level=19)
    yield Layout("float16 on a grid of at most 1/32, zstd 9", finer, level=9)
    yield Layout("the grid's values in float32, byte-split", grid.astype(np.float32), encoding=SPLIT)
    yield Layout("float16 on a grid, dictionary, zstd 9", grid, encoding=DICTIONARY, level=9)
    yield Layout("float16 on a grid, ranks together, zstd 9", grid, level=9, order="rank")
    yield Layout("float16 on a grid, one column per rank, zstd 9", grid, level=9, order="columns")

    def root(top: int, type_: type) -> np.ndarray:
        return np.round(np.exp(values / 2) * top).astype(type_)

    def unroot(top: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda stored: 2 * np.log(np.maximum(stored, 0.25) / top)

    yield Layout("sqrt(p) in 10 bits, uint16, byte-split, zstd 9", root(1023, np.uint16), unroot(1023), SPLIT, 9)
    yield Layout("sqrt(p) in 8 bits, uint8, zstd 9", root(255, np.uint8), unroot(255), level=9)
    fixed = np.round(values * -512).astype(np.int32)
    steps = np.diff(fixed, axis=1, prepend=0)
    yield Layout("steps of 1/512 nat, int32, byte-split, zstd 9", steps, lambda s: s.cumsum(1) / -512, SPLIT, 9)


@contextmanager
def written_with(split: Sequence[str], level: int) -> Iterator[None]:
    """`write_shard` with these columns of ids byte-split, and another level of zstd."""
    leveled = partial(pq.ParquetWriter, compression_level=level)
    columns = mock.patch.object(schema, "_BYTE_SPLIT", ("logprobs", "lse", *split))
    with columns, mock.patch.object(schema.pq, "ParquetWriter", leveled):
        yield


def whole_shards(rows: Sequence[Row], metadata: dict, sizes: Sequence[int]) -> None:
    """A table of what `write_shard` makes with options that keep the schema."""
    tokens = sum(len(row.response_ids) for row in rows)
    ids = ("topk_ids", "prompt_ids", "response_ids")
    ways = {
        "no ids byte-split": ((), 1, np.asarray),
        "topk_ids byte-split": (ids[:1], 1, np.asarray),
        "as it is: all ids byte-split": (ids, 1, np.asarray),
        "all ids byte-split, zstd 9": (ids, 9, np.asarray),
        "all ids byte-split, values on a grid": (ids, 1, on_a_grid),
        "all ids byte-split, zstd 9, values on a grid": (ids, 9, on_a_grid),
    }
    print("\n| whole shard | k | bytes per token | of the top k | written, read: million tokens/s | DuckDB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.parquet"
        for name, (split, level, rounded) in ways.items():
            for k in sizes:
                cut = [narrowed(row, k, "topk") for row in rows]
                made = [replace(r, topk_logprobs=rounded(r.topk_logprobs).astype(np.float16)) for r in cut]
                with written_with(split, level):
                    writing = quickest(lambda made=made: schema.write_shard(path, made, metadata))
                reading = quickest(lambda: schema.from_table(pq.read_table(path)))
                of_file, speed = size(path, tokens), f"{tokens / writing / 1e6:.2f}, {tokens / reading / 1e6:.2f}"
                readable = "yes" if readable_by_duckdb(path) else "no"
                print(f"| {name} | {k} | {of_file['bytes']:.1f} | {of_file['topk_bytes']:.1f} | {speed} | {readable} |")


def table(title: str, layouts: Iterator[Layout], lengths: np.ndarray, judge: Callable[[np.ndarray], Sequence]) -> None:
    """One line per layout; `judge` makes more cells of what was decoded."""
    print(f"\n| {title} | bytes per token | written, read: million tokens/s | DuckDB | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts:
            measured = measure(layout, lengths, Path(folder) / "layout.parquet")
            speed = f"{measured['written'] / 1e6:.2f}, {measured['read'] / 1e6:.2f}"
            cells = (layout.name, f"{measured['bytes']:.1f}", speed, "yes" if measured["duckdb"] else "no")
            print(f"| {' | '.join(cells)} | {judge(measured['decoded'])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--k", type=int, default=50)
    options = parser.parse_args()
    metadata = schema.read_metadata(options.out / "answers.parquet")
    rows, truth = read(options.out / "answers.parquet", "float32"), read_truth(options.out)
    lengths = np.array([len(row.response_ids) for row in rows])
    ids = np.concatenate([row.topk_ids for row in rows])[:, : options.k].copy()
    values = np.concatenate([row.topk_logprobs for row in rows])[:, : options.k].copy()

    def exact(decoded: np.ndarray) -> str:
        return "exact" if np.array_equal(decoded, ids) else "the ranks are lost"

    def errors(decoded: np.ndarray) -> str:
        lost = loss(truth, decoded)
        ordered = "" if (np.diff(decoded, axis=1) <= 0).all() else ", ranks not in order"
        return f"largest error {lost['largest_error']:.1e}, KL {lost['rounding_kl']:.1e}{ordered}"

    table("ids", of_ids(ids), lengths, exact)
    table("values", of_values(values), lengths, errors)
    whole_shards(rows, metadata, (16, options.k))


if __name__ == "__main__":
    main()

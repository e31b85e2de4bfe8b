"""What a selection costs whose prompts come in another order than the store's rows: CPU time, shuffled over sorted.

    python -m tests.benchmarks.shuffled [--rows 40000] [--tokens 24] [-k 32] [--repeat 3] [--memory MIB]

Makes a store of random rows, `rows_per_shard` of them in each shard, and writes selections of all of it in turns: in
the order in which the rows were stored, and shuffled. Prints the CPU seconds of each, their medians and the medians'
ratio as JSON, and how far Arrow's memory grew. Bar: 1.5. `--memory` lowers the bytes that may wait in memory, so that
the shuffled rows go through the temporary file.
"""

import argparse
import json
import threading
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from pipeline.store.identity import Request
from pipeline.store.requests import RequestFolder
from pipeline.store.schema import Row, footer
from pipeline.store.selection_files import Part, write_selection

VOCABULARY = 32_000
TEACHER = {"identity": "0" * 16, "vocab_size": VOCABULARY, "tokenizer": "t", "name": None, "licence": None}
REQUEST = Request("score", "{prompt}", 1)


def make_row(number: int, tokens: int, k: int, rng: np.random.Generator) -> Row:
    ids = rng.integers(0, VOCABULARY, (tokens, k), dtype=np.int32)
    logprobs = -rng.random((tokens, k), np.float32)
    return Row(
        key=f"{number:032x}", origin="teacher", prompt_id=f"p{number}", sample=0, prompt=f"prompt {number}",
        response=f"response {number}", prompt_ids=ids[:, 1].copy(), response_ids=ids[:, 0].copy(), finish="stop",
        logprobs=logprobs[:, 0].copy(), topk_ids=ids, topk_logprobs=logprobs.astype(np.float16),
        lse=logprobs[:, 0].copy(),
    )  # fmt: skip


def fill(store: Path, rows: int, tokens: int, k: int, rows_per_shard: int) -> RequestFolder:
    """A request of which shard after shard holds the rows by number."""
    folder, rng = RequestFolder(store, TEACHER["identity"], REQUEST.identity), np.random.default_rng(0)
    footing = footer(TEACHER, REQUEST.describe(), k)
    for start in range(0, rows, rows_per_shard):
        numbers = range(start, min(rows, start + rows_per_shard))
        folder.add([make_row(number, tokens, k, rng) for number in numbers], footing)
    return folder


def select(folder: RequestFolder, order: np.ndarray, k: int, out: Path) -> tuple[float, int]:
    """CPU seconds of writing the selection of these rows in this order, and the most bytes that Arrow took for it."""
    index, part = folder.index(), Part(folder, REQUEST)
    for number in order.tolist():
        part.add(f"p{number}", f"{number:032x}", "teacher", index[f"{number:032x}"][0])
    before, highest, done = pa.total_allocated_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], pa.total_allocated_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.process_time()
    write_selection(out, {"train": part}, TEACHER, k, 0, True)
    seconds = time.process_time() - begun
    done.set()
    watcher.join()
    return seconds, highest[0]


def main(rows: int, tokens: int, k: int, rows_per_shard: int, repeat: int) -> dict:
    """CPU seconds and memory of both orders, measured in turns, and the ratio of the median seconds."""
    orders = {"sorted": np.arange(rows), "shuffled": np.random.default_rng(1).permutation(rows)}
    seconds, memory = ({name: [] for name in orders} for _ in range(2))
    with TemporaryDirectory() as work:
        folder = fill(Path(work) / "store", rows, tokens, k, rows_per_shard)
        for number in range(repeat):
            for name, order in orders.items():
                took, highest = select(folder, order, k, Path(work) / f"{name}-{number}")
                seconds[name].append(took)
                memory[name].append(highest)
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "rows": rows, "tokens": tokens, "k": k, "rows_per_shard": rows_per_shard, "cpu_seconds": seconds,
        "median": medians, "shuffled_over_sorted": medians["shuffled"] / medians["sorted"],
        "arrow_bytes": {name: max(values) for name, values in memory.items()},
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--rows-per-shard", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=float, help="MiB of rows that may wait in memory")
    options = parser.parse_args()
    if options.memory is not None:
        from pipeline.store import ordering

        ordering.IN_MEMORY = int(options.memory * 2**20)
    result = main(options.rows, options.tokens, options.k, options.rows_per_shard, options.repeat)
    print(json.dumps(result, indent=2))

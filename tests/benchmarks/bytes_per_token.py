"""How many bytes a response token takes in a shard, for several k, with everything that a shard holds.

    python -m tests.benchmarks.bytes_per_token SELECTION     # out of `xkd-pipeline generate -k 128`, of either support

Writes the selection's training rows anew for each k up to its own, once as they are and once with their token ids
spread at random over a vocabulary of 152,064, and prints the sizes and the straight line through them as JSON.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.store.narrowing import narrowed
from pipeline.store.schema import Row, footer, write_shard
from pipeline.store.selection import Selection

SIZES = (1, 8, 16, 32, 64, 128)
VOCABULARY = 152_064


def measured(rows: list[Row], k: int, support: str) -> float:
    """Bytes per response token of one shard that holds `rows` with k tokens per position."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.parquet"
        write_shard(shard, rows, footer({"vocab_size": VOCABULARY}, {}, k, support))
        return shard.stat().st_size / sum(len(row.response_ids) for row in rows)


def main(folder: Path) -> dict:
    selection = Selection(folder)
    rows = list(selection.rows("train"))
    spread = np.random.default_rng(0).permutation(VOCABULARY).astype(np.int32)
    sizes: dict[str, dict[int, float]] = {"own ids": {}, "ids over 152,064": {}}
    for k in (k for k in SIZES if k <= selection.k):
        less = [narrowed(row, k, selection.support) for row in rows]
        wide = [
            replace(row, topk_ids=spread[row.topk_ids], response_ids=spread[row.response_ids]) for row in less
        ]  # fmt: skip
        for name, these in zip(sizes, (less, wide), strict=True):
            sizes[name][k] = measured(these, k, selection.support)
    fits = {}
    for name, values in sizes.items():
        slope, start = np.polyfit(list(values), list(values.values()), 1)
        fits[name] = {"bytes": values, "line": f"{start:.1f} + {slope:.3f} k"}
    tokens = {name: sum(len(getattr(row, name)) for row in rows) for name in ("prompt_ids", "response_ids")}
    return {"support": selection.support, "rows": len(rows), **tokens, **fits}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(json.dumps(main(Path(sys.argv[1])), indent=2))

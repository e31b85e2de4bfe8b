"""How many bytes a response token takes in a shard, for several k, with everything that a shard holds.

    python -m tests.benchmarks.bytes_a_token SELECTION     # out of `xkd-pipeline generate -k 128`

Writes the selection's training rows anew for each k up to its own, once as they are and once with their token ids
spread at random over a vocabulary of 152,064, and prints the sizes and the straight line through them as JSON.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.shards.schema import Row, footer, write_shard
from pipeline.shards.selection import Selection

SIZES = (1, 8, 16, 32, 64, 128)
VOCABULARY = 152_064


def measured(rows: list[Row], k: int) -> float:
    """Bytes a response token of one shard that holds `rows` with k tokens a position."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.parquet"
        write_shard(shard, [row.trimmed(k) for row in rows], footer({"vocab_size": VOCABULARY}, {}, k))
        return shard.stat().st_size / sum(len(row.response_ids) for row in rows)


def main(folder: Path) -> dict:
    rows = list(Selection(folder).rows("train"))
    sizes = [k for k in SIZES if k <= rows[0].k]
    spread = np.random.default_rng(0).permutation(VOCABULARY).astype(np.int32)
    wide = [
        replace(row, topk_ids=spread[row.topk_ids], response_ids=spread[row.response_ids]) for row in rows
    ]  # fmt: skip
    found = {}
    for name, these in (("own ids", rows), ("ids over 152,064", wide)):
        values = [measured(these, k) for k in sizes]
        slope, start = np.polyfit(sizes, values, 1)
        found[name] = {"bytes": dict(zip(sizes, values, strict=True)), "line": f"{start:.1f} + {slope:.3f} k"}
    tokens = {name: sum(len(getattr(row, name)) for row in rows) for name in ("prompt_ids", "response_ids")}
    return {"rows": len(rows), **tokens, **found}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(json.dumps(main(Path(sys.argv[1])), indent=2))

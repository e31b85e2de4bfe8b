"""Is the KL that cached tokens estimate right? Against the exact one, on the held-out rows of a finished run.

    python -m tests.benchmarks.estimates [DRAWS [FOLDER]]     # after `dvc repro`, in the same folder

Runs the teacher over its cached held-out samples beside three models: the student before and after distillation, and
that of the plain loss. The supports (k tokens per position) are drawn DRAWS times (200) with new offsets, and the KL
that each draw estimates is compared with the exact one over the whole vocabulary. Prints, as JSON, for each model: the
exact KL(T || S), the mean error and its standard error, the error of single draws (root mean square, largest), and that
of the draw which the cache holds; all but the first as shares of the exact KL.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.learning.batches import collate
from pipeline.learning.closeness import LogitSource
from pipeline.models import load_lm
from pipeline.objectives.divergences import forward_kl
from pipeline.objectives.logprobs import TopK
from pipeline.objectives.sparse import sparse_divergence
from pipeline.objectives.supports import systematic
from pipeline.store.schema import Row
from pipeline.store.selection import Selection
from tests.references import sparse_logprobs

MODELS = {"start": "models/student", "plain": "plain", "distilled": "student"}
_BATCH = 32


def measured(teacher: LogitSource, model: LogitSource, rows: list[Row], draws: int, seed: int = 0) -> dict[str, float]:
    """What is printed of one model."""
    k, tokens, exact = rows[0].k, 0, 0.0
    estimates, cached = np.zeros(draws), 0.0
    divergence, generator = sparse_divergence("fkl", tail="sampled"), torch.Generator().manual_seed(seed)
    for start in range(0, len(rows), _BATCH):
        batch = collate(rows[start : start + _BATCH])
        mask = batch["labels"] != -100
        labels = batch["labels"][mask]
        t, s = (torch.log_softmax(source.at(batch)(slice(None)).float(), -1) for source in (teacher, model))
        exact += float(forward_kl(t, s).double().sum())
        tokens += len(labels)

        def estimate(ids: Tensor, logprobs: Tensor, tau: Tensor, s: Tensor = s, labels: Tensor = labels) -> float:
            seen = sparse_logprobs(s, ids, labels)
            return float(divergence(TopK(ids, logprobs.half(), tau), seen).double().sum())

        cached += estimate(batch["topk_ids"][mask], batch["topk_logprobs"][mask], batch["tau"][mask])
        for draw in range(draws):
            offset = torch.rand(len(t), generator=generator, dtype=torch.float64)
            ids, tau = systematic(t.exp(), k, offset)
            estimates[draw] += estimate(ids, t.gather(-1, ids), tau)
    exact, errors, cached = exact / tokens, estimates / tokens - exact / tokens, cached / tokens - exact / tokens
    return {
        "exact": exact,
        "mean_error": errors.mean() / exact,
        "standard_error": errors.std(ddof=1) / draws**0.5 / exact,
        "root_mean_square": (errors**2).mean() ** 0.5 / exact,
        "largest": np.abs(errors).max() / exact,
        "cached": cached / exact,
    }


@torch.no_grad()
def main(draws: int = 200, folder: Path = Path("data")) -> dict[str, dict[str, float]]:
    rows = [row for row in Selection(folder / "teacher").rows("validation") if len(row.response_ids)]
    teacher = LogitSource(load_lm(folder / "models" / "teacher"), "the teacher")
    return {
        name: measured(teacher, LogitSource(load_lm(folder / path), name), rows, draws) for name, path in MODELS.items()
    }


if __name__ == "__main__":
    if len(sys.argv) > 3:
        sys.exit(__doc__)
    print(json.dumps(main(*map(int, sys.argv[1:2]), *map(Path, sys.argv[2:])), indent=2))

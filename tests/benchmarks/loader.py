"""What reading costs beside training: seconds to decode a batch, as a share of a step of the smallest student.

    python -m tests.benchmarks.loader SELECTION STUDENT     # data/teacher and data/models/student, after `dvc repro`

Both are timed in turns in one process, without workers: the loader's next batch (Parquet to padded tensors), then
forward, backward and optimiser step of plain `fkl` on it. Prints medians and their ratio as JSON. Bar: 0.05.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from pipeline.learning.batches import collate
from pipeline.learning.divergence import Divergence
from pipeline.learning.learner import StudentLearner, count
from pipeline.models import load_lm
from pipeline.store.selection import Selection
from pipeline.store.training_rows import RowLoader, TeacherRows

BATCH, STEPS, EPOCH_SEED = 32, 200, 0


def main(selection: Path, student: Path) -> dict:
    """Seconds per batch and per step, and their ratio; the first epoch's start-up is in the mean, not in the median."""
    rows = TeacherRows(Selection(selection), "train", text=False)
    loader = RowLoader(rows, BATCH, EPOCH_SEED, partial(collate, topk=True))
    learner = StudentLearner(load_lm(student).train(), [Divergence("fkl")])
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    reading, training = [], []
    while len(training) < STEPS:
        batches = iter(loader)
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            read = time.perf_counter()
            learner(count(batch, learner.terminal), **batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            training.append(time.perf_counter() - read)
            reading.append(read - begun)
    return {
        "rows": len(rows), "batch": BATCH, "steps": len(training), "parameters": learner.student.num_parameters(),
        "batch_seconds": {"median": median(reading), "mean": sum(reading) / len(reading)},
        "step_seconds": {"median": median(training), "mean": sum(training) / len(training)},
        "share_of_step": sum(reading) / sum(training), "share_of_step_median": median(reading) / median(training),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("selection", type=Path)
    parser.add_argument("student", type=Path)
    options = parser.parse_args()
    print(json.dumps(main(options.selection, options.student), indent=2))

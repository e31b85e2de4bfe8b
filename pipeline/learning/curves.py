"""Training histories as CSV files, which `dvc plots` draws."""

import csv
from collections.abc import Sequence
from pathlib import Path

_DROPPED = {"epoch", "grad_norm", "learning_rate", "total_flos"}


def split_history(history: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """A Trainer's log as training rows and held-out rows (prefix eval_ removed), each with its step."""
    training, held_out = [], []
    for entry in history:
        if "train_runtime" in entry:  # the closing line: totals of time, not a point of the curve
            continue
        row = {name.removeprefix("eval_"): value for name, value in entry.items() if name not in _DROPPED}
        (held_out if any(name.startswith("eval_") for name in entry) else training).append(row)
    return training, held_out


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Rows of one shape, `step` first; an empty file with that header where there are none."""
    columns = ["step", *sorted({name for row in rows for name in row} - {"step"})]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

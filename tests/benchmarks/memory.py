"""What gradient checkpointing and bf16 save: peak memory and CPU time of a few steps, each in a process of its own.

python -m tests.benchmarks.memory                 # a table as Markdown, for a model of 8.9 million parameters
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tests.conftest import ROOT

CELLS = ("float32", "float32 with checkpointing", "bf16", "bf16 with checkpointing")
STEPS, BATCH, PROMPT, RESPONSE, VOCABULARY = 4, 16, 20, 200, 1000


def train(cell: str) -> None:
    """Train a new model on random tokens; prints the bytes and seconds of this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.learning.job import Job, Training
    from pipeline.learning.learner import StudentLearner
    from pipeline.learning.terms import Likelihood
    from pipeline.learning.trainer import run
    from pipeline.params import Optimisation, Train
    from pipeline.store.schema import Row

    torch.manual_seed(0)
    size = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=1024, **size))
    rng = np.random.default_rng(0)
    sequences = rng.integers(4, VOCABULARY, (2 * BATCH, PROMPT + RESPONSE)).astype(np.int32)
    rows = [Row.bare(sequence[:PROMPT], sequence[PROMPT:]) for sequence in sequences]
    precision = cell.split()[0]
    with TemporaryDirectory() as folder:
        optimisation = Optimisation(steps=STEPS, batch_size=BATCH, learning_rate=1e-3, precision=precision)
        job = Job(
            what=cell, make="", optimisation=optimisation, seed=0, run=Path(folder), log_every=1,
            train=Train(gradient_checkpointing="checkpointing" in cell),
        )  # fmt: skip
        run(job, Training(StudentLearner(model.train(), [Likelihood()]), rows))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.process_time())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cell", choices=CELLS, help="of which to print bytes and seconds; default: a table of all")
    options = parser.parse_args()
    if options.cell:
        train(options.cell)
        return
    command, found = [sys.executable, "-m", "tests.benchmarks.memory", "--cell"], {}
    for cell in CELLS:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, cell], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        found[cell] = [float(number) for number in done.stdout.split()]
    print("| | " + " | ".join(CELLS) + " |\n|" + "---|" * (len(CELLS) + 1))
    print("| peak | " + " | ".join(f"{size / 1e9:.2f} GB" for size, _ in found.values()) + " |")
    print(f"| CPU time, {STEPS} steps, start included | " + " | ".join(f"{s:.0f} s" for _, s in found.values()) + " |")


if __name__ == "__main__":
    main()

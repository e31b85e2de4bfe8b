"""Whether several processes learn what one learns: loss curves and weights of the same trainings, by their number.

    python -m tests.benchmarks.parity OUT                          # a table for 2 and 3 processes
    python -m tests.benchmarks.parity OUT --processes 2 --cells teach fkl

Every cell is a stage on tiny random models in float32 on CPUs, with one global batch for all numbers of processes, an
uneven last batch, and responses of different lengths. It is trained in this process first; then as many processes
as asked for are started once, and each trains all cells. Exits with 1 where something differs by more than its bar.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch

from pipeline.learning import processes
from pipeline.learning.job import Job, Trained
from pipeline.learning.trainer import run
from tests.conftest import ROOT, make_model, make_params, make_prompts, make_seq2seq_model

CURVE_BAR, WEIGHTS_BAR = 1e-4, 1e-4  # largest relative difference of a logged loss, largest difference of a weight
HALF_BAR = 2**-8  # of a loss in bf16: its rounding
SIZES = ("distill.optimisation.steps=20", "distill.optimisation.batch_size=13", "max_tokens=20")
CELLS: dict[str, tuple[str, tuple[str, ...]]] = {  # stage, and what is set
    "teach": ("teach", ()),
    "teach, accumulated": ("teach", ("teach.student.optimisation.accumulation=2",)),
    "fkl": ("distill", ("distill.reward=none",)),
    "fkl, accumulated": (
        "distill",
        ("distill.reward=none", "distill.optimisation.batch_size=12", "distill.optimisation.accumulation=3"),
    ),
    "fkl, gradient checkpointing": ("distill", ("distill.reward=none", "train.gradient_checkpointing=true")),
    "fkl, bf16": ("distill", ("distill.reward=none", "distill.optimisation.precision=bf16")),
    "jsd, sorted by length": ("distill", ("distill.reward=none", "distill.objective=jsd", "distill.window=2")),
    "fkl, LoRA": ("distill", ("distill.reward=none", "distill.lora.rank=4")),
    "x-rkl, frozen": ("distill", ("distill.objective=rkl", "distill.reward=frozen")),
    "x-fkl, joint": ("distill", ("distill.reward=joint",)),
    "x-fkl, scratch": ("distill", ("distill.reward=scratch",)),
    "reward": ("reward", ("reward.negatives=always",)),
    "reward with a policy": ("reward", ("reward.fit=policy", "reward.negatives=never")),
}
MODELS = {"causal": ("causal", False), "T5, tied": ("t5", True), "T5, untied": ("t5", False)}
OF_MODELS = {"causal": tuple(CELLS), "T5, tied": ("fkl", "x-rkl, frozen"), "T5, untied": ("fkl",)}


@contextmanager
def recording(out: Path, name: str, names: dict[str, str]):
    """Have the stages train in this process, and note every job, and what it trained, under a number of this name."""
    from stages import distill, teach
    from stages.reward import fit

    def launch(job: Job, training) -> Trained:
        trained, number = run(job, training), f"{len(names):03}"
        names[number] = name
        (out / "jobs").mkdir(exist_ok=True)
        (out / "jobs" / f"{number}.json").write_text(job.model_dump_json())
        keep(out / "1", number, trained)
        return trained

    modules = (distill, teach, fit)
    before = [module.launch for module in modules]
    try:
        for module in modules:
            module.launch = launch
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.launch = function


def make_inputs(folder: Path, model: Callable[[Path, int], Path]) -> dict[str, Path]:
    """Models, prompts, the cached teacher, what it scored, and a reward."""
    from stages.generate import generate
    from stages.reward import reward
    from stages.score import score

    teacher, student = model(folder / "teacher", 0), model(folder / "student", 1)
    prompts = make_prompts(folder / "prompts.parquet", train=40, validation=8)
    params = make_params(teacher, *SIZES, "prepare.task=translation")
    generate(params, prompts, folder / "selection", folder / "store")
    score(params, prompts, student, folder / "scored", folder / "store")
    out = folder / "reward", folder / "audit", folder / "runs"
    reward(params, folder / "selection", student, *out, scored_path=folder / "scored", prompts_path=prompts)
    return {"teacher": teacher, "student": student, "prompts": prompts, "folder": folder}


def train_cell(cell: str, inputs: Mapping[str, Path], out: Path) -> None:
    """Run the cell's stage."""
    from stages.distill import distill
    from stages.reward import reward
    from stages.teach import teach

    stage, settings = CELLS[cell]
    teacher, student, prompts, folder = inputs.values()
    taught = "teach.student.optimisation.steps=20", "teach.student.optimisation.batch_size=12"
    sizes = (*SIZES, *taught, f"teach.student.base={student}", "teach.student.split=train")
    params = make_params(teacher, *sizes, "prepare.task=translation", *settings)
    selection, scored, of = folder / "selection", folder / "scored", (out / "made", out / "metrics", out / "runs")
    if stage == "teach":
        teach(params, "student", prompts, student, out / "made", out / "runs")
    elif stage == "distill":
        distill(params, selection, student, folder / "reward", *of, scored_path=scored)
    else:
        reward(params, selection, student, *of, scored_path=scored, prompts_path=prompts)


def keep(folder: Path, name: str, trained: Trained) -> None:
    """Write weights and history."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_model(trained.learner, str(folder / f"{name}.safetensors"))
    (folder / f"{name}.json").write_text(json.dumps(trained.history))


def train_all(out: Path) -> None:
    """One of several processes: train every job."""
    for path in sorted((out / "jobs").glob("*.json")):
        job = Job.model_validate_json(path.read_text())
        place = out / str(processes.launched())
        trained = run(job.model_copy(update={"run": place / "runs" / path.stem}))
        if processes.rank() == 0:
            keep(place, path.stem, trained)
    processes.leave()


def in_processes(out: Path, count: int) -> None:
    """Train every job of OUT/jobs in so many processes; what they made lies in OUT/COUNT."""
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "tests.benchmarks.parity"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, str(out), "--train"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{count} processes ended with {done.returncode}:\n{done.stderr[-5000:]}")


def difference(one: Path, several: Path, name: str) -> dict[str, float]:
    """Largest relative difference of a logged loss, and largest difference of a weight."""
    curves = [
        [value for entry in json.loads((place / f"{name}.json").read_text()) for key, value in entry.items()
         if "loss" in key or key.startswith("eval_")]
        for place in (one, several)
    ]  # fmt: skip
    weights = [safetensors.torch.load_file(place / f"{name}.safetensors") for place in (one, several)]
    assert weights[0].keys() == weights[1].keys() and len(curves[0]) == len(curves[1]) > 0
    return {
        "curve": max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(*curves, strict=True)),
        "weights": max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # one of several processes
    options = parser.parse_args(arguments)
    if options.train:
        train_all(options.out)
        return 0
    names: dict[str, str] = {}
    for number, model in enumerate(options.models):
        kind, tied = MODELS[model]
        make = (lambda path, seed: make_model(path, seed, width=32)) if kind == "causal" else None
        make = make or (lambda path, seed, tied=tied: make_seq2seq_model(path, seed, tied=tied))
        inputs = make_inputs(options.out / f"inputs{number}", make)
        for cell in (cell for cell in options.cells if cell in OF_MODELS[model]):
            with recording(options.out, f"{cell} | {model}", names):
                train_cell(cell, inputs, options.out / "made" / f"{number} {cell}")
    print("| training | model | processes | loss curve, relative | weights |\n|---|---|---|---|---|")
    worst = 0.0
    for count in options.processes:
        in_processes(options.out, count)
        for number, name in names.items():
            found = difference(options.out / "1", options.out / str(count), number)
            print(f"| {name} | {count} | {found['curve']:.1e} | {found['weights']:.1e} |", flush=True)
            bars = {"curve": HALF_BAR} if "bf16" in name else {"curve": CURVE_BAR, "weights": WEIGHTS_BAR}
            worst = max(worst, *(found[what] / bar for what, bar in bars.items()))
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())

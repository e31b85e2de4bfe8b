"""One training, described in JSON: another process can make the same learner of it, and train it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipeline.learning.batches import collate
from pipeline.learning.learner import Learner
from pipeline.params import Optimisation, Train
from pipeline.store.schema import Row

_TOKENS = partial(collate, topk=False)


@dataclass(frozen=True)
class Training:
    """What a job trains, in this process's memory."""

    learner: Learner
    rows: Sequence[Row]
    held_out: Sequence[Row] = ()
    collate: Callable[[Sequence[Row]], dict[str, Tensor]] = _TOKENS
    # (rows, batch size, seed, collate, workers, micro-batches) to batches, in place of the Trainer's: see RowLoader
    loader: Callable | None = None


class Job(BaseModel):
    """A training: what is trained, how, and the folder of its checkpoints.

    `make` names the function of this project, `module:function`, that makes the `Training` of `inputs`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    """What is trained, as messages call it."""
    make: str
    inputs: dict[str, Any] = {}
    """Paths and settings, as JSON holds them."""
    optimisation: Optimisation
    seed: int
    run: Path
    """Checkpoints. The newest whole one that is already there is resumed from, so a killed run goes on where it was;
    the caller removes the folder once what was trained is saved."""
    log_every: int
    evaluate_every: int | None = None
    save_every: int | None = None
    best: str = ""
    """With it, and save_every as evaluate_every, the learner ends with the weights of this mean's best held-out
    value; empty: with the last ones."""
    patience: int = 0
    """Evaluations without a better one before the training ends; 0: it goes on."""
    report_to: list[str] = []
    """Trackers of transformers, by name; TensorBoard's files go to `logs` beside the stages' folders of checkpoints."""
    workers: int = 0
    """Processes that make batches."""
    train: Train = Train()
    """Processes, and what is kept in memory."""

    def training(self) -> Training:
        """What is trained, made anew."""
        module, _, function = self.make.partition(":")
        if module.split(".")[0] not in ("pipeline", "stages"):
            raise ValueError(f"{self.make} is not a function of this project")
        return getattr(import_module(module), function)(**self.inputs)


@dataclass(frozen=True)
class Trained:
    """What a job left: the learner, trained in place, the Trainer's log history, and how long the first step took."""

    learner: Learner
    history: list[dict]
    seconds_to_first_step: float | None = None  # since the process began; None where nothing was left to do

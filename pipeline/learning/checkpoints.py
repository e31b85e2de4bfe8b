"""What a training keeps while it runs, in a folder of its own: checkpoints, also of the step where a signal stopped it.

The folder is removed by the stage, once what was trained is saved.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from pipeline import interrupts
from pipeline.files import read_text, write_json_atomically
from pipeline.learning import processes

ASIDE = "interrupted"  # folder for a checkpoint of a step that has none in an undisturbed run
_STATE = "trainer_state.json"  # the file that the Trainer writes last


class StopAtSignal(TrainerCallback):
    """After a signal, the running step is finished and kept in a checkpoint, and no other is begun.

    A signal to one of several processes stops them all.
    """

    def __init__(self, what: str):
        """what: the name of what is trained, for the interrupt's message."""
        self.what = what
        self.saved = 0  # the last step that has a checkpoint; 0 where none has

    def on_train_begin(self, args, state, control, **_):
        self._has_saved(state.global_step)

    def on_step_begin(self, args, state, control, **_):
        if is_stopping() and state.global_step == self.saved:
            raise interrupts.interrupted()

    def on_step_end(self, args, state, control, **_):
        if is_stopping():
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO

    on_log = on_evaluate = on_step_end

    def on_save(self, args, state, control, **_):
        self._has_saved(state.global_step)
        if is_stopping():
            control.should_training_stop = True

    def _has_saved(self, step: int) -> None:
        self.saved = step
        keeps_up_to(step, self.what)


def is_stopping() -> bool:
    """Whether a signal came to one of the processes, each of which asks."""
    return processes.any_of(interrupts.noted() is not None)


def keeps_up_to(step: int, what: str) -> None:
    """Have an interrupt's message say what a checkpoint of this step is worth; step 0: there is none."""
    kept = f"What was made up to step {step} of {what} is kept; run the same command to go on"
    interrupts.keeps(kept if step else f"Nothing of {what} is kept yet; run the same command again")


def whole_checkpoint(run: Path) -> str | None:
    """The newest checkpoint that was written to its end; others, left by a kill, are removed."""
    whole = None
    for folder in sorted([*run.glob("checkpoint-*"), *run.glob(f"{ASIDE}/checkpoint-*")], key=step_of):
        try:
            json.loads(read_text(folder / _STATE))
            whole = folder
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(folder)
    return None if whole is None else str(whole)


def step_of(checkpoint: str | Path) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])


def finished(learner: nn.Module, checkpoint: str, steps: int) -> list[dict] | None:
    """The history of a training that had ended at this checkpoint, its weights loaded into the learner; else None.

    The Trainer would take one step more.
    """
    state = json.loads((Path(checkpoint) / _STATE).read_text(encoding="utf-8"))
    stopper = state["stateful_callbacks"].get("EarlyStoppingCallback")
    patience = stopper["args"]["early_stopping_patience"] if stopper else 1
    waited = stopper["attributes"]["early_stopping_patience_counter"] if stopper else 0
    if state["global_step"] < steps and waited < patience:
        return None
    best = state["best_model_checkpoint"] or checkpoint
    safetensors.torch.load_model(learner, str(Path(best) / "model.safetensors"))
    return state["log_history"]


def once(run: Path, learner: nn.Module, training: Callable[[], list[dict]]) -> list[dict]:
    """The history of `training()`, which leaves its weights in the learner; after a kill both are read, not made again.

    Once it is finished, `run` keeps its weights and its history in place of its checkpoints.
    """
    weights, history_file = run / "finished.safetensors", run / "history.json"
    if history_file.is_file():
        safetensors.torch.load_model(learner, str(weights))
        history = json.loads(history_file.read_text(encoding="utf-8"))
    else:
        history = training()
        run.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(learner, str(weights))
        write_json_atomically(history_file, history)
    interrupts.keeps("What was fitted so far is kept; run the same command to go on")
    for checkpoint in (run / ASIDE, *run.glob("checkpoint-*")):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return history

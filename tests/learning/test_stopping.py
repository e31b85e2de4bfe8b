"""What holds for training that a signal stops: the step is kept, and the same command ends as if nothing had happened.

Signals are real, and so are the processes that they come to.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
from transformers import TrainerCallback, trainer

from pipeline import interrupts
from pipeline.errors import Interrupted
from pipeline.learning.curves import split_history
from pipeline.learning.trainer import run as train
from pipeline.learning.trainer import seed_everything
from tests.conftest import ROOT
from tests.learning.test_training import make_job, make_learner, make_training
from tests.processes import Run, run, start, whole_checkpoints

pytestmark = pytest.mark.slow
STEPS = 12


class SignalAt(TrainerCallback):
    """Sends this process a signal at an event of a step; without a step, at the first of them."""

    def __init__(self, event: str | None, step: int | None):
        self.event, self.step = event, step

    def __getattribute__(self, name: str):
        if name.startswith("on_") and name == self.event:
            return self.send
        return super().__getattribute__(name)

    def send(self, args, state, control, **_):
        if self.step is None or state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def training(student: Path, folder: Path, form: str, event: str | None, step: int | None) -> None:
    """A training with dropout, evaluations that have no checkpoint, and points of the curve that span both."""
    interrupts.install()
    interrupts.begin()
    seed_everything(0)
    learner = make_learner(student)
    for layer in learner.student.model.layers:
        layer.self_attn.attention_dropout = 0.3
    early = form == "out of patience"
    job = make_job(
        folder / "run", STEPS, 3.0 if early else 0.02, 8, 2, what="it", log_every=3, evaluate_every=2, save_every=4,
        best="" if form == "last" else "loss", patience=2 if early else 0,
    )  # fmt: skip
    trainer.DEFAULT_CALLBACKS.append(SignalAt(event, step))  # of this process alone
    try:
        history = train(job, make_training(learner, 26, 6)).history
    except Interrupted as error:
        print(error.kept, flush=True)
        interrupts.end()
        sys.exit(128 + error.signal)
    (folder / "history.json").write_text(json.dumps(split_history(history), sort_keys=True))
    safetensors.torch.save_model(learner, str(folder / "model.safetensors"))


def results(folder: Path) -> tuple[str, bytes]:
    return (folder / "history.json").read_text(), (folder / "model.safetensors").read_bytes()


FORMS = ("last", "best", "out of patience")


@pytest.fixture(scope="module")
def undisturbed(student, tmp_path_factory):
    found = {}
    for form in FORMS:
        folder = tmp_path_factory.mktemp("undisturbed")
        code, said = run(student, folder, form, None, None, function=training, log=folder / "log")
        assert code == 0, said
        found[form] = results(folder)
    history, _ = json.loads(found["out of patience"][0])
    assert 0 < history[-1]["step"] < STEPS, "it must have stopped early"
    return found


@pytest.mark.parametrize("form", FORMS)
def test_training_that_is_interrupted_in_every_step_ends_as_an_undisturbed_one(student, tmp_path, undisturbed, form):
    for number in range(1, 2 * STEPS):
        code, said = run(
            student, tmp_path, form, "on_pre_optimizer_step", None, function=training, log=tmp_path / "log"
        )
        if code == 0:
            break
        assert code == 130 and f"What was made up to step {number} of it is kept" in said, said
        assert said.count("it: interrupted; the step that is running is finished and kept in a checkpoint") == 1
    assert number > 4 and results(tmp_path) == undisturbed[form]


@pytest.mark.parametrize(
    ("event", "step", "kept"),
    [("on_evaluate", 6, 6), ("on_log", 9, 9), ("on_save", 4, 4), ("on_substep_end", 8, 9), ("on_train_end", 12, 12)],
)
def test_an_interrupt_keeps_the_step_whenever_it_comes(student, tmp_path, undisturbed, event, step, kept):
    code, said = run(student, tmp_path, "best", event, step, function=training, log=tmp_path / "log")
    assert code == 130 and f"What was made up to step {kept} of it is kept" in said, said
    assert "Traceback" not in said
    code, said = run(student, tmp_path, "best", None, None, function=training, log=tmp_path / "log")
    assert code == 0 and "it: resuming from" in said and results(tmp_path) == undisturbed["best"]


def test_before_the_first_step_nothing_is_kept_and_the_message_says_so(student, tmp_path, undisturbed):
    code, said = run(student, tmp_path, "best", "on_train_begin", None, function=training, log=tmp_path / "log")
    assert code == 130 and "Nothing of it is kept yet; run the same command again" in said, said
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_checkpoint_of_the_last_step_is_not_trained_further(student, tmp_path, undisturbed):
    """As after a kill between the end of the training and the saving of the model."""
    for form in FORMS:
        folder = tmp_path / form.replace(" ", "-")
        folder.mkdir()
        for _ in range(2):
            code, said = run(student, folder, form, None, None, function=training, log=folder / "log")
            assert code == 0 and results(folder) == undisturbed[form], said


# The stages


def train_options(kind: str, folder: Path, cache: Path, student: Path) -> tuple:
    steps = 60
    common = "--runs", folder / "runs", "--params", ROOT / "tests" / "smoke.yaml"
    if kind == "teach":
        key, command = "teach.student", ("teach", "student", "--prompts", cache / "prompts.parquet")
        command = *command, "--tokenizer", student, "--out", folder / "out"
    elif kind == "distill":
        key, command = "distill", ("distill", "--selection", cache / "selection", "--student", student)
        command = *command, "--out", folder / "out", "--metrics", folder / "metrics", "--set", "distill.reward=none"
    else:
        key, command = "reward", ("reward", "--selection", cache / "selection", "--student", student)
        command = *command, "--out", folder / "out", "--audit", folder / "metrics", "--set", "reward.patience=100"
    every = "evaluate_every" if kind == "reward" else "save_every"
    return *command, *common, "--set", f"{key}.optimisation.steps={steps}", "--set", f"{key}.{every}=10"


def outputs(folder: Path) -> dict[str, bytes]:
    """What a stage writes, but for what names times and versions."""
    found = [path for name in ("out", "metrics") for path in (folder / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.name != "results.json"}


def interrupt(process: Run, runs: Path, number: signal.Signals, group: bool = False) -> int:
    """Interrupt a training soon after its next checkpoint, if it comes to that."""
    before = set(runs.rglob("trainer_state.json"))
    while process.process.is_alive() and not set(runs.rglob("trainer_state.json")) - before:
        pass
    process.send(number, group=group)
    return process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("kind", ["teach", "distill", "reward"])
def test_a_stage_that_is_interrupted_goes_on_and_writes_the_same_bytes(cache, student, tmp_path, kind, number):
    for name in ("interrupted", "undisturbed"):
        folder = tmp_path / name
        folder.mkdir()
        command = train_options(kind, folder, cache, student)
        if name == "interrupted":
            process = start(*command, log=folder / "log")
            assert interrupt(process, folder / "runs", number) == 128 + number, process.output
            assert re.search(r"interrupted\. What was (made up to step|fitted so far)", process.output), process.output
            assert "Traceback" not in process.output and not outputs(folder)
        code, said = run(*command, log=folder / "log")
        assert code == 0 and (name == "undisturbed" or "resuming from" in said), said
        assert not list((folder / "runs").glob("*/*"))
    assert outputs(tmp_path / "interrupted") == outputs(tmp_path / "undisturbed") != {}


def group_of(process: Run) -> bool:
    """Whether any process of its group is left."""
    try:
        os.killpg(process.process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_the_processes_that_decode_too(cache, student, tmp_path, number):
    """Ctrl-C at a terminal, which they leave to the training, or SIGTERM of a service manager, which ends them."""
    command = train_options("distill", tmp_path, cache, student)
    process = start(*command, "--set", "distill.workers=2", log=tmp_path / "log")
    assert interrupt(process, tmp_path / "runs", number, group=True) == 128 + number, process.output
    kept = re.search(r"interrupted.*What was made up to step (\d+) of", process.output)
    assert kept and "Traceback" not in process.output, process.output
    steps = [int(state.parent.name.split("-")[1]) for state in (tmp_path / "runs").rglob("trainer_state.json")]
    assert int(kept[1]) == max(steps)
    assert number == signal.SIGTERM or "interrupted. What" in process.output
    deadline = time.monotonic() + 60
    while group_of(process):
        assert time.monotonic() < deadline, "its processes must end too"
        time.sleep(0.05)
    code, said = run(*command, log=tmp_path / "log")
    assert code == 0 and "resuming from" in said, said


def test_the_steps_between_checkpoints_of_teach_are_a_parameter(cache, student, tmp_path):
    process = start(*train_options("teach", tmp_path, cache, student), log=tmp_path / "log")
    process.wait_for(lambda: whole_checkpoints(tmp_path / "runs"))
    process.send(signal.SIGKILL)
    process.wait()
    code, said = run(*train_options("teach", tmp_path, cache, student), log=tmp_path / "log")
    assert code == 0 and "resuming from" in said, said

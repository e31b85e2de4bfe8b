"""What holds for a training in several processes: it learns what one process learns, and a death costs a step.

Processes are real ones that find each other over gloo, and are killed for real. `tests/benchmarks/parity.py` compares
many more trainings.
"""

import json
import os
import signal
import time
from contextlib import suppress

import psutil
import pytest
import safetensors.torch
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from pipeline.errors import UserError
from pipeline.learning import processes
from pipeline.learning.batches import IGNORED, collate
from pipeline.learning.launch import launch
from pipeline.learning.sharing import Parts, SharedLoader
from stages.distill import distill
from stages.teach import teach
from tests.conftest import ROOT, make_params
from tests.learning.test_training import make_job, make_learner, make_rows, make_training
from tests.processes import Run, start, whole_checkpoints

slow = pytest.mark.slow
STEPS = 60


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_parts_of_a_batch_are_the_batch(monkeypatch, count):
    """Also of the last one, which has fewer rows than there are processes."""
    rows = make_rows(9)
    whole = DataLoader(rows, batch_sampler=BatchSampler(SequentialSampler(rows), 4, False), collate_fn=collate)
    monkeypatch.setattr(processes, "count", lambda: count)
    learned: list[list[list[int]]] = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shared = SharedLoader(whole)
        assert len(shared) == len(whole) == 3
        labels = [batch["labels"] for batch in shared]
        learned.append([[row.tolist() for row in batch if (row != IGNORED).any()] for batch in labels])
    for number, batch in enumerate(whole):
        parts = [row for of_process in learned for row in of_process[number]]
        assert [[t for t in row if t != IGNORED] for row in parts] == [
            [t for t in row if t != IGNORED] for row in batch["labels"].tolist()
        ]


def test_the_epoch_is_that_of_the_whole_batches():
    class Epochs(BatchSampler):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    for inner in (Epochs(range(4), 2, False), BatchSampler(Epochs(range(4), 2, False), 2, False)):
        Parts(inner, 0, 2).set_epoch(3)
        assert getattr(inner, "epoch", None) == 3 or inner.sampler.epoch == 3


def test_a_command_that_another_launcher_started_says_so(student, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"without torchrun or accelerate launch, and set train\.processes"):
        launch(make_job(tmp_path, steps=1), make_training(make_learner(student), 4))


def weights(folder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-4)


@slow
def test_two_processes_teach_what_one_teaches(cache, teacher, student, tmp_path):
    """With accumulated micro-batches of 5 rows, of which the last has none for the second process."""
    settings = ("steps=9", "batch_size=10", "accumulation=2")
    settings = (f"teach.student.optimisation.{each}" for each in settings)
    params = make_params(teacher, *settings, "teach.student.pairs=21", "teach.student.split=train")
    for count in (1, 2):
        params.train.processes = count
        out = tmp_path / str(count)
        teach(params, "student", cache / "prompts.parquet", student, out / "model", out / "runs")
    assert_close(weights(tmp_path / "1" / "model"), weights(tmp_path / "2" / "model"))


@slow
def test_two_processes_distil_what_one_distils(cache, fitted, teacher, student, tmp_path, capfd):
    """With the X term, a part of an epoch left over, and held-out rows; the curves are those of one process too."""
    params = make_params(teacher, "distill.objective=jsd", "distill.optimisation.batch_size=13", "distill.lam=0.1")
    curves, waited = {}, {}
    for count in (1, 2):
        params.train.processes = count
        out = tmp_path / str(count)
        distill(params, cache / "selection", student, fitted, out / "model", out / "metrics", out / "runs")
        curves[count] = [
            float(value)
            for name in ("training.csv", "heldout.csv")
            for line in (out / "metrics" / name).read_text().splitlines()[1:]
            for value in line.split(",")
        ]
        found = json.loads((out / "metrics" / "results.json").read_text())
        waited[count] = found["cost"]["seconds_to_first_step"]  # since the process of these tests began
    assert 0 < waited[1] < waited[2] < waited[1] + 100
    assert len(curves[1]) > 10 and curves[2] == pytest.approx(curves[1], rel=1e-4)
    assert_close(weights(tmp_path / "1" / "model"), weights(tmp_path / "2" / "model"))
    assert not list((tmp_path / "2" / "runs").rglob("*.safetensors"))
    said = capfd.readouterr().err
    assert "distilling (x-jsd(0.5) (frozen)): 2 processes" in said
    assert "Traceback" not in said and "[rank" not in said and "elastic" not in said


@slow
def test_what_a_process_says_is_wrong_is_what_the_command_says(cache, teacher, student, tmp_path):
    """An infinite loss, seen in all processes or in one."""
    broken = ("distill.reward=none", "distill.optimisation.learning_rate=1e30", "train.processes=2")
    out = tmp_path / "model", tmp_path / "metrics", tmp_path / "runs"
    with pytest.raises(UserError, match=r"step \d+: .* is not finite"):
        distill(make_params(teacher, *broken), cache / "selection", student, None, *out)


def test_rounds_are_made_in_one_process(cache, teacher, student, tmp_path):
    params = make_params(teacher, "distill.reward=none", "distill.on_policy.refreshes=1", "train.processes=2")
    out = tmp_path / "model", tmp_path / "metrics", tmp_path / "runs"
    with pytest.raises(UserError, match="rounds are made in one process"):
        distill(params, cache / "selection", student, None, *out, prompts_path=cache / "prompts.parquet")


class Distilling:
    """`xkd-pipeline distill` in several processes, with a checkpoint at every step."""

    def __init__(self, cache, student, tmp_path):
        self.folder, self.out = tmp_path, tmp_path / "model"
        self.arguments = [
            "distill", "--selection", cache / "selection", "--student", student, "--out", self.out, "--metrics",
            tmp_path / "metrics", "--runs", tmp_path / "runs", "--params", ROOT / "params.yaml",
        ]  # fmt: skip
        settings = (
            "reward=none", f"optimisation.steps={STEPS}", "optimisation.batch_size=13", "save_every=1", "log_every=5",
            "evaluate_every=5",
        )  # fmt: skip
        for setting in settings:
            self.arguments += ["--set", f"distill.{setting}"]

    def start(self, count: int) -> Run:
        return start(*self.arguments, "--set", f"train.processes={count}", log=self.folder / "log")

    def steps(self) -> int:
        """Of the last whole checkpoint."""
        found = whole_checkpoints(self.folder / "runs")
        return max((int(folder.name.rpartition("-")[2]) for folder in found), default=0)


def workers(run: Run) -> dict[int, psutil.Process]:
    """The processes that train, by rank."""
    found = {}
    for process in psutil.Process(run.process.pid).children(recursive=True):
        with suppress(psutil.Error, KeyError):
            found[int(process.environ()["RANK"])] = process
    return found


@slow
def test_a_death_or_a_signal_costs_a_step_whatever_process_it_comes_to(cache, student, tmp_path):
    """A kill and a signal to one process, a kill and a signal to the command; then one process alone goes on."""
    undisturbed = Distilling(cache, student, tmp_path / "undisturbed")
    undisturbed.folder.mkdir()
    assert undisturbed.start(1).wait() == 0
    killed = Distilling(cache, student, tmp_path / "killed")
    killed.folder.mkdir()

    run = killed.start(2)
    run.wait_for(lambda: killed.steps() >= 2)
    workers(run)[1].kill()
    assert run.wait() == 2
    assert "process 1 of 2 ended with SIGKILL" in run.output and "run the same command to go on" in run.output
    first = killed.steps()
    assert "Traceback" not in run.output and 2 <= first < STEPS

    run = killed.start(2)
    run.wait_for(lambda: killed.steps() > first)
    workers(run)[1].send_signal(signal.SIGTERM)
    assert run.wait() == 2 and not killed.out.exists()
    assert "one of the 2 processes was ended by a signal" in run.output and first < killed.steps() < STEPS
    first = killed.steps()

    run = killed.start(3)
    run.wait_for(lambda: killed.steps() > first)
    orphans = workers(run).values()
    os.kill(run.process.pid, signal.SIGKILL)
    assert run.wait() == 128 + signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(orphan.is_running() for orphan in orphans):
        assert time.monotonic() < deadline, "a process trains on though its command is dead"
        time.sleep(0.05)

    run, second = killed.start(2), killed.steps()
    assert first < second < STEPS
    run.wait_for(lambda: killed.steps() > second)
    run.send(signal.SIGINT)
    assert run.wait() == 130
    assert "the step that is running is finished and kept" in run.output
    assert f"What was made up to step {killed.steps()} of distilling (fkl) is kept" in run.output

    assert killed.steps() < STEPS and killed.start(1).wait() == 0
    assert_close(weights(undisturbed.out), weights(killed.out))

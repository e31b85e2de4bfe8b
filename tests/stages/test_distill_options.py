"""What holds for how a student is trained: seeds, the best checkpoint, early stopping, adapters, trackers, the card."""

import json
import signal

import polars as pl
import pytest
import torch

from pipeline.errors import UserError
from pipeline.learning.batches import collate
from pipeline.learning.divergence import Divergence
from pipeline.learning.learner import StudentLearner
from pipeline.learning.terms import Likelihood
from pipeline.learning.trainer import held_out
from pipeline.models import load_lm
from pipeline.params import OBSERVING
from pipeline.store.selection import Selection
from stages.distill import distill
from tests.conftest import ROOT, make_params
from tests.processes import run, start, whole_checkpoints


def trained(cache, student, tmp_path, *overrides):
    params = make_params("unused", "distill.reward=none", *overrides)
    out = tmp_path / "student"
    metrics = distill(params, cache / "selection", student, None, out, tmp_path / "metrics", tmp_path / "runs")
    return metrics, load_lm(out)


def test_another_seed_of_distill_is_another_run_on_the_same_cache(cache, student, tmp_path):
    models = [
        trained(cache, student, tmp_path / name, f"distill.seed={seed}")[1]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_best_student_is_kept_and_training_stops_when_it_no_longer_improves(cache, student, tmp_path):
    """A learning rate that is far too high makes the held-out loss rise after a few steps."""
    given = ["distill.optimisation.steps=60", "distill.optimisation.learning_rate=0.3", "distill.evaluate_every=1",
             "distill.save_every=1", "distill.best=kd", "distill.patience=3"]  # fmt: skip
    metrics, model = trained(cache, student, tmp_path, *given)
    curve = pl.read_csv(tmp_path / "metrics" / "heldout.csv")
    assert len(curve) < 60
    assert metrics["heldout_kd"] == pytest.approx(curve["kd"].min())
    assert metrics["best_step"] == curve["step"][curve["kd"].arg_min()] == curve["step"].max() - 3
    rows = list(Selection(cache / "selection").rows("validation"))
    learner = StudentLearner(model, [Likelihood(0), Divergence("fkl", tail="sampled")])
    found = held_out(learner, [collate(rows)], "cpu")
    assert found["kd"] == pytest.approx(metrics["heldout_kd"], abs=1e-5)


@pytest.mark.parametrize(("every", "best"), [(4, "kd"), (100, "kd"), (100, "''")])
def test_checkpoints_need_not_fit_the_steps(cache, student, tmp_path, every, best):
    """The last step is evaluated and saved too, so what is said of the student is true of the one that is kept."""
    given = [f"distill.evaluate_every={every}", f"distill.save_every={every}", f"distill.best={best}"]
    metrics, model = trained(cache, student, tmp_path, *given)
    curve = pl.read_csv(tmp_path / "metrics" / "heldout.csv")
    assert curve["step"].to_list() == ([4, 8, 10] if every == 4 else [10])
    rows = list(Selection(cache / "selection").rows("validation"))
    learner = StudentLearner(model, [Likelihood(0), Divergence("fkl", tail="sampled")])
    found = held_out(learner, [collate(rows)], "cpu")
    assert found["kd"] == pytest.approx(metrics["heldout_kd"], abs=1e-5)


def test_a_killed_run_goes_on_though_it_is_now_observed_otherwise(cache, student, tmp_path):
    """kill -9 after a checkpoint; then other points of the curve, a tracker, a process that decodes, smaller chunks."""
    command = ["distill", "--selection", cache / "selection", "--student", student, "--out", tmp_path / "student"]
    command += [
        "--metrics",
        tmp_path / "metrics",
        "--runs",
        tmp_path / "runs",
        "--params",
        ROOT / "tests" / "smoke.yaml",
    ]
    for setting in ("reward=none", "optimisation.steps=300", "evaluate_every=100", "save_every=10"):
        command += ["--set", f"distill.{setting}"]
    run = start(*command, "--set", "distill.log_every=100", log=tmp_path / "log")
    run.wait_for(lambda: whole_checkpoints(tmp_path / "runs"))
    run.send(signal.SIGKILL)
    run.wait()
    observed = {"log_every": 7, "report_to": "[tensorboard]", "workers": 1, "chunk": 16, "plain": "false"}
    assert observed.keys() == OBSERVING
    for name, value in observed.items():
        command += ["--set", f"distill.{name}={value}"]
    again = start(*command, log=tmp_path / "again")
    assert again.wait() == 0, again.output
    assert "resuming from" in again.output
    steps = pl.read_csv(tmp_path / "metrics" / "training.csv")["step"].to_list()
    assert len(steps) > 10 and all(step % 7 == 0 for step in steps if step % 100)


def test_the_plain_student_is_the_one_that_the_same_parameters_give_without_the_x_term(cache, student, tmp_path):
    common = ["distill", "--selection", cache / "selection", "--student", student, "--runs", tmp_path / "runs"]
    common += ["--params", ROOT / "tests" / "smoke.yaml"]
    commands = {
        "plain": [*common, "--plain"],
        "named": [*common, "--set", "distill.reward=none"],
        "none": [*common, "--plain", "--set", "distill.plain=false"],
    }
    for name, command in commands.items():
        code, said = run(*command, "--out", tmp_path / name, log=tmp_path / f"{name}.log")
        assert code == 0, said
    plain, named = (load_lm(tmp_path / name).state_dict() for name in ("plain", "named"))
    assert all(torch.equal(plain[key], value) for key, value in named.items())
    metrics = json.loads((tmp_path / "plain-metrics" / "results.json").read_text())
    assert metrics["objective"] == "fkl" and metrics["provenance"]["parameters"]["reward"] == "none"
    assert "distill.plain is false" in (tmp_path / "none" / "README.md").read_text()
    assert not list((tmp_path / "none").glob("*.safetensors")) and (tmp_path / "none-metrics").is_dir()


def test_adapters_are_trained_alone_and_merged_into_a_plain_model(cache, student, tmp_path):
    metrics, model = trained(cache, student, tmp_path, "distill.lora.rank=2", "distill.optimisation.steps=20")
    start = load_lm(student)
    assert model.state_dict().keys() == start.state_dict().keys()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    linear = {f"model.layers.0.{n}.weight" for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )}  # fmt: skip
    assert changed == linear
    for name in linear:
        difference = model.state_dict()[name] - start.state_dict()[name]
        assert torch.linalg.matrix_rank(difference, atol=1e-6) <= 2
    curve = pl.read_csv(tmp_path / "metrics" / "heldout.csv")
    assert curve["kd"][-1] < curve["kd"][0] and metrics["heldout_kd"] == curve["kd"][-1]
    assert "LoRA: rank 2" in (tmp_path / "student" / "README.md").read_text()


def test_workers_change_nothing_and_the_window_what_is_in_a_batch(cache, student, tmp_path):
    found = {
        option: trained(cache, student, tmp_path / str(number), *([option] if option else []))[0]["heldout_kd"]
        for number, option in enumerate(("", "distill.workers=1", "distill.window=4"))
    }
    assert found["distill.workers=1"] == found[""] != found["distill.window=4"]


def test_a_run_can_be_followed_by_a_tracker(cache, student, tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    trained(cache, student, tmp_path, "distill.report_to=[tensorboard]")
    events = list((tmp_path / "runs" / "logs").rglob("events.out.tfevents.*"))
    assert len(events) == 1 and events[0].stat().st_size > 1000
    with pytest.raises(UserError, match="unknown tracker 'diary'"):
        trained(cache, student, tmp_path / "other", "distill.report_to=[diary]")


def test_the_card_names_teacher_data_objective_and_metrics(cache, student, tmp_path):
    metrics, _ = trained(cache, student, tmp_path, "distill.objective=rkl")
    card = (tmp_path / "student" / "README.md").read_text()
    identity = Selection(cache / "selection").teacher["identity"]
    for said in (
        'license: "apache-2.0"',
        identity,
        "Objective: rkl",
        "Cached responses: 80",
        f"{metrics['heldout_kd']:.4g}",
    ):
        assert said in card


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["distill.patience=2"], "set best to"),
        (["distill.best=loss", "distill.save_every=7"], r"set save_every \(7\) to evaluate_every \(5\)"),
        (["distill.best=loss", "distill.save_every=10"], r"set save_every \(10\) to evaluate_every \(5\)"),
        (["distill.best=loss", "distill.save_every=100"], r"set save_every \(100\) to evaluate_every \(5\)"),
        (["distill.best=kd", "distill.objective=seqkd"], "no term kd"),
    ],
)
def test_settings_of_the_best_student_that_cannot_work_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        make_params("unused", *given)

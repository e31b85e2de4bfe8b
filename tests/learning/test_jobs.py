"""What holds for jobs: JSON has all of a training, so whoever reads it trains the same learner to the same weights."""

import json

import pytest
import torch

from pipeline.learning.job import Job
from pipeline.learning.trainer import run as train
from stages.distill import distill
from stages.reward import reward
from stages.teach import teach
from tests.conftest import make_params


@pytest.fixture
def recorded(monkeypatch):
    """Every job that the stages run, as JSON, with the weights that it left."""
    jobs = []

    def record(job, training):
        trained = train(job, training)
        jobs.append((job.model_dump_json(), {name: x.clone() for name, x in trained.learner.state_dict().items()}))
        return trained

    for stage in ("stages.teach", "stages.distill", "stages.reward.fit"):
        monkeypatch.setattr(f"{stage}.launch", record)
    return jobs


def assert_trains_the_same(jobs, folder) -> None:
    for number, (text, weights) in enumerate(jobs):
        job = Job.model_validate_json(json.dumps(json.loads(text) | {"run": str(folder / str(number))}))
        again = train(job).learner.state_dict()
        assert again.keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(again[name], value), name


@pytest.mark.parametrize("kind", ["none", "frozen", "joint", "scratch", "zero", "shuffled"])
def test_distillation(cache, fitted, teacher, student, tmp_path, recorded, kind):
    params = make_params(teacher, f"distill.reward={kind}", "distill.lora.rank=2", "distill.dropout=0.1")
    out = tmp_path / "student", tmp_path / "metrics", tmp_path / "runs"
    distill(params, cache / "selection", student, fitted, *out)
    assert_trains_the_same(recorded, tmp_path / "again")
    assert len(recorded) == 1


@pytest.mark.parametrize("fit", ["teacher", "policy"])
def test_rewards(cache, teacher, student, tmp_path, recorded, fit):
    negatives = "always" if fit == "teacher" else "never"
    params = make_params(teacher, f"reward.fit={fit}", f"reward.negatives={negatives}", "prepare.task=translation")
    out = tmp_path / "reward", tmp_path / "audit", tmp_path / "runs"
    reward(params, cache / "selection", student, *out, scored_path=cache / "scored",
           prompts_path=cache / "prompts.parquet")  # fmt: skip
    assert_trains_the_same(recorded, tmp_path / "again")
    assert len(recorded) == 2


def test_teaching(cache, teacher, student, tmp_path, recorded):
    params = make_params(teacher, "teach.student.optimisation.steps=6", "teach.student.split=train")
    teach(params, "student", cache / "prompts.parquet", student, tmp_path / "model", tmp_path / "runs")
    assert_trains_the_same(recorded, tmp_path / "again")
    assert len(recorded) == 1


def test_a_function_that_is_not_ours_is_not_called():
    job = Job.model_validate(
        {"what": "it", "make": "os:getcwd", "optimisation": {"steps": 1, "batch_size": 1, "learning_rate": 1},
         "seed": 0, "run": "nowhere", "log_every": 1}
    )  # fmt: skip
    with pytest.raises(ValueError, match="not a function of this project"):
        train(job)

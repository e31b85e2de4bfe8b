"""What holds for options that save memory: gradient checkpointing changes nothing, bf16 no more than its rounding."""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.learning.consistency import Consistency, ScratchReward
from pipeline.learning.learner import StudentLearner
from pipeline.learning.posterior import RewardPosterior
from pipeline.learning.terms import Likelihood
from pipeline.learning.trainer import run
from pipeline.models import load_lm
from pipeline.params import Optimisation, Train
from tests.conftest import make_seq2seq_model
from tests.learning.test_training import make_job, make_learner, make_training


class Watched:
    """A learner that was trained, with how often its blocks ran and the types that its linear layers gave."""

    def __init__(self, learner: StudentLearner, folder, steps: int = 3, **options):
        self.runs, self.types = 0, set()
        blocks = [module for module in learner.modules() if isinstance(module, GradientCheckpointingLayer)]
        for block in blocks:
            block.register_forward_pre_hook(self._count)
            linear = next(module for module in block.modules() if isinstance(module, torch.nn.Linear))
            linear.register_forward_hook(self._note)
        self.blocks = len(blocks)
        optimisation = Optimisation(steps=steps, batch_size=6, learning_rate=1e-3, **options.pop("optimisation", {}))
        job = make_job(folder, **options).model_copy(update={"optimisation": optimisation})
        self.history = run(job, make_training(learner, 24)).history
        self.learner = learner

    def _count(self, *_) -> None:
        self.runs += 1

    def _note(self, module, given, made) -> None:
        self.types.add(made.dtype)


def with_a_reward_of_its_own(student) -> StudentLearner:
    posterior = RewardPosterior(load_lm(student), "action", "separate", 0.3).train()
    terms = [Likelihood(), Consistency(ScratchReward(posterior, 1.0), 0.1)]
    return StudentLearner(load_lm(student), terms, make_learner(student).residuals)


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder", "two models"])
def test_gradient_checkpointing_runs_each_block_twice_and_changes_no_weight(student, tmp_path, kind):
    """In a T5 sums over its shared weights come in another order, and Adam enlarges what that rounds."""
    if kind == "encoder-decoder":
        student = make_seq2seq_model(tmp_path / "t5", 0)
    make = with_a_reward_of_its_own if kind == "two models" else make_learner
    plain = Watched(make(student), tmp_path / "plain")
    checkpointed = Watched(make(student), tmp_path / "checkpointed", train=Train(gradient_checkpointing=True))
    assert plain.runs == 3 * plain.blocks and checkpointed.runs == 2 * plain.runs
    for (name, one), other in zip(plain.learner.named_parameters(), checkpointed.learner.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if kind != "encoder-decoder" else 1e-4, msg=name)


def test_bf16_computes_in_bfloat16_and_keeps_everything_else_in_float32(student, tmp_path):
    plain = Watched(make_learner(student), tmp_path / "plain")
    half = Watched(make_learner(student), tmp_path / "half", optimisation={"precision": "bf16"})
    assert plain.types == {torch.float32} and half.types == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.learner.parameters()} == {torch.float32}
    losses = [[entry["loss"] for entry in each.history if "loss" in entry] for each in (plain, half)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2**-8)


def test_no_language_model_is_left_out(student, tmp_path):
    learner = with_a_reward_of_its_own(student)
    Watched(learner, tmp_path, train=Train(gradient_checkpointing=True))
    models = [module for module in learner.modules() if isinstance(module, PreTrainedModel)]
    assert len(models) >= 3 and all(model.is_gradient_checkpointing for model in models)

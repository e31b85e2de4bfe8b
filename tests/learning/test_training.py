"""What holds for training: exact global means, held-out values, and a killed run that ends as an undisturbed one."""

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.errors import UserError
from pipeline.learning.batches import IGNORED, collate
from pipeline.learning.consistency import Consistency, GivenReward, ZeroReward
from pipeline.learning.curves import split_history, write_csv
from pipeline.learning.divergence import Divergence
from pipeline.learning.forward import response_states, score_tokens
from pipeline.learning.job import Job, Training
from pipeline.learning.learner import Learner, StudentLearner, count
from pipeline.learning.residuals import Scaled
from pipeline.learning.terms import Likelihood, Mean
from pipeline.learning.trainer import held_out, run
from pipeline.models import load_lm
from pipeline.params import Optimisation, Residual
from pipeline.store.schema import Row
from tests import processes
from tests.conftest import ROOT, make_params, make_prompts
from tests.processes import start, whole_checkpoints


def make_rows(n: int, k: int = 4) -> list[Row]:
    """Responses of different lengths with a random sparse teacher; `EXTRAS` has a reward for each."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(n):
        steps = int(rng.integers(1, 7))
        ids = np.stack([rng.permutation(44)[:k] for _ in range(steps)]).astype(np.int32)
        logprobs = np.log(rng.dirichlet(np.ones(k + 1), steps)[:, :k]).astype(np.float16)
        prompt, response = rng.integers(4, 44, 1 + number % 5), rng.integers(4, 44, steps)
        row = Row.bare(prompt, response, "stop" if number % 3 else "length")
        rows.append(replace(row, key=str(number), topk_ids=ids, topk_logprobs=logprobs))
    return rows


_random = np.random.default_rng(1)
EXTRAS = {
    name: {row.key: _random.standard_normal(len(row.response_ids)).astype(np.float32) for row in make_rows(32)}
    for name in ("mu", "log_sigma")
}
batch_of = partial(collate, extras=EXTRAS)


def make_job(run: Path, steps: int = 4, rate: float = 0.1, batch_size: int = 4, accumulation: int = 1, **more) -> Job:
    optimisation = Optimisation(steps=steps, batch_size=batch_size, learning_rate=rate, accumulation=accumulation)
    more = {"what": "t", "log_every": 1} | more
    return Job(make="", optimisation=optimisation, run=run, seed=0, **more)


def make_training(learner: Learner, count: int, held_out: int = 0) -> Training:
    return Training(learner, make_rows(count), make_rows(held_out), batch_of)


def test_a_batch_says_where_each_response_token_is_predicted():
    batch = collate(
        [Row.bare(np.array([7, 8]), np.array([9, 2])), Row.bare(np.array([5]), np.array([6, 7, 4]), "length")]
    )
    assert batch["input_ids"].tolist() == [[7, 8, 9, 2], [5, 6, 7, 4]]
    assert batch["labels"].tolist() == [[9, 2, IGNORED], [6, 7, 4]]
    assert batch["positions"].tolist() == [[1, 2, 0], [0, 1, 2]]

    def echo(input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=input_ids[..., None])

    echo.config = SimpleNamespace(is_encoder_decoder=False)
    states = response_states(echo, batch)
    assert states.before[:, 0].tolist() == [8, 9, 5, 6, 7]  # the token before each response token
    assert states.after[:, 0].tolist() == [9, 2, 6, 7, 4]  # that token itself


def test_scores_are_those_of_the_whole_model_one_response_at_a_time(teacher):
    model, responses = load_lm(teacher), make_rows(6)
    together = score_tokens(model, collate(responses)).logprob.split([len(r.response_ids) for r in responses])
    for response, found in zip(responses, together, strict=True):
        ids = torch.tensor(np.concatenate([response.prompt_ids, response.response_ids]))[None]
        logprobs = torch.log_softmax(model(ids).logits[0], -1)
        start = len(response.prompt_ids)
        expected = [logprobs[start - 1 + t, token] for t, token in enumerate(response.response_ids)]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


def make_learner(student, reward: str = "given") -> StudentLearner:
    known = GivenReward() if reward == "given" else ZeroReward()
    residuals = Scaled("sarsa", Residual(q_source="logits", gamma=1.0, terminal="drop"), 1.7, 0.0)
    terms = [Likelihood(0.5), Divergence("jsd", 0.3), Consistency(known, 0.1)]
    return StudentLearner(load_lm(student), terms, residuals, chunk=5)


@pytest.mark.parametrize("reward", ["given", "zero"])
def test_micro_batches_give_the_loss_and_gradient_of_one_batch(student, reward):
    """Every term is a global sum over its own global count (design, section 3)."""
    responses, gradients = make_rows(10), []
    for size in (10, 3):
        learner = make_learner(student, reward)
        batches = [batch_of(responses[start : start + size]) for start in range(0, 10, size)]
        counts = sum(count(batch, learner.terminal) for batch in batches)
        assert counts.tolist() == [
            sum(len(r.response_ids) for r in responses),
            sum(len(r.response_ids) - 1 for r in responses),
            0,
            sum(len(r.response_ids) for r in responses),
        ]
        loss = sum(learner(counts, **batch)[0] for batch in batches)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in learner.student.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_trainer_optimises_and_reports_exactly_that_loss(student, tmp_path):
    """One step of gradient accumulation over uneven micro-batches equals one step on the whole batch."""
    weights = []
    for accumulation in (1, 4):
        folder = tmp_path / f"run-{accumulation}"
        learner = make_learner(student)
        before = held_out(learner, [batch_of(make_rows(8))], "cpu")
        job = make_job(folder, steps=1, rate=0.01, batch_size=8, accumulation=accumulation)
        logged = split_history(run(job, make_training(learner, 8)).history)[0][0]
        for name in ("nll", "kd", "td_nll", "precision", "loss"):
            assert logged[name] == pytest.approx(before[name], rel=1e-3), name
        weights.append(torch.cat([p.detach().flatten() for p in learner.student.parameters()]))
    torch.testing.assert_close(*weights, atol=2e-4, rtol=0)


def test_training_lowers_the_held_out_loss_and_the_best_weights_are_kept(student, tmp_path):
    rows, learner = make_rows(32), make_learner(student)
    before = held_out(learner, [batch_of(rows)], "cpu")["loss"]
    every = {"log_every": 5, "evaluate_every": 5, "save_every": 5}
    job = make_job(tmp_path / "run", steps=30, rate=0.02, batch_size=8, best="loss", **every)
    history = run(job, make_training(learner, 32, 32)).history
    values = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    after = held_out(learner, [batch_of(rows)], "cpu")["loss"]
    assert len(values) == 6 and after == pytest.approx(min(values), rel=1e-5) and after < 0.9 * before


def test_curves_are_plain_csv(tmp_path):
    history = [{"loss": 2.0, "kd": 1.0, "step": 5, "epoch": 1.0, "learning_rate": 0.1}, {"eval_loss": 3.0, "step": 5}]
    training, held = split_history([*history, {"train_runtime": 1.0, "step": 5}])
    assert training == [{"loss": 2.0, "kd": 1.0, "step": 5}] and held == [{"loss": 3.0, "step": 5}]
    write_csv(tmp_path / "c.csv", training)
    assert (tmp_path / "c.csv").read_text().split() == ["step,kd,loss", "5,1.0,2.0"]


def test_a_half_written_checkpoint_is_not_resumed_from(student, tmp_path):
    """A kill while the Trainer writes a checkpoint leaves one without its state, which it writes last."""
    from pipeline.learning.checkpoints import whole_checkpoint

    folder = tmp_path / "run"
    run(make_job(folder, rate=0.01, log_every=2, save_every=2), make_training(make_learner(student), 8))
    assert whole_checkpoint(folder).endswith("checkpoint-4")
    for number, state in ((6, None), (10, "{")):
        (folder / f"checkpoint-{number}").mkdir()
        (folder / f"checkpoint-{number}" / "model.safetensors").write_bytes(b"half")
        if state:
            (folder / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    assert whole_checkpoint(folder).endswith("checkpoint-4")
    assert not (folder / "checkpoint-6").exists() and not (folder / "checkpoint-10").exists()


# Numbers that are not finite


class Line(Learner):
    """The line w * x at x = 1, whose loss, held-out loss or gradient is infinite where that is asked for."""

    def __init__(self, infinite: str = "", start: float = 1.0):
        super().__init__()
        self.means = {"kd": Mean(1.0, "tokens")}
        self.infinite, self.model = infinite, torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.model.weight, start)

    def forward(self, counts, **batch):
        weight = self.model.weight.sum()
        value = weight + (weight * 0).sqrt() if self.infinite == "gradient" else weight
        if self.infinite == ("loss" if self.training else "held-out loss"):
            value = value + torch.inf
        return value, {"kd": value.detach() * counts[0]}


@pytest.mark.parametrize("infinite", ["loss", "gradient", "held-out loss"])
def test_a_training_whose_numbers_are_not_finite_ends_with_them_by_name(tmp_path, infinite):
    job = make_job(tmp_path / "run", what="fitting a line", evaluate_every=2, save_every=1)
    shown = r" \(kd inf\)" if "loss" in infinite else ""
    at = 2 if infinite == "held-out loss" else 1
    with pytest.raises(UserError, match=rf"fitting a line, step {at}: the {infinite} is not finite{shown}: .*no model"):
        run(job, make_training(Line(infinite), 8, 4))


def test_weights_that_became_infinite_in_the_last_step_are_not_taken_for_a_model_nor_by_the_next_run(tmp_path):
    job, start = make_job(tmp_path / "run", steps=1, rate=1e37, what="fitting a line", save_every=1), -3.4e38
    for _ in range(2):
        with pytest.raises(UserError, match=r"fitting a line: model\.weight is not finite"):
            run(job, make_training(Line("", start), 8))


@pytest.mark.slow
def test_a_killed_distillation_resumes_and_ends_as_an_undisturbed_one(teacher, student, tmp_path):
    """kill -9 after the first checkpoint; the same command goes on from it; same weights, same curve."""
    from stages.generate import generate

    prompts = make_prompts(tmp_path / "prompts.parquet", train=40, validation=5)
    generate(make_params(teacher), prompts, tmp_path / "selection")
    results = []
    for name, kill in (("killed", True), ("undisturbed", False)):
        out, runs, log = (tmp_path / name / each for each in ("student", "runs", "log"))
        out.parent.mkdir()
        command = ["distill", "--selection", tmp_path / "selection", "--student", student, "--out", out]
        command += ["--metrics", out.parent / "metrics", "--runs", runs, "--params", ROOT / "tests" / "smoke.yaml"]
        for setting in ("distill.reward=zero", "distill.optimisation.steps=200", "distill.save_every=10"):
            command += ["--set", setting]
        if kill:
            process = start(*command, log=log)
            process.wait_for(lambda runs=runs: whole_checkpoints(runs))
            process.send(signal.SIGKILL)
            process.wait()
            assert not out.exists()
        code, said = processes.run(*command, log=log)
        assert code == 0 and ("resuming from" in said) == kill and not list(runs.glob("distill/*")), said
        curve = (out.parent / "metrics" / "heldout.csv").read_text()
        results.append((safetensors.torch.load_file(out / "model.safetensors"), curve))
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(tensor, results[1][0][name], atol=0, rtol=0)
    assert results[0][1] == results[1][1]

"""What holds for MiniLLM: its loss is the sum of its parts, its rollouts are kept, and it learns."""

import json
import shutil

import numpy as np
import pytest
import torch

from pipeline.engines.hf import HfEngine
from pipeline.engines.mixture import MixtureEngine
from pipeline.learning.batches import collate
from pipeline.learning.closeness import LogitSource
from pipeline.learning.learner import StudentLearner, count
from pipeline.learning.minillm import MiniLLM
from pipeline.models import load_lm
from pipeline.store.selection import Selection
from stages.distill import distill
from tests.conftest import make_params, make_seq2seq_model
from tests.stages.test_rounds import weights

SETTINGS = [
    "distill.objective=minillm", "distill.reward=none", "distill.optimisation.batch_size=8", "evaluate.samples=2",
    "distill.on_policy.prompts=16", "distill.on_policy.validation=8", "distill.optimisation.steps=32",
]  # fmt: skip


def run(cache, teacher, student, out, *overrides, store=None, reward=None):
    store = store or out / "store"
    if not store.exists():
        shutil.copytree(cache / "store", store)
    params = make_params(teacher, *SETTINGS, *overrides)
    paths = cache / "selection", student, reward, out / "student", out / "metrics", out / "runs"
    return distill(params, *paths, store, cache / "scored", cache / "prompts.parquet")


def measures(out):
    return json.loads((out / "metrics" / "results.json").read_text())["rounds"]


@pytest.fixture
def mixed(cache):
    """Rows of which the first are the student's own, with what the policy gradient reads of them."""
    from dataclasses import replace

    rows = list(Selection(cache / "selection").rows("train"))[:6]
    rows = [replace(row, origin="student" if number < 4 else "reference") for number, row in enumerate(rows)]
    rng, extras = np.random.default_rng(0), {}
    for name in ("old", "advantage", "weight"):
        extras[name] = {row.key: rng.normal(-2, 1, len(row.response_ids)).astype(np.float32) for row in rows}
    extras["weight"] = {key: np.abs(values) for key, values in extras["weight"].items()}
    return rows, extras


@pytest.mark.parametrize("dense", [True, False])
def test_the_loss_is_the_sum_of_its_parts_each_over_its_own_tokens(mixed, teacher, student, dense):
    """Against the formulas over the whole vocabulary; a teacher of all tokens in a row gives the same."""
    rows, extras = mixed
    batch = collate(rows, topk=not dense, extras=extras)
    model, judge = load_lm(student), load_lm(teacher)
    source = LogitSource(judge, "the teacher") if dense else None
    learner = StudentLearner(model, [MiniLLM(0.2, 0.7, 0.6, "bucket", source)])
    counts = count(batch, "drop")
    loss, sums = learner(counts, **batch)
    loss.backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()

    def logits(of, row):
        ids = torch.tensor(np.concatenate([row.prompt_ids, row.response_ids])).long()
        return torch.log_softmax(of(ids[None]).logits[0, len(row.prompt_ids) - 1 : -1].double(), -1)

    parts = {"pg": [], "single_step": [], "nll": [], "kd": []}
    for row in rows:
        s, t = logits(model, row), logits(judge, row).detach()
        own = s.gather(-1, torch.tensor(row.response_ids).long()[:, None])[:, 0]
        if row.origin == "student":
            old, advantage, weight = (torch.tensor(extras[n][row.key]).double() for n in ("old", "advantage", "weight"))
            ratio = (own - old).exp() * weight
            parts["pg"].append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
            parts["single_step"].append((s.exp() * (s - t)).sum(-1))
        else:
            parts["nll"].append(-own)
            parts["kd"].append((t.exp() * (t - s)).sum(-1))
    means = {name: torch.cat(values).mean() for name, values in parts.items()}
    assert counts.tolist()[2:] == [sum(map(len, parts["pg"])), sum(map(len, parts["nll"]))]
    if dense:
        expected = means["pg"] + 0.7 * means["single_step"] + 0.3 * means["nll"] + 0.3 * means["kd"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        expected.backward()
        torch.testing.assert_close(gradient, model.get_input_embeddings().weight.grad, atol=1e-5, rtol=1e-3)
    else:  # the divergences are of the kept tokens; the rest is the same
        for name, place in (("pg", 2), ("nll", 3)):
            assert sums[name].item() / counts[place] == pytest.approx(means[name].item(), rel=1e-4)
        assert 0 < sums["single_step"] / counts[2] <= means["single_step"] + 1e-5
        assert 0 < sums["kd"] / counts[3] <= means["kd"] + 1e-5


def test_its_rollouts_draw_the_student_to_the_teacher(cache, teacher, student, tmp_path):
    """By themselves: the fixture's references are not what its teacher says."""
    settings = ["distill.minillm.text=0", "distill.on_policy.share=1", "distill.optimisation.steps=160"]
    run(cache, teacher, student, tmp_path, *settings)
    before, *_, after = measures(tmp_path)
    assert after["kl"] < 0.8 * before["kl"]
    assert [each["step"] for each in measures(tmp_path)] == list(range(0, 161, 8))  # 16 rollouts, 4 epochs of 8


@pytest.mark.parametrize("scores", ["live", "store"])
def test_its_rollouts_are_the_same_in_memory_and_by_the_store(cache, teacher, student, tmp_path, scores):
    run(cache, teacher, student, tmp_path / "other", f"distill.on_policy.scores={scores}")
    run(cache, teacher, student, tmp_path / "usual")
    assert weights(tmp_path / "other" / "student") == weights(tmp_path / "usual" / "student")


def test_a_second_run_needs_no_model_where_its_rollouts_are_stored(cache, teacher, student, tmp_path, monkeypatch):
    run(cache, teacher, student, tmp_path / "first", store=tmp_path / "store")
    for engine, name in ((HfEngine, "sample"), (HfEngine, "score"), (MixtureEngine, "sample")):
        monkeypatch.setattr(engine, name, lambda *_, **__: pytest.fail("a model was asked"))
    run(cache, teacher, student, tmp_path / "second", store=tmp_path / "store")
    assert weights(tmp_path / "first" / "student") == weights(tmp_path / "second" / "student")


def test_a_dense_teacher_and_the_x_term_go_with_it(cache, fitted, teacher, student, tmp_path):
    settings = ["distill.on_policy.scores=dense", "distill.reward=frozen"]
    metrics = run(cache, teacher, student, tmp_path, *settings, reward=fitted)
    assert metrics["objective"] == "x-minillm (frozen)" and metrics["heldout_lam_eff"] > 0
    assert measures(tmp_path)[-1]["kl"] < measures(tmp_path)[0]["kl"]


def test_an_encoder_decoder_has_rollouts_too(tmp_path):
    from stages.generate import generate
    from stages.score import score
    from tests.conftest import make_prompts

    teacher, student = make_seq2seq_model(tmp_path / "teacher", 0), make_seq2seq_model(tmp_path / "start", 1)
    prompts, params = (
        make_prompts(tmp_path / "prompts.parquet", train=40, validation=8),
        make_params(teacher, *SETTINGS),
    )
    generate(params, prompts, tmp_path / "selection", tmp_path / "store")
    score(params, prompts, student, tmp_path / "scored", tmp_path / "store")
    paths = tmp_path / "selection", student, None, tmp_path / "student", tmp_path / "metrics", tmp_path / "runs"
    distill(params, *paths, tmp_path / "store", tmp_path / "scored", prompts)
    assert measures(tmp_path)[-1]["kl"] < measures(tmp_path)[0]["kl"]

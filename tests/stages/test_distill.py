"""What holds for distillation: every objective with every reward by configuration alone, and what is refused."""

import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import polars as pl
import pytest
import torch

from pipeline.errors import UserError
from pipeline.learning.batches import collate
from pipeline.learning.consistency import Consistency, JointReward, ScratchReward
from pipeline.learning.divergence import Divergence
from pipeline.learning.forward import score_tokens
from pipeline.learning.learner import StudentLearner
from pipeline.learning.posterior import load_posterior
from pipeline.learning.residuals import Scaled
from pipeline.learning.terms import Likelihood
from pipeline.models import load_lm, load_tokenizer
from pipeline.objectives.sparse import sparse_divergence
from pipeline.params import Distill
from pipeline.store.selection import Selection
from pipeline.store.training_rows import TeacherRows
from stages.distill import distill
from stages.distill.inputs import reward_inputs, shuffled
from stages.evaluate import evaluate
from stages.generate import generate
from tests.conftest import WORDS, make_model, make_params, make_prompts

ON_POLICY = ("gkd", "opd", "minillm")  # see test_rounds
OFF_POLICY = [name for name in get_args(Distill.model_fields["objective"].annotation) if name not in ON_POLICY]


def run_distill(cache, teacher, student, out, *overrides, reward_path=None, scored_path=None):
    params = make_params(teacher, *overrides)
    paths = cache / "selection", student, reward_path, out / "student", out / "metrics", out / "runs"
    return distill(params, *paths, scored_path=scored_path)


@pytest.mark.parametrize("kind", ["none", "frozen", "joint", "scratch", "zero", "shuffled"])
@pytest.mark.parametrize("objective", OFF_POLICY)
def test_every_objective_learns_plain_and_with_every_reward(cache, fitted, teacher, student, tmp_path, objective, kind):
    """By configuration alone. Random samples can be memorised, so sft and seqkd are judged by their training loss."""
    settings = [f"distill.objective={objective}", f"distill.reward={kind}", "distill.optimisation.steps=40"]
    paths = {"reward_path": fitted, "scored_path": cache / "scored"}
    metrics = run_distill(cache, teacher, student, tmp_path, *settings, **paths)
    held_out = pl.read_csv(tmp_path / "metrics" / "heldout.csv")
    if objective in ("sft", "seqkd"):
        nll = pl.read_csv(tmp_path / "metrics" / "training.csv")["nll"]
        assert nll[-1] < nll[0] - 0.3
    else:
        assert held_out["kd"][-1] < held_out["kd"][0]
    assert ("td_nll" in held_out.columns) == (kind != "none")
    assert ("reward_kl" in held_out.columns) == (kind in ("scratch", "joint"))
    assert ("reward_nll" in held_out.columns) == (kind == "joint")
    assert (metrics.get("heldout_lam_eff", 0) > 0) == (kind != "none")
    assert metrics["objective"].startswith("x-" if kind != "none" else objective)
    model = load_lm(tmp_path / "student")
    assert not torch.equal(model.base_model.embed_tokens.weight, load_lm(student).base_model.embed_tokens.weight)
    assert load_tokenizer(tmp_path / "student").vocab_size == 44
    card = (tmp_path / "student" / "README.md").read_text()
    assert metrics["objective"] in card and "apache-2.0" in card


@pytest.mark.parametrize("tail", ["renorm", "teacher_renorm", "truncate"])
def test_every_tail_mode_is_a_matter_of_configuration(cache, teacher, student, tmp_path, tail):
    settings = [f"distill.tail={tail}", "distill.reward=none", "distill.optimisation.steps=40"]
    metrics = run_distill(cache, teacher, student, tmp_path, *settings)
    held_out = pl.read_csv(tmp_path / "metrics" / "heldout.csv")["kd"]
    assert held_out[-1] < held_out[0] and metrics["objective"] == f"fkl {tail}"


def test_nll_weight_adds_the_likelihood_of_the_same_tokens(cache, teacher, student, tmp_path):
    settings = ["distill.reward=none", "distill.objective=skew_rkl", "distill.nll_weight=0.5"]
    metrics = run_distill(cache, teacher, student, tmp_path, *settings)
    expected = metrics["heldout_kd"] + 0.5 * metrics["heldout_nll"]
    assert metrics["heldout_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["objective"] == "skew_rkl(0.1) + 0.5 nll"


def test_sft_learns_the_references(cache, teacher, student, tmp_path):
    """Held out on the validation prompts' references; the training loss is on those of the training prompts."""
    settings = ["distill.reward=none", "distill.objective=sft", "distill.optimisation.steps=200"]
    metrics = run_distill(cache, teacher, student, tmp_path, *settings, scored_path=cache / "scored")
    assert metrics["samples"] == 40
    references = list(Selection(cache / "scored").rows("references"))
    batch = collate(references, topk=False)
    before, after = (-score_tokens(load_lm(m), batch).logprob.mean() for m in (student, tmp_path / "student"))
    assert after < 0.5 * before
    with pytest.raises(UserError, match="pass --scored"):
        run_distill(cache, teacher, student, tmp_path / "other", *settings)


def test_references_that_another_teacher_scored_are_refused(cache, student, tmp_path):
    other = make_model(tmp_path / "other", seed=5)
    generate(make_params(other), cache / "prompts.parquet", tmp_path / "selection")
    settings = ["distill.reward=zero", "distill.objective=sft"]
    with pytest.raises(UserError, match="is of teacher"):
        run_distill(tmp_path, other, student, tmp_path, *settings, scored_path=cache / "scored")


def test_the_controls_of_sft_have_the_scale_of_what_they_control(cache, fitted, teacher):
    """c is of the teacher's own samples, although sft learns the references."""
    rows = {"train": TeacherRows(Selection(cache / "scored"), "references")}
    scales = [
        reward_inputs(
            make_params(teacher, f"distill.reward={kind}", "distill.objective=sft").distill,
            Selection(cache / "selection"), rows, fitted, 0,
        ).scale
        for kind in ("zero", "scratch", "joint", "shuffled")
    ]  # fmt: skip
    assert scales == pytest.approx([scales[-1]] * 4)


def test_joint_keeps_student_and_reward_apart_and_scratch_does_not(cache, fitted, student):
    """The student sees phi detached and phi the student's residuals (design, section 5)."""
    rows = list(Selection(cache / "selection").rows("train"))[:8]
    batch, counts = collate(rows), torch.tensor([40, 32])

    def gradients(kind, lam, phi_kl=0.1, encoder="separate"):
        posterior = load_posterior(fitted / "sarsa", student)
        posterior.own_encoder = encoder == "own"
        reward = JointReward(posterior, phi_kl) if kind == "joint" else ScratchReward(posterior, 1.0)
        terms = [Likelihood(0), Divergence("fkl"), Consistency(reward, lam)]
        learner = StudentLearner(load_lm(student), terms, Scaled("sarsa", Distill().residual, 1.0, 0.0))
        learner(counts, **batch)[0].backward()
        return learner.student.model.embed_tokens.weight.grad, posterior.head.actions.weight.grad

    for encoder in ("separate", "own"):
        (student_low, phi_low), (student_high, phi_high) = (
            gradients("joint", lam, encoder=encoder) for lam in (0.1, 1)
        )
        torch.testing.assert_close(phi_low, phi_high)
        assert not torch.allclose(student_low, student_high, rtol=1e-3)
        student_other, phi_other = gradients("joint", 0.1, phi_kl=1.0, encoder=encoder)
        torch.testing.assert_close(student_low, student_other)
        assert not torch.allclose(phi_low, phi_other, rtol=1e-3)
        (_, phi_low), (_, phi_high) = (gradients("scratch", lam, encoder=encoder) for lam in (0.1, 1))
        assert not torch.allclose(phi_low, phi_high, rtol=1e-3)


def test_shuffled_rewards_are_those_of_another_sample(cache, fitted):
    rows = {"train": TeacherRows(Selection(cache / "selection"), "train")}
    frame = pl.read_parquet(fitted / "sarsa" / "rewards.parquet")
    rewards = {n: {k: np.array(v) for k, v in zip(frame["key"], frame[n], strict=True)} for n in ("mu", "log_sigma")}
    owned = {"mu": {row.key: np.full(len(row.response_ids), i) for i, row in enumerate(rows["train"])}}
    for seed in range(20):
        found = shuffled(owned, rows, seed)["mu"]
        assert all((found[row.key] != i).all() for i, row in enumerate(rows["train"]))
        assert len({values[0] for values in found.values()}) == len(rows["train"])  # every sample's are used
    found = shuffled(rewards, rows, seed=3)
    for name in rewards:
        before, after = ([values[name][row.key] for row in rows["train"]] for values in (rewards, found))
        assert [len(x) for x in before] == [len(x) for x in after]
        assert {x[0] for x in after} == {x[0] for x in before}
    with pytest.raises(UserError, match="needs two samples or more, and train holds 1"):
        one = SimpleNamespace(keys=rows["train"].keys[:1], response_tokens=rows["train"].response_tokens[:1])
        shuffled(rewards, {"train": one}, seed=0)
    again, other = shuffled(rewards, rows, seed=3), shuffled(rewards, rows, seed=4)
    key = rows["train"][0].key
    assert np.array_equal(again["mu"][key], found["mu"][key]) and not np.array_equal(other["mu"][key], found["mu"][key])


def test_a_token_that_the_student_cannot_say_is_named(cache, teacher, tmp_path):
    small = make_model(tmp_path / "small", seed=1, width=32)
    model = load_lm(small)
    model.resize_token_embeddings(40)
    model.save_pretrained(small)
    with pytest.raises(UserError, match=r"has token \d+, and the student .* has 40 embeddings"):
        run_distill(cache, teacher, small, tmp_path, "distill.reward=none")


def test_the_same_seed_gives_the_same_student_and_another_seed_another(cache, teacher, student, tmp_path):
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_distill(cache, teacher, student, tmp_path / name, f"seed={seed}", "distill.reward=zero")
        digests.append((tmp_path / name / "student" / "model.safetensors").read_bytes())
    assert digests[0] == digests[1] != digests[2]


def test_a_reward_of_other_residuals_is_refused(cache, fitted, teacher, student, tmp_path):
    with pytest.raises(UserError, match=r"gamma is 1.0 in the reward and 0.9 in distill.residual"):
        run_distill(cache, teacher, student, tmp_path, "distill.residual.gamma=0.9", reward_path=fitted)
    with pytest.raises(UserError, match="no fitted reward at"):
        run_distill(cache, teacher, student, tmp_path, reward_path=tmp_path / "absent")
    with pytest.raises(UserError, match="needs the folder of a fitted reward"):
        run_distill(cache, teacher, student, tmp_path)


def test_a_reward_of_another_selection_is_refused(cache, fitted, teacher, student, tmp_path):
    prompts = make_prompts(tmp_path / "p.parquet", train=45, validation=8)
    generate(make_params(teacher), prompts, tmp_path / "selection", cache / "store")
    with pytest.raises(UserError, match=r"no reward for 10 of the cached responses"):
        run_distill(tmp_path, teacher, student, tmp_path, reward_path=fitted)


def test_the_reward_of_another_teacher_is_refused(cache, fitted, student, tmp_path):
    other = make_model(tmp_path / "other", seed=5)
    generate(make_params(other), cache / "prompts.parquet", tmp_path / "selection")
    with pytest.raises(UserError, match="explains teacher"):
        run_distill(tmp_path, other, student, tmp_path, reward_path=fitted)


def test_a_student_that_cannot_read_the_longest_response_is_refused(cache, teacher, tmp_path):
    short = make_model(tmp_path / "short", seed=1, width=32, context=5)
    with pytest.raises(UserError, match="reads at most 5 tokens, and the longest sequence has"):
        run_distill(cache, teacher, short, tmp_path, "distill.reward=none")
    with pytest.raises(UserError, match="reads at most 5 tokens"):
        evaluate(
            make_params(teacher), cache / "prompts.parquet", {"short": short}, cache / "selection", tmp_path / "out"
        )


def test_a_student_that_cannot_be_saved_keeps_its_checkpoints(cache, teacher, student, tmp_path):
    """Its place is free when the training begins, and has somebody's notes in it when the training is over."""

    def occupy() -> None:
        while not list(tmp_path.glob("runs/distill/*/checkpoint-*")):
            time.sleep(0.001)
        (tmp_path / "student").mkdir()
        (tmp_path / "student" / "notes.txt").write_text("mine")

    occupant = threading.Thread(target=occupy, daemon=True)
    occupant.start()
    with pytest.raises(UserError, match=rf"{tmp_path / 'student'} was not made by xkd-pipeline"):
        run_distill(cache, teacher, student, tmp_path, "distill.reward=none", "distill.optimisation.steps=40")
    assert list(tmp_path.glob("runs/distill/*/checkpoint-*"))
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["notes.txt"]


def test_a_selection_that_is_rewritten_meanwhile_is_another_training_and_results_name_the_one_that_was_read(
    cache, rewritten, teacher, student, tmp_path, monkeypatch
):
    settings = ["distill.objective=sft", "distill.reward=none"]
    opened = {name: Selection(cache / name).fingerprint for name in ("selection", "scored")}
    copies = rewritten("stages.distill.training.load_lm")

    def end(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.distill.save_model", end)
    for run in (1, 2):  # what the first one kept is not gone on with
        with pytest.raises(KeyboardInterrupt):
            run_distill(copies, teacher, student, tmp_path, *settings, scored_path=copies / "scored")
        provenance = json.loads((tmp_path / "metrics" / "results.json").read_text())["provenance"]
        assert {name: provenance[name] for name in opened} == opened
        opened = {name: Selection(copies / name).fingerprint for name in opened}
        assert len(list((tmp_path / "runs" / "distill").iterdir())) == run


def test_a_student_with_another_tokenizer_is_refused(cache, teacher, tmp_path):
    stranger = make_model(tmp_path / "stranger", seed=0, words=[*WORDS, "more"])
    with pytest.raises(UserError, match="is not the teacher's"):
        run_distill(cache, teacher, stranger, tmp_path, "distill.reward=none")


def test_a_strong_td_term_is_warned_about(cache, teacher, student, tmp_path, capsys):
    run_distill(cache, teacher, student, tmp_path, "distill.reward=zero", "distill.lam=5")
    assert "lam_eff reached" in capsys.readouterr().err


def test_a_td_term_that_does_not_act_is_warned_about(cache, teacher, student, tmp_path, capsys):
    run_distill(cache, teacher, student, tmp_path / "weak", "distill.reward=zero", "distill.lam=0.000001")
    found = " ".join(capsys.readouterr().err.split())
    assert "under 0.0001 the X term does not act" in found and "raise distill.lam, or set distill.reward=none" in found
    run_distill(cache, teacher, student, tmp_path / "plain", "distill.reward=none", "distill.lam=0.000001")
    assert "lam_eff" not in capsys.readouterr().err


def test_a_shard_of_a_larger_vocabulary_trains_a_smaller_student(cache, student):
    """Padded vocabularies of one family: the teacher's ids beyond the student's embedding belong to the tail."""

    rows = list(Selection(cache / "selection").rows("validation"))
    highest = max(row.topk_ids.max() for row in rows)
    padded = [replace(row, topk_ids=np.where(row.topk_ids == highest, 60, row.topk_ids)) for row in rows]
    assert any((row.topk_ids == 60).any() for row in padded)
    kl = score_tokens(load_lm(student), collate(padded), sparse_divergence("fkl")).divergence
    assert kl.isfinite().all() and (kl >= -1e-6).all()

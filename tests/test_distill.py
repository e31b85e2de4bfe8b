"""What holds for distillation: every objective with every reward by configuration alone, and what is refused."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import load_lm, load_tokenizer
from pipeline.shards.selection import Selection
from stages.batches import collate, from_rows
from stages.distill import distill
from stages.evaluate import evaluate
from stages.generate import generate
from stages.objectives.token_scores import sparse_divergence
from stages.students import score_tokens
from tests.conftest import WORDS, make_model, make_params, make_prompts


def run_distill(cache, teacher, student, out, *overrides, reward_path=None):
    params = make_params(teacher, *overrides)
    return distill(params, cache / "selection", student, reward_path, out / "student", out / "metrics", out / "runs")


@pytest.mark.parametrize("kind", ["none", "frozen", "zero", "scratch"])
@pytest.mark.parametrize("objective", ["seqkd", "fkl", "rkl", "jsd"])
def test_every_objective_learns_plain_and_with_every_reward(cache, fitted, teacher, student, tmp_path, objective, kind):
    """By configuration alone. Eighty random samples can be memorised, so seqkd is judged by its training loss."""
    settings = [f"distill.objective={objective}", f"distill.reward={kind}", "distill.optimisation.steps=40"]
    metrics = run_distill(cache, teacher, student, tmp_path, *settings, reward_path=fitted)
    held_out = pl.read_csv(tmp_path / "metrics" / "heldout.csv")
    if objective == "seqkd":
        nll = pl.read_csv(tmp_path / "metrics" / "training.csv")["nll"]
        assert nll[-1] < nll[0] - 0.3
    else:
        assert held_out["kd"][-1] < held_out["kd"][0]
    assert ("td_nll" in held_out.columns) == (kind != "none") and ("reward_kl" in held_out.columns) == (
        kind == "scratch"
    )
    assert (metrics.get("heldout_lam_eff", 0) > 0) == (kind != "none")
    assert metrics["objective"].startswith("x-" if kind != "none" else objective)
    model = load_lm(tmp_path / "student")
    assert not torch.equal(model.base_model.embed_tokens.weight, load_lm(student).base_model.embed_tokens.weight)
    assert load_tokenizer(tmp_path / "student").vocab_size == 44
    card = (tmp_path / "student" / "README.md").read_text()
    assert metrics["objective"] in card and "apache-2.0" in card


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
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        distill(make_params(teacher, "distill.reward=none"), cache / "selection", student, None,
                tmp_path / "file" / "student", tmp_path / "metrics", tmp_path / "runs")  # fmt: skip
    assert list(tmp_path.glob("runs/distill/*/checkpoint-*"))


def test_a_student_with_another_tokenizer_is_refused(cache, teacher, tmp_path):
    stranger = make_model(tmp_path / "stranger", seed=0, words=[*WORDS, "more"])
    with pytest.raises(UserError, match="is not the teacher's"):
        run_distill(cache, teacher, stranger, tmp_path, "distill.reward=none")


def test_a_strong_td_term_is_warned_about(cache, teacher, student, tmp_path, capsys):
    run_distill(cache, teacher, student, tmp_path, "distill.reward=zero", "distill.lam=5")
    assert "lam_eff reached" in capsys.readouterr().err


def test_a_shard_of_a_larger_vocabulary_trains_a_smaller_student(cache, student):
    """Padded vocabularies of one family: the teacher's ids beyond the student's embedding belong to the tail."""

    rows = list(Selection(cache / "selection").rows("validation"))
    highest = max(row.topk_ids.max() for row in rows)
    padded = [replace(row, topk_ids=np.where(row.topk_ids == highest, 60, row.topk_ids)) for row in rows]
    assert any((row.topk_ids == 60).any() for row in padded)
    kl = score_tokens(load_lm(student), collate(from_rows(padded, True)), sparse_divergence("fkl")).divergence
    assert kl.isfinite().all() and (kl >= -1e-6).all()

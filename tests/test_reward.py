"""What holds for the reward: the teacher's residuals, the posterior fitted to them, and its audit."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import load_lm
from pipeline.params import Residual
from pipeline.shards.schema import Row
from pipeline.shards.selection import Selection
from stages.audit import Scored, auc, audit, calibration
from stages.generate import generate
from stages.residuals import residual_scale, teacher_residual
from stages.reward import _posterior_of, reward
from stages.reward_model import ActionHead, RewardPosterior, load_posterior
from tests.conftest import make_params, make_prompts

SARSA = Residual(q_source="logits", gamma=1.0, terminal="drop")


def make_row(logprobs, lse, finish="stop") -> Row:
    steps = len(logprobs)
    return Row(
        "k", "teacher", "p", 0, "", "", np.zeros(2, np.int32), np.zeros(steps, np.int32), finish,
        np.array(logprobs, np.float32), np.zeros((steps, 1), np.int32), np.zeros((steps, 1), np.float16),
        None if lse is None else np.array(lse, np.float32),
    )  # fmt: skip


def test_the_teachers_residuals_come_from_logprobs_and_lse():
    row = make_row([-1.0, -2.0, -0.5], [3.0, 5.0, 4.0])  # Q = 2, 3, 3.5
    delta, kept = teacher_residual(row, "sarsa", SARSA)
    assert delta[kept].tolist() == [-1.0, -0.5]
    delta, kept = teacher_residual(row, "soft", SARSA)
    assert delta[kept].tolist() == [-3.0, -1.0]
    logprobs = Residual(q_source="logprobs", gamma=0.9, terminal="zero")
    delta, kept = teacher_residual(make_row([-1.0, -2.0, -0.5], None), "soft", logprobs)
    assert kept.all() and delta.tolist() == [-1.0, -2.0, -0.5]  # log pi itself, whatever gamma, EOS included
    assert teacher_residual(make_row([-1.0, -2.0], [0.0, 0.0], "length"), "soft", logprobs)[1].tolist() == [True, False]


def test_the_scale_leaves_the_last_step_out_and_gamma_below_one_subtracts_the_mean():
    rows = [make_row([0.0, 0.0, 0.0], [1.0, 3.0, 100.0]), make_row([0.0, 0.0], [5.0, 4.0])]  # inner: -2, -97, 1
    inner = np.array([-2.0, -97.0, 1.0])
    scale, offset = residual_scale(rows, "sarsa", SARSA.model_copy(update={"terminal": "zero"}))
    assert (scale, offset) == (pytest.approx(inner.std(), rel=1e-6), 0.0)
    assert residual_scale(rows, "sarsa", SARSA.model_copy(update={"gamma": 0.5}))[1] != 0
    with pytest.raises(UserError, match="too short to have TD residuals"):
        residual_scale([make_row([0.0], [1.0])], "sarsa", SARSA)


def test_a_cache_without_lse_names_the_option_that_needs_it():
    with pytest.raises(UserError, match=r"no lse, which q_source: logits needs.*q_source: logprobs"):
        teacher_residual(make_row([-1.0, -2.0], None), "sarsa", SARSA)


def test_the_action_head_computes_its_formula_and_its_sigma_has_a_floor():
    torch.manual_seed(0)
    head = ActionHead(8, 11, sigma_min=0.3)
    with torch.no_grad():
        head.weight.fill_(2.0)
    states, actions = torch.randn(5, 8) * 20, torch.tensor([0, 3, 10, 1, 1])
    mu, log_sigma = head(states, actions)
    logprob = torch.log_softmax(states @ head.actions.weight.T, -1)[range(5), actions]
    torch.testing.assert_close(mu, 2 * logprob + head.state(states)[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_sigma, head.state(states)[:, 1].clamp_min(np.log(0.3)))
    assert (log_sigma.exp() >= 0.3 - 1e-6).all() and (log_sigma.exp() < 0.31).any()


def test_the_posterior_starts_from_the_student(student):
    posterior, model = RewardPosterior.from_student(student, 0.3), load_lm(student)
    torch.testing.assert_close(posterior.head.actions.weight, model.get_output_embeddings().weight)
    for one, other in zip(posterior.encoder.parameters(), model.base_model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_reward_is_fitted_for_both_forms_with_its_scale_and_the_rewards_of_all_tokens(fitted, cache, student):
    selection = Selection(cache / "selection")
    rows = {row.key: row for part in ("train", "validation", "scored") for row in selection.rows(part)}
    for td, terminal in (("sarsa", "drop"), ("soft", "zero")):
        description = json.loads((fitted / td / "reward.json").read_text())
        assert description["residual"]["terminal"] == terminal and description["c"] > 0
        frame = pl.read_parquet(fitted / td / "rewards.parquet")
        assert set(frame["key"]) == rows.keys()
        assert all(len(mu) == len(rows[key].response_ids) for key, mu in zip(frame["key"], frame["mu"], strict=True))
        assert frame["log_sigma"].explode().min() >= np.log(0.3) - 1e-6
        assert sorted(path.suffix for path in (fitted / td).iterdir()) == [".json", ".parquet", ".safetensors"]
    posterior = load_posterior(fitted / "sarsa", student, 0.3)
    row = next(iter(rows.values()))
    frame = pl.read_parquet(fitted / "sarsa" / "rewards.parquet").filter(pl.col("key") == row.key)
    np.testing.assert_allclose(_posterior_of([row], posterior)[row.key][0], frame["mu"][0], atol=1e-5)


def test_the_audit_stands_beside_its_baselines(fitted, cache):
    results = json.loads((cache / "audit" / "results.json").read_text())
    assert results["audit"].keys() == {"reward", "student_logprob", "teacher_logprob"}
    for judge in results["audit"].values():
        assert judge.keys() == {"within_mean", "pooled_mean", "within_sum", "pooled_sum"}
        assert all(0 <= r["low"] <= r["auc"] <= r["high"] <= 1 for r in judge.values())
    metrics = json.loads((cache / "audit" / "metrics.json").read_text())
    assert metrics["auc_reward"] == results["audit"]["reward"]["within_mean"]["auc"]
    assert results["provenance"]["versions"]["torch"] == torch.__version__


def test_auc_is_the_share_of_pairs_in_the_right_order():
    assert auc(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == (1 + 0.5 + 1 + 1) / 4
    # Within prompts the order is perfect, although one prompt's wrong answer is above the other's right one.
    scored = [Scored("a", right, np.array([value, 0.0])) for right, value in ((True, 9.0), (False, 8.0))]
    scored += [Scored("b", right, np.array([value])) for right, value in ((True, 2.0), (False, 1.0))]
    found = audit([*scored, Scored("only right", True, np.array([0.0]))], 50, 0)
    assert found["within_mean"]["auc"] == found["within_sum"]["auc"] == 1.0
    assert found["pooled_sum"]["auc"] == 0.75


def test_calibration_counts_what_lies_inside_the_intervals():
    posterior = {"a": (np.zeros(4), np.log([1.0, 1.0, 1.0, 0.3]))}
    found = calibration(
        posterior, {"a": np.array([0.5, 1.5, 3.0, 0.1])}, np.log(0.3), {"a": np.array([True, True, True, True])}
    )
    assert found == {"inside_1_sigma": 0.5, "inside_2_sigma": 0.75, "sigma_at_floor": 0.25}


def test_without_corrupted_references_there_is_no_audit_and_a_warning(teacher, student, tmp_path, capsys):
    prompts = make_prompts(tmp_path / "p.parquet", train=8, validation=4)
    params = make_params(teacher, "generate.corrupted=0", "reward.optimisation.steps=5")
    generate(params, prompts, tmp_path / "selection")
    found = reward(params, tmp_path / "selection", student, tmp_path / "reward", tmp_path / "audit", tmp_path / "runs")
    assert "audit" not in found and "the reward is not audited" in capsys.readouterr().err


def test_a_selection_without_held_out_rows_is_refused(teacher, student, tmp_path):
    prompts = make_prompts(tmp_path / "p.parquet", train=4)
    generate(make_params(teacher), prompts, tmp_path / "selection")
    with pytest.raises(UserError, match="no validation responses"):
        reward(make_params(teacher), tmp_path / "selection", student, *(tmp_path / name for name in "abc"))

"""What holds for reward, distill and evaluate on a small cached teacher."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import load_causal_lm, load_tokenizer
from pipeline.params import Residual
from pipeline.shards.schema import Row
from pipeline.shards.selection import Selection
from stages.audit import Scored, auc, audit, calibration
from stages.distill import distill
from stages.evaluate import evaluate
from stages.generate import generate
from stages.residuals import residual_scale, teacher_residual
from stages.reward import reward
from stages.reward_model import ActionHead, RewardPosterior, load_posterior
from tests.conftest import WORDS, make_model, make_params, make_prompts

SARSA = Residual(q_source="logits", gamma=1.0, terminal="drop")


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    """Prompts and the cached teacher."""
    folder = tmp_path_factory.mktemp("cache")
    prompts = make_prompts(folder / "prompts.parquet", train=40, validation=8, test=12)
    generate(make_params(teacher), prompts, folder / "selection", folder / "store")
    return folder


@pytest.fixture(scope="module")
def fitted(cache, teacher, student):
    """The reward fitted on it."""
    reward(make_params(teacher), cache / "selection", student, cache / "reward", cache / "audit", cache / "runs")
    return cache / "reward"


def run_distill(cache, teacher, student, out, *overrides, reward_path=None):
    params = make_params(teacher, *overrides)
    return distill(params, cache / "selection", student, reward_path, out / "student", out / "metrics", out / "runs")


# Residuals and the reward


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
    posterior, model = RewardPosterior.from_student(student, 0.3), load_causal_lm(student)
    torch.testing.assert_close(posterior.head.actions.weight, model.get_output_embeddings().weight)
    for one, other in zip(posterior.encoder.parameters(), model.base_model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_reward_is_fitted_for_both_forms_with_its_scale_and_the_rewards_of_all_tokens(fitted, cache, student):
    selection = Selection(cache / "selection")
    rows = {row.key: row for part in ("train", "validation") for row in selection.rows(part)}
    for td, terminal in (("sarsa", "drop"), ("soft", "zero")):
        description = json.loads((fitted / td / "reward.json").read_text())
        assert description["residual"]["terminal"] == terminal and description["c"] > 0
        frame = pl.read_parquet(fitted / td / "rewards.parquet")
        assert set(frame["key"]) == rows.keys()
        assert all(len(mu) == len(rows[key].response_ids) for key, mu in zip(frame["key"], frame["mu"], strict=True))
        assert frame["log_sigma"].explode().min() >= np.log(0.3) - 1e-6
        assert sorted(path.suffix for path in (fitted / td).iterdir()) == [".json", ".parquet", ".safetensors"]
    posterior = load_posterior(fitted / "sarsa", student, 0.3)
    from stages.reward import _posterior_of

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


# Distillation


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
    model = load_causal_lm(tmp_path / "student")
    assert not torch.equal(model.base_model.embed_tokens.weight, load_causal_lm(student).base_model.embed_tokens.weight)
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


# Evaluation


@pytest.fixture(scope="module")
def results(cache, teacher, student):
    models = {"teacher": teacher, "student": student, "same": student}
    params = make_params(teacher, "evaluate.sampled_prompts=6")
    return evaluate(params, cache / "prompts.parquet", models, cache / "selection", cache / "evaluation")


def test_a_model_compared_with_itself_differs_by_exactly_nothing(results):
    same = results["differences"]["student"]
    for mode, metric in (("greedy", "accuracy"), ("sampled", "accuracy"), ("heldout", "kl_to_teacher")):
        assert same[mode][metric] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_teacher_is_nearest_to_itself(results):
    kl = {name: modes["heldout"]["kl_to_teacher"]["value"] for name, modes in results["metrics"].items()}
    assert abs(kl["teacher"]) < 1e-3 < kl["student"] == kl["same"]


def test_results_say_what_they_were_made_of(results, cache):
    provenance = json.loads((cache / "evaluation" / "results.json").read_text())["provenance"]
    assert provenance["task"] == {"name": "arithmetic", "version": 1} and provenance["seed"] == 0
    assert provenance["models"]["student"] == provenance["models"]["same"] != provenance["models"]["teacher"]
    assert {"git_commit", "versions", "prompts", "evaluate", "teacher"} <= provenance.keys()


def test_answers_are_kept_with_their_prompts_and_references(results, cache):
    frame = pl.read_parquet(cache / "evaluation" / "predictions.parquet")
    assert frame.columns == ["model", "mode", "prompt_id", "sample", "prompt", "response", "references"]
    assert frame.filter(pl.col("mode") == "greedy").height == 3 * 12
    assert frame.filter(pl.col("mode") == "sampled").height == 3 * 6 * 2
    headline = json.loads((cache / "evaluation" / "metrics.json").read_text())
    assert headline["same"].keys() == {"accuracy", "sampled_accuracy", "kl"}


def test_a_model_with_another_tokenizer_is_not_compared(cache, teacher, tmp_path):
    stranger = make_model(tmp_path / "stranger", seed=0, words=WORDS[::-1])
    with pytest.raises(UserError, match="is not the teacher's"):
        evaluate(
            make_params(teacher), cache / "prompts.parquet", {"s": stranger}, cache / "selection", tmp_path / "out"
        )


def test_evaluation_needs_test_prompts_with_references(cache, teacher, tmp_path):
    prompts = make_prompts(tmp_path / "p.parquet", train=3)
    with pytest.raises(UserError, match="no test prompts with references"):
        evaluate(make_params(teacher), prompts, {"a": teacher}, cache / "selection", tmp_path / "out")


def test_a_shard_of_a_larger_vocabulary_trains_a_smaller_student(cache, student):
    """Padded vocabularies of one family: the teacher's ids beyond the student's embedding belong to the tail."""
    from stages.batches import collate, from_rows
    from stages.objectives.divergences import forward_kl
    from stages.students import score_tokens

    rows = list(Selection(cache / "selection").rows("validation"))
    highest = max(row.topk_ids.max() for row in rows)
    padded = [replace(row, topk_ids=np.where(row.topk_ids == highest, 60, row.topk_ids)) for row in rows]
    assert any((row.topk_ids == 60).any() for row in padded)
    kl = score_tokens(load_causal_lm(student), collate(from_rows(padded, True)), forward_kl).divergence
    assert kl.isfinite().all() and (kl >= -1e-6).all()

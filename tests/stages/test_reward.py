"""What holds for the reward: the teacher's residuals, the posterior fitted to them, and its audit."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from pipeline.errors import UserError
from pipeline.learning.checkpoints import once
from pipeline.learning.forward import States, per_row
from pipeline.learning.posterior import ActionHead, RewardPosterior, StateHead, load_posterior
from pipeline.learning.residuals import Scaled, teacher_residual
from pipeline.models import load_lm
from pipeline.params import Residual
from pipeline.prompts import Prompt
from pipeline.store.schema import Row
from pipeline.store.selection import Selection
from pipeline.tasks import get_task
from stages.generate import generate
from stages.reward import reward
from stages.reward.fit import calibration
from stages.reward.rankings import Scored, above_the_median, auc, audit, halves, held_out_rankings, rankable
from stages.score import score
from tests.conftest import at_once, make_model, make_params, make_prompts

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
    scaled = Scaled.of(rows, "sarsa", SARSA.model_copy(update={"terminal": "zero"}))
    assert (scaled.scale, scaled.offset) == (pytest.approx(inner.std(), rel=1e-6), 0.0)
    first = scaled.clipped(rows[:1])["k"]
    assert first.tolist() == pytest.approx([-2 / inner.std(), -97 / inner.std(), 100 / inner.std()], rel=1e-5)
    assert Scaled.of(rows, "sarsa", SARSA.model_copy(update={"gamma": 0.5})).offset != 0
    with pytest.raises(UserError, match="too short to have TD residuals"):
        Scaled.of([make_row([0.0], [1.0])], "sarsa", SARSA)


def test_outliers_are_clipped_where_a_posterior_is_fitted():
    rows = [make_row([0.0] * 200, [float(i % 2) for i in range(199)] + [90.0])]
    assert Scaled.of(rows, "sarsa", SARSA.model_copy(update={"terminal": "drop"})).clipped(rows)["k"].min() == -5


def test_a_cache_without_lse_names_the_option_that_needs_it():
    with pytest.raises(UserError, match=r"no lse, which q_source: logits needs.*q_source: logprobs"):
        teacher_residual(make_row([-1.0, -2.0], None), "sarsa", SARSA)


def make_states(n: int, width: int) -> States:
    """A response of n tokens after a prompt of one."""
    return States(torch.randn(1, n + 1, width) * 20, torch.zeros(n, dtype=torch.long), torch.arange(n))


def test_the_action_head_computes_its_formula_and_its_sigma_has_a_floor():
    torch.manual_seed(0)
    head = ActionHead(8, 11, sigma_min=0.3)
    with torch.no_grad():
        head.weight.fill_(2.0)
    states, actions = make_states(5, 8), torch.tensor([0, 3, 10, 1, 1])
    mu, log_sigma = head(states, actions)
    before = states.hidden[0, :5]
    logprob = torch.log_softmax(before @ head.actions.weight.T, -1)[range(5), actions]
    torch.testing.assert_close(mu, 2 * logprob + head.state(before)[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_sigma, head.state(before)[:, 1].clamp_min(np.log(0.3)))
    assert (log_sigma.exp() >= 0.3 - 1e-6).all() and (log_sigma.exp() < 0.31).any()


def test_a_long_response_goes_through_the_action_head_in_chunks_with_the_same_gradients():
    torch.manual_seed(0)
    head, states, actions = ActionHead(8, 11, 0.3), make_states(1100, 8), torch.randint(11, (1100,))
    head(states, actions)[0].sum().backward()
    found, head.actions.weight.grad = head.actions.weight.grad, None
    torch.log_softmax(head.actions(states.before), -1)[range(1100), actions].sum().backward()
    torch.testing.assert_close(found, head.actions.weight.grad, atol=1e-2, rtol=1e-3)


def test_the_state_head_reads_the_state_that_has_consumed_the_action():
    torch.manual_seed(0)
    head, states = StateHead(8, 11, sigma_min=0.3), make_states(5, 8)
    mu, log_sigma = head(states, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(
        torch.stack([mu, log_sigma], -1),
        torch.stack(
            [head.state(states.hidden[0, 1:])[:, 0], head.state(states.hidden[0, 1:])[:, 1].clamp_min(np.log(0.3))], -1
        ),
    )


@pytest.mark.parametrize("encoder", ["own", "separate"])
def test_the_posterior_starts_from_the_student(student, encoder):
    posterior, model = RewardPosterior.from_student(student, "action", encoder, 0.3), load_lm(student)
    torch.testing.assert_close(posterior.head.actions.weight, model.get_output_embeddings().weight)
    for one, other in zip(posterior.encoder.parameters(), model.base_model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        assert one.requires_grad == (encoder == "separate")


def test_a_reward_is_fitted_for_both_forms_with_its_scale_and_the_rewards_of_all_tokens(fitted, cache, student):
    parts = [("selection", "train"), ("selection", "validation"), ("selection", "scored"), ("scored", "references")]
    rows = {row.key: row for folder, part in parts for row in Selection(cache / folder).rows(part)}
    for td, terminal in (("sarsa", "drop"), ("soft", "zero")):
        description = json.loads((fitted / td / "reward.json").read_text())
        assert description["residual"]["terminal"] == terminal and description["c"] > 0
        frame = pl.read_parquet(fitted / td / "rewards.parquet")
        assert set(frame["key"]) == rows.keys()
        assert all(len(mu) == len(rows[key].response_ids) for key, mu in zip(frame["key"], frame["mu"], strict=True))
        assert frame["log_sigma"].explode().min() >= np.log(0.3) - 1e-6
        assert sorted(path.suffix for path in (fitted / td).iterdir()) == [".json", ".parquet", ".safetensors"]
    posterior = load_posterior(fitted / "sarsa", student)
    row = next(iter(rows.values()))
    frame = pl.read_parquet(fitted / "sarsa" / "rewards.parquet").filter(pl.col("key") == row.key)
    ((mu, _),) = per_row([row], posterior)
    np.testing.assert_allclose(mu, frame["mu"][0], atol=1e-5)


def test_the_audit_stands_beside_its_baselines(fitted, cache):
    """Negatives are chosen on every other held-out prompt, and both rewards are reported on the others."""
    results = json.loads((cache / "audit" / "results.json").read_text())
    chosen, other = ("with", "without") if results["negatives"]["used"] else ("without", "with")
    assert results["negatives"]["choice_auc"][chosen] >= results["negatives"]["choice_auc"][other]
    assert results["audit"].keys() == {"corrupted", "samples"}
    assert results["audited_prompts"]["corrupted"] == 4  # of 8
    for judges in results["audit"].values():
        assert judges.keys() == {"reward", f"reward_{other}_negatives", "student_logprob", "teacher_logprob"}
        for judge in judges.values():
            assert judge.keys() == {"within_mean", "pooled_mean", "within_sum", "pooled_sum"}
            assert all(0 <= r["low"] <= r["auc"] <= r["high"] <= 1 for r in judge.values())
    assert results["soft"].keys() >= {"heldout_nll", "inside_1_sigma", "inside_2_sigma", "sigma_at_floor"}
    assert results["provenance"]["versions"]["torch"] == torch.__version__


def run_reward(cache, teacher, student, out, *overrides):
    params = make_params(teacher, "prepare.task=translation", *overrides)
    paths = cache / "selection", student, out / "reward", out / "audit", out / "runs"
    return reward(params, *paths, scored_path=cache / "scored", prompts_path=cache / "prompts.parquet")


def test_results_name_the_selections_that_were_read_although_they_were_rewritten_meanwhile(
    cache, rewritten, teacher, student, tmp_path
):
    copies = rewritten("stages.reward.fit._readable")
    paths = copies / "selection", student, tmp_path / "reward", tmp_path / "audit", tmp_path / "runs"
    reward(make_params(teacher), *paths, scored_path=copies / "scored", prompts_path=cache / "prompts.parquet")
    provenance = json.loads((tmp_path / "audit" / "results.json").read_text())["provenance"]
    for name in ("selection", "scored"):
        assert provenance[name] == Selection(cache / name).fingerprint != Selection(copies / name).fingerprint


@pytest.mark.parametrize("content", [b"", b"torn", None], ids=["empty", "torn", "a pipe"])
def test_weights_of_a_reward_that_cannot_be_read_are_named(fitted, student, tmp_path, content):
    folder = shutil.copytree(fitted / "sarsa", tmp_path / "reward")
    weights = folder / "reward.safetensors"
    weights.unlink()
    os.mkfifo(weights) if content is None else weights.write_bytes(content)
    with at_once(), pytest.raises(UserError, match=rf"{weights} does not hold this reward: .*again$") as found:
        load_posterior(folder, student)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("fit", ["teacher", "policy"])
@pytest.mark.parametrize("encoder", ["own", "separate"])
@pytest.mark.parametrize("head", ["action", "state"])
def test_every_head_and_encoder_is_fitted_to_the_teacher_and_jointly_with_a_policy(
    cache, teacher, student, tmp_path, head, encoder, fit
):
    settings = [f"reward.head={head}", f"reward.encoder={encoder}", f"reward.fit={fit}", "reward.negatives=never"]
    found = run_reward(cache, teacher, student, tmp_path, *settings, "reward.optimisation.steps=40")
    curve = pl.read_csv(tmp_path / "audit" / "soft.csv")["reward_nll"]
    assert found["soft"]["heldout_nll"] == pytest.approx(curve.min(), rel=1e-6)
    assert curve.min() < curve[0] or fit == "policy"  # its own Q-values move away while they are explained
    description = json.loads((tmp_path / "reward" / "soft" / "reward.json").read_text())
    assert (description["head"], description["encoder"], description["fit"]) == (head, encoder, fit)
    assert found["audit"].keys() == {"corrupted", "samples"} and not found["negatives"]["used"]
    # A frozen encoder is the student's; one that was the policy's has learned.
    posterior, model = load_posterior(tmp_path / "reward" / "soft", student), load_lm(student)
    pairs = zip(posterior.encoder.parameters(), model.base_model.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    assert same == (encoder == "own" and fit == "teacher")
    frame = pl.read_parquet(tmp_path / "reward" / "soft" / "rewards.parquet").head(1)
    (row,) = [row for row in Selection(cache / "selection").rows("train") if row.key == frame["key"][0]]
    ((mu, _),) = per_row([row], posterior)
    np.testing.assert_allclose(mu, frame["mu"][0], atol=1e-5)


def test_negatives_are_in_the_soft_fit_where_they_are_wanted(cache, teacher, student, tmp_path):
    found = run_reward(cache, teacher, student, tmp_path, "reward.negatives=always")
    negatives = list(Selection(cache / "scored").rows("negatives"))
    assert {row.origin for row in negatives} == {"corrupted", "student"}
    assert found["negatives"] == {"used": True, "rows": len(negatives)}
    assert found["audited_prompts"]["corrupted"] == 8
    read = {
        td: json.loads((tmp_path / "reward" / td / "reward.json").read_text())["negatives"] for td in ("sarsa", "soft")
    }
    assert read == {"sarsa": 0, "soft": len(negatives)}
    without = run_reward(cache, teacher, student, tmp_path / "never", "reward.negatives=never")
    assert without["sarsa"] == found["sarsa"] and without["soft"]["c"] == found["soft"]["c"]
    assert without["soft"]["heldout_nll"] != found["soft"]["heldout_nll"]


def test_negatives_that_are_not_there_are_missed_and_a_policy_takes_none(cache, teacher, student, tmp_path):
    paths = cache / "selection", student, *(tmp_path / name for name in "abc")
    with pytest.raises(UserError, match=r"reward\.negatives: always needs negatives"):
        reward(make_params(teacher, "reward.negatives=always"), *paths)
    with pytest.raises(UserError, match="takes no negatives"):
        make_params(teacher, "reward.negatives=always", "reward.fit=policy")


def test_what_another_teacher_scored_is_refused(cache, student, tmp_path):
    other = make_model(tmp_path / "other", seed=5)
    generate(make_params(other), cache / "prompts.parquet", tmp_path / "selection")
    with pytest.raises(UserError, match="is of teacher"):
        run_reward_of = tmp_path / "selection", student, *(tmp_path / name for name in "abc")
        reward(make_params(other), *run_reward_of, scored_path=cache / "scored")


def test_samples_of_another_student_or_of_other_prompts_are_refused(cache, teacher, tmp_path):
    other = make_model(tmp_path / "other", seed=7, width=32, layers=1)
    with pytest.raises(UserError, match="samples of another student"):
        run_reward(cache, teacher, other, tmp_path)
    rows = list(Selection(cache / "scored").rows("samples"))
    task, row = get_task("translation"), rows[0]
    strangers = [Prompt(row.prompt_id, "another question", ("w1 w2",), "validation")]
    with pytest.raises(UserError, match="was asked something else than prompt"):
        held_out_rankings([], rows, strangers, task)


def test_scored_rows_that_the_student_cannot_read_are_left_out_and_named(cache, teacher, tmp_path, capsys):
    """A long reference must not keep anybody from fitting a reward to the teacher's own words."""
    short = make_model(tmp_path / "short", seed=1, width=32, layers=1, context=8)
    prompts = make_prompts(tmp_path / "p.parquet", train=8, validation=4)
    params = make_params(teacher, "max_tokens=4", "score.samples=0", "score.validation_samples=0")
    generate(params, prompts, tmp_path / "selection")
    score(params, prompts, short, tmp_path / "scored")
    spoken, references = (
        max(len(row.prompt_ids) + len(row.response_ids) for row in Selection(tmp_path / folder).rows(part))
        for folder, part in (("selection", "train"), ("scored", "references"))
    )
    assert spoken < references
    shorter = make_model(tmp_path / "shorter", seed=1, width=32, context=spoken)
    paths = tmp_path / "selection", shorter, *(tmp_path / name for name in "abc")
    found = reward(params, *paths, scored_path=tmp_path / "scored")
    assert found["negatives"] == {"used": False, "rows": 0} and "audit" not in found
    assert f"longer than the student reads ({spoken} tokens)" in capsys.readouterr().err


def test_a_prompt_too_few_to_choose_negatives_by_is_said(cache, teacher, student, tmp_path, capsys):
    few = make_prompts(tmp_path / "p.parquet", train=8, validation=1)
    params = make_params(teacher, "score.validation_samples=0")
    generate(params, few, tmp_path / "selection")
    score(params, few, student, tmp_path / "scored")
    paths = tmp_path / "selection", student, *(tmp_path / name for name in "abc")
    found = reward(params, *paths, scored_path=tmp_path / "scored", prompts_path=few)
    assert not found["negatives"]["used"] and found["audited_prompts"] == {"corrupted": 1}
    assert "too few held-out prompts" in capsys.readouterr().err


def test_a_fit_that_was_finished_is_not_made_again(tmp_path):
    learner, calls = torch.nn.Linear(2, 2), []

    def training():
        calls.append(1)
        torch.nn.init.constant_(learner.weight, 5.0)
        (tmp_path / "checkpoint-3").mkdir(parents=True)
        return [{"step": 3}]

    assert once(tmp_path, learner, training) == [{"step": 3}]
    torch.nn.init.zeros_(learner.weight)
    assert once(tmp_path, learner, training) == [{"step": 3}] and len(calls) == 1
    assert (learner.weight == 5).all() and not list(tmp_path.glob("checkpoint-*"))


def labelled(prompt: str, *values: float) -> list[tuple[Row, float]]:
    row = make_row([0.0], [0.0])
    return [(replace(row, key=f"{prompt}{i}", prompt_id=prompt), value) for i, value in enumerate(values)]


def test_samples_are_split_at_the_prompts_median_and_ties_are_left_out():
    found = above_the_median({"a": labelled("a", 1, 2, 3, 4), "b": labelled("b", 5, 5, 9), "c": labelled("c", 7)})
    assert [(row.key, right) for row, right in found] == [
        ("a0", False),
        ("a1", False),
        ("a2", True),
        ("a3", True),
        ("b2", True),
    ]
    assert {row.prompt_id for row, _ in rankable(found)} == {"a"}


def test_prompts_are_either_chosen_by_or_reported():
    ranking = [(row, value > 0) for prompt in "abcde" for row, value in labelled(prompt, 0, 1)]
    chosen, reported = ({row.prompt_id for row, _ in side["x"]} for side in halves({"x": ranking}))
    assert chosen == {"a", "c", "e"} and reported == {"b", "d"}


def test_auc_is_the_share_of_pairs_in_the_right_order():
    assert auc(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == (1 + 0.5 + 1 + 1) / 4
    # Within prompts the order is perfect, although one prompt's wrong answer is above the other's right one.
    scored = [Scored("a", right, np.array([value, 0.0])) for right, value in ((True, 9.0), (False, 8.0))]
    scored += [Scored("b", right, np.array([value])) for right, value in ((True, 2.0), (False, 1.0))]
    found = audit(scored, 50, 0)
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

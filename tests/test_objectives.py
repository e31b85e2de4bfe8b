"""What holds for the objectives: golden values, exactness of the sparse forms, meaning of the residuals."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.objectives.avril import gaussian_nll, kept_steps, kl_to_prior, td_residual
from stages.objectives.divergences import DIVERGENCES, forward_kl, jsd, kl, reverse_kl
from stages.objectives.outcomes import bucket, dense
from stages.objectives.token_scores import TopK, chunked_token_scores, sparse_divergence, token_scores
from tests import golden

SHARED_GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "objectives.json"
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def random_logits(seed: int, n: int = 4, v: int = 12, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = torch.log_softmax(logits, -1).topk(k, -1)
    return ids, values


def test_golden_values_are_matched():
    """A hand-computed case of each section, in the format of the golden files."""
    uniform, skewed = [[0.0, 0.0]], [[math.log(3.0), 0.0]]
    case = {"student_logits": [uniform], "teacher_logits": [skewed], "mask": [[True]], "temperature": 1.0}
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    mixed = [0.625, 0.375]
    half = 0.5 * (0.75 * math.log(0.75 / mixed[0]) + 0.25 * math.log(0.25 / mixed[1]))
    half += 0.5 * (0.5 * math.log(0.5 / mixed[0]) + 0.5 * math.log(0.5 / mixed[1]))
    nll = math.log(2.0)
    log_two_pi = math.log(2 * math.pi)
    errors, problems = golden.check(
        {
            "generalized_jsd": [
                case | {"beta": 0.0, "loss_mean_over_unmasked_tokens": forward},
                case | {"beta": 0.5, "loss_mean_over_unmasked_tokens": half},
            ],
            "avril": [
                {
                    "gamma": 0.5, "lam": 2.0, "terminal": "zero", "actions": [0, 1],
                    "q_values": [[1.0, 1.0], [4.0, 4.0]],
                    "reward_mean": [0.0, 1.0], "reward_log_std": [0.0, 0.0], "td": [-1.0, 4.0], "nll": nll,
                    "kl_to_prior": 0.25, "td_nll": 0.5 * log_two_pi + 0.5 * (0.5 + 4.5),
                    "elbo_loss": nll + 0.25 + 2 * (0.5 * log_two_pi + 2.5),
                }
            ],
            "minillm_advantages": [
                {
                    "gamma": 0.5, "length_normalization": True, "student_logprobs": [-1.0, -2.0],
                    "teacher_logprobs": [-2.0, 0.0], "advantages": [0.0, 2.0],
                }
            ],
        }
    )  # fmt: skip
    assert not problems and max(errors.values()) < 1e-12 and len(errors) == 3


def test_the_golden_check_fails_on_wrong_values_and_on_unknown_or_missing_parts():
    case = {
        "gamma": 1.0,
        "length_normalization": False,
        "student_logprobs": [-1.0],
        "teacher_logprobs": [-1.0],
        "advantages": [0.1],
    }
    _, problems = golden.check({"minillm_advantages": [case], "novelty": []})
    assert any("error 1.0e-01" in problem for problem in problems)
    assert "unknown section novelty" in problems and "missing section avril" in problems
    _, problems = golden.check({"minillm_advantages": [case | {"extra": 1}]})
    assert any("extra" in problem for problem in problems)


@pytest.mark.skipif(not SHARED_GOLDEN.exists(), reason="the golden file lies beside the project, not in it")
def test_the_shared_golden_file_is_matched(capsys):
    assert golden.main(str(SHARED_GOLDEN)) == 0
    assert len(json.loads(SHARED_GOLDEN.read_text())) == len(capsys.readouterr().out.splitlines()) == 3


def test_kl_is_that_of_torch():
    t, s = dense(random_logits(0), random_logits(1))
    expected = torch.nn.functional.kl_div(s, t, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl(t, s), expected)


def test_jsd_at_its_ends_is_forward_and_reverse_kl_and_tends_to_forward_kl_when_scaled():
    t, s = dense(random_logits(0, scale=1), random_logits(1, scale=1))
    torch.testing.assert_close(jsd(t, s, 0), forward_kl(t, s))
    torch.testing.assert_close(jsd(t, s, 1), reverse_kl(t, s))
    torch.testing.assert_close(jsd(t, s, 1e-7) / 1e-7, forward_kl(t, s), rtol=1e-4, atol=1e-4)


def test_outcomes_that_the_teacher_excludes_cost_nothing_forward_and_give_finite_gradients():
    teacher = torch.tensor([[0.0, -math.inf, -math.inf]])
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = forward_kl(teacher, torch.log_softmax(logits, -1)).sum() + jsd(teacher, torch.log_softmax(logits, -1)).sum()
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@every_divergence
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), scale=st.floats(0.1, 30), beta=st.floats(0.01, 0.99))
def test_bucket_is_a_divergence_and_a_lower_bound(name, seed, k, scale, beta):
    teacher, student = random_logits(seed, scale=scale), random_logits(seed + 1, scale=scale)
    ids, logprobs = top_k(teacher, k)
    found = DIVERGENCES[name](*bucket(ids, logprobs, student), beta)
    full = DIVERGENCES[name](*dense(teacher, student), beta)
    assert (found >= -1e-12).all()
    # The teacher's tail is 1 - sum, so its logarithm is known to about eps / tail: that much of the student's tail.
    tail = torch.softmax(teacher, -1).scatter(-1, ids, 0).sum(-1)
    rounding = (16 * torch.finfo(torch.float64).eps / tail).clamp_max(1) if k < 12 else 0
    slack = torch.softmax(student, -1).scatter(-1, ids, 0).sum(-1) * rounding
    assert (found <= full + slack + 1e-12 * (1 + full)).all()
    at_equality = DIVERGENCES[name](*bucket(ids, logprobs, teacher), beta)
    torch.testing.assert_close(at_equality, torch.zeros_like(at_equality), atol=1e-9, rtol=0)


@every_divergence
def test_bucket_with_the_whole_vocabulary_is_exact_and_the_order_of_ids_does_not_matter(name):
    teacher, student = random_logits(0), random_logits(1)
    ids, logprobs = top_k(teacher, 12)
    torch.testing.assert_close(
        DIVERGENCES[name](*bucket(ids, logprobs, student)), DIVERGENCES[name](*dense(teacher, student))
    )
    ids, logprobs = top_k(teacher, 5)
    turned = DIVERGENCES[name](*bucket(ids.flip(-1), logprobs.flip(-1), student))
    torch.testing.assert_close(turned, DIVERGENCES[name](*bucket(ids, logprobs, student)))


@every_divergence
def test_bucket_passes_gradcheck(name):
    ids, logprobs = top_k(random_logits(0, n=2, v=7), 3)
    student = random_logits(1, n=2, v=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: DIVERGENCES[name](*bucket(ids, logprobs, s), 0.3), student)


def test_values_that_were_rounded_to_half_precision_and_sum_above_one_still_give_a_divergence():
    logprobs = torch.tensor([[math.log(0.5), math.log(0.5)]]).half() + 0.001
    assert logprobs.float().exp().sum() > 1
    teacher, _ = bucket(torch.tensor([[0, 1]]), logprobs, torch.zeros(1, 9))
    assert teacher.dtype == torch.float32
    torch.testing.assert_close(teacher.exp().sum(-1), torch.ones(1))
    assert teacher.isfinite().all()


def test_the_students_tail_is_exact_where_one_minus_p_is_not():
    logits = torch.tensor([[20.0, 10.0, 0.0, 0.0]])
    _, student = bucket(torch.tensor([[0, 1]]), torch.tensor([[-0.1, -3.0]]), logits)
    exact = torch.log_softmax(logits.double(), -1)[0, 2:].logsumexp(-1)
    torch.testing.assert_close(student[0, -1].double(), exact, atol=1e-5, rtol=0)


def test_ids_beyond_the_students_vocabulary_belong_to_the_tail():
    """A teacher with a padded embedding: its padding has no counterpart in the student."""
    teacher = torch.cat([random_logits(0, v=8), torch.full((4, 2), 1.0, dtype=torch.float64)], -1)
    student = random_logits(1, v=8).requires_grad_()
    ids, logprobs = top_k(teacher, 6)
    assert (ids >= 8).any()
    t, s = torch.log_softmax(teacher, -1).exp(), torch.softmax(student, -1)
    for row, name in [(row, name) for row in range(4) for name in DIVERGENCES]:
        known = ids[row][ids[row] < 8]
        grouped = [torch.cat([p[row][known], 1 - p[row][known].sum(0, keepdim=True)]).log() for p in (t, s)]
        found = DIVERGENCES[name](*bucket(ids, logprobs, student))[row]
        torch.testing.assert_close(found, DIVERGENCES[name](*grouped))
        assert torch.autograd.grad(found, student)[0].isfinite().all()


@every_divergence
def test_chunks_do_not_change_values_or_gradients(name):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 12, bias=False)
    hidden, labels = torch.randn(10, 6), torch.randint(12, (10,))
    teacher = TopK(*top_k(random_logits(3, n=10).float(), 4))
    results = []
    for chunk in (3, 10):
        h = hidden.clone().requires_grad_()
        head.zero_grad()
        scores = chunked_token_scores(head, h, labels, teacher, sparse_divergence(name), chunk)
        (scores.divergence.sum() - 0.1 * scores.logprob.sum() + 0.01 * scores.lse.sum()).backward()
        results.append((*scores, h.grad, head.weight.grad.clone()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_logits_are_promoted():
    scores = token_scores(torch.randn(3, 9).bfloat16(), torch.tensor([0, 1, 2]), None, None)
    assert scores.logprob.dtype == scores.lse.dtype == torch.float32


# Residuals. Two responses: three tokens that end with EOS, two that were cut off.
MASK = torch.tensor([[True, True, True], [True, True, False]])
STOP = torch.tensor([True, False])
Q = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 99.0]], dtype=torch.float64)
V = torch.tensor([[1.5, 2.5, 4.5], [8.5, 16.5, 99.0]], dtype=torch.float64)


def test_the_last_step_is_dropped_or_kept_only_where_the_response_ended_by_itself():
    assert kept_steps(MASK, STOP, "drop").tolist() == [[True, True, False], [True, False, False]]
    assert kept_steps(MASK, STOP, "zero").tolist() == [[True, True, True], [True, False, False]]


def test_residuals_by_hand():
    delta, kept = td_residual(Q, V, MASK, STOP, 0.5, "sarsa", "zero")
    assert delta[kept].tolist() == [0.0, 0.0, 4.0, 0.0]
    delta, kept = td_residual(Q, V, MASK, STOP, 1.0, "soft", "drop")
    assert delta[kept].tolist() == [-1.5, -2.5, -8.5]
    assert (delta[~kept] == 0).all()


def test_sarsa_telescopes_and_soft_sums_to_the_log_probability():
    """With gamma = 1: sarsa says nothing about the sequence, soft is log pi(y|x) + lse_1 (design, section 1)."""
    torch.manual_seed(0)
    logprob, lse = -torch.rand(1, 5), torch.randn(1, 5)
    mask, stop = torch.ones(1, 5, dtype=torch.bool), torch.tensor([True])
    q = logprob + lse
    sarsa, _ = td_residual(q, lse, mask, stop, 1.0, "sarsa", "zero")
    torch.testing.assert_close(sarsa.sum(), q[0, 0])
    soft, _ = td_residual(q, lse, mask, stop, 1.0, "soft", "zero")
    torch.testing.assert_close(soft.sum(), logprob.sum() + lse[0, 0])


def test_gaussian_terms_are_those_of_torch():
    delta, mu, log_sigma = torch.randn(3, 7, dtype=torch.float64)
    q = torch.distributions.Normal(mu, log_sigma.exp())
    torch.testing.assert_close(gaussian_nll(delta, mu, log_sigma), -q.log_prob(delta))
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(kl_to_prior(mu, log_sigma), torch.distributions.kl_divergence(q, prior))

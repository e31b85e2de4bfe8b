"""What holds for the policy gradient: hand-computed numbers, finite whatever comes, and the gradient of reverse KL."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.objectives.policy_gradient import (
    clipped_surrogate,
    mixture_weight,
    probability_ratio,
    returns,
    reward,
    whitened,
)
from tests import golden
from tests.objectives.test_objectives import SHARED_GOLDEN
from tests.references import kl, random_logits


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), of, retain_graph=True)[0]


# Rewards and returns


def test_a_reward_is_the_scaled_log_ratio_between_its_bounds():
    teacher, old = doubles(-1.0, -300.0, -0.5, -2.0), doubles(-2.0, -1.0, -90.0, -2.0)
    assert reward(teacher, old).tolist() == [1.0, -299.0, 89.5, 0.0]
    assert reward(teacher, old, scale=0.5, clip=100).tolist() == [2.0, -100.0, 100.0, 0.0]
    assert reward(teacher.bfloat16(), old.bfloat16()).dtype == torch.float32
    excluded = reward(doubles(-math.inf), doubles(-1.0), scale=0.5, clip=100)  # by the teacher
    assert excluded.tolist() == [-100.0]


@pytest.mark.parametrize(
    ("gamma", "length", "expected"),
    [
        (1.0, "none", [7.0, 6.0, 4.0]),
        (1.0, "plain", [7 / 3, 3.0, 4.0]),
        (1.0, "discounted", [7 / 3, 3.0, 4.0]),
        (0.5, "none", [3.0, 4.0, 4.0]),
        (0.5, "plain", [1.0, 2.0, 4.0]),
        (0.5, "discounted", [3.0 / 1.75, 4.0 / 1.5, 4.0]),
        (0.0, "none", [1.0, 2.0, 4.0]),
        (0.0, "discounted", [1.0, 2.0, 4.0]),
        (0.0, "plain", [1 / 3, 1.0, 4.0]),
    ],
)
def test_a_return_is_the_discounted_sum_of_the_rewards_that_follow(gamma, length, expected):
    torch.testing.assert_close(returns(doubles(1.0, 2.0, 4.0), gamma, length), doubles(*expected), rtol=1e-15, atol=0)


def test_returns_of_nothing_are_nothing_and_an_unknown_length_is_an_error():
    assert returns(torch.zeros(0), 0.9).shape == (0,)
    with pytest.raises(ValueError, match="none, plain, discounted"):
        returns(torch.zeros(2), 0.9, "mean")


def test_without_a_discount_an_infinite_reward_stays_with_its_token():
    assert returns(doubles(1.0, -math.inf, 2.0), 0.0).tolist() == [1.0, -math.inf, 2.0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95, 1.0])
def test_returns_of_long_responses_are_exact(gamma):
    """20,000 tokens in float32 against sums of a float64 window; where gamma is 1, of everything."""
    rewards = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = returns(rewards, gamma)
    assert found.dtype == torch.float32
    for t in (0, 1, 7_777, 19_990, 19_999):
        weights = gamma ** torch.arange(len(rewards) - t, dtype=torch.float64)
        assert found[t].item() == pytest.approx((weights * rewards[t:].double()).sum().item(), rel=1e-6)
    constant = returns(torch.full((20_000,), 3.0), gamma, "discounted")
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0))  # a mean of equal rewards


def test_the_golden_advantages_of_minillm_are_matched():
    path = SHARED_GOLDEN / "objectives.json"
    if not path.exists():
        pytest.skip("the golden files lie beside the project, not in it")
    errors, problems = golden.check(json.loads(path.read_text()))
    assert errors["minillm_advantages"] < 1e-12 and not problems


# Whitening


def test_whitened_values_are_hand_computed_ones():
    torch.testing.assert_close(whitened(doubles(1.0, 3.0, 5.0)), doubles(-1.0, 0.0, 1.0) * math.sqrt(1.5))


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=50).filter(lambda xs: max(xs) - min(xs) > 1e-3),
)
@settings(max_examples=100, deadline=None)
def test_whitened_values_have_mean_0_and_deviation_1(values):
    found = whitened(torch.tensor(values))
    assert found.dtype == torch.float32
    assert found.double().mean().item() == pytest.approx(0, abs=1e-5)
    assert found.double().std(correction=0).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("values", [[], [3.7], [0.1] * 7])
def test_what_does_not_vary_is_whitened_to_zeros(values):
    assert whitened(torch.tensor(values)).tolist() == [0.0] * len(values)


# The weight of the mixture


def test_the_weight_is_that_of_the_mixture_that_was_drawn_from():
    teacher, old = doubles(0.5, 0.1, 0.25), doubles(0.25, 0.4, 0.25)
    found = mixture_weight(teacher.log(), old.log(), 0.2)
    torch.testing.assert_close(found, old / (0.8 * old + 0.2 * teacher))
    torch.testing.assert_close(mixture_weight(teacher.log(), old.log(), 1.0), old / teacher)
    assert mixture_weight(teacher.log(), old.log(), 0.0).tolist() == [1.0] * 3


def test_weights_of_very_unlikely_tokens_are_finite():
    teacher, old = torch.tensor([-300.0, -0.1, -math.inf, -200.0]), torch.tensor([-0.1, -300.0, -1.0, -200.0])
    torch.testing.assert_close(mixture_weight(teacher, old, 0.2), torch.tensor([1.25, 0.0, 1.25, 1.0]))
    assert mixture_weight(teacher, old, 0.0).tolist() == [1.0] * 4


# The clipped surrogate


def test_the_surrogate_is_hand_computed():
    """rho w of 1.1, 1.5, .5 for both signs of A, eps .2."""
    ratio, old = doubles(1.1, 1.5, 0.5).repeat(2), doubles(-1.0).expand(6)
    advantage = doubles(2.0, 2.0, 2.0, -2.0, -2.0, -2.0)
    expected = doubles(-2.2, -2.4, -1.0, 2.2, 3.0, 1.6)
    torch.testing.assert_close(clipped_surrogate(old + ratio.log(), old, advantage), expected)
    halved = clipped_surrogate(old + (2 * ratio).log(), old, advantage, weight=doubles(0.5).expand(6))
    torch.testing.assert_close(halved, expected)
    wide = clipped_surrogate(old + ratio.log(), old, advantage, eps=0.5)
    torch.testing.assert_close(wide, -ratio * advantage)


def test_the_gradient_is_that_of_the_ratio_and_zero_exactly_where_ppo_clips():
    ratio, old = doubles(0.5, 0.9, 1.1, 1.5).repeat(2), torch.zeros(8, dtype=torch.float64)
    advantage = doubles(3.0, 3.0, 3.0, 3.0, -3.0, -3.0, -3.0, -3.0)
    logprob = ratio.log().requires_grad_()
    found = gradient(clipped_surrogate(logprob, old, advantage), logprob)
    clipped = torch.tensor([False, False, False, True, True, False, False, False])
    torch.testing.assert_close(found, torch.where(clipped, 0, -ratio * advantage))


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1.2)), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_at_equality_the_gradient_is_minus_advantage_times_weight(pairs):
    """Where w itself is inside the range, or the advantage draws it there."""
    advantage, weight = doubles(*(a for a, _ in pairs)), doubles(*(w for _, w in pairs))
    logprob = torch.full_like(advantage, -1.5).requires_grad_()
    found = gradient(clipped_surrogate(logprob, logprob.detach(), advantage, weight), logprob)
    torch.testing.assert_close(found, torch.where((weight < 0.8) & (advantage < 0), 0, -advantage * weight))


def test_nothing_but_the_students_own_log_probability_is_differentiated():
    logprob, old, advantage, weight = (torch.randn(4, dtype=torch.float64).requires_grad_() for _ in range(4))
    clipped_surrogate(logprob, old, advantage, weight).sum().backward()
    assert logprob.grad is not None and old.grad is advantage.grad is weight.grad is None


@pytest.mark.parametrize("advantage", [-100.0, -1.0, 0.0, 1.0, 100.0])
@pytest.mark.parametrize("difference", [-1e4, -100.0, 0.0, 50.0, 1e4, math.inf])
def test_the_surrogate_and_its_gradient_are_finite_whatever_the_difference(advantage, difference):
    for weight in (0.0, 1.0, 1.25):
        logprob = torch.tensor([-0.5], requires_grad=True)
        old = torch.tensor([-0.5 - difference])
        loss = clipped_surrogate(logprob, old, torch.tensor([advantage]), torch.tensor([weight]))
        found = gradient(loss, logprob)
        assert loss.isfinite().all() and found.isfinite().all()
        if difference > 1 and advantage < 0 and weight:  # such a token is still made less likely
            assert found.item() > 1e8


def test_the_ratio_is_that_of_probabilities_in_float32_or_better():
    logprob, old = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])
    torch.testing.assert_close(probability_ratio(logprob, old, 0.5), torch.tensor([math.e, 1 / math.e]) / 2)
    assert clipped_surrogate(logprob.bfloat16(), old.bfloat16(), old.bfloat16()).dtype == torch.float32
    assert clipped_surrogate(logprob.double(), old, old).dtype == torch.float64


# What it is for


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_the_expected_gradient_without_a_discount_is_that_of_reverse_kl(alpha):
    """Every token of a vocabulary, by its probability of being drawn, at S = S_old; nothing is clipped (eps 10)."""
    logits, teacher = random_logits(0, v=6)[0], random_logits(1, v=6)[0].log_softmax(-1)
    logits.requires_grad_()
    student = logits.log_softmax(-1)
    old = student.detach()
    drawn = (1 - alpha) * old.exp() + alpha * teacher.exp()
    advantage, weight = returns_of_one_token(reward(teacher, old)), mixture_weight(teacher, old, alpha)
    expected = (drawn * clipped_surrogate(student, old, advantage, weight, eps=10.0)).sum()
    found = gradient(expected, logits)
    torch.testing.assert_close(found, gradient(kl(student.exp(), teacher.exp()), logits))


def returns_of_one_token(rewards: torch.Tensor) -> torch.Tensor:
    return torch.cat([returns(value[None], 0.0) for value in rewards])


def test_the_expected_gradient_with_whole_returns_is_that_of_reverse_kl_between_responses():
    """Both tokens of all responses of two, gamma 1: KL between distributions over whole responses."""
    first, second = random_logits(0, 1, 4)[0].requires_grad_(), random_logits(1, 4, 4).requires_grad_()
    teacher = random_logits(2, 1, 4)[0].log_softmax(-1), random_logits(3, 4, 4).log_softmax(-1)
    student = first.log_softmax(-1), second.log_softmax(-1)
    loss = 0
    for a in range(4):
        for b in range(4):
            logprob, of_teacher = (torch.stack([model[0][a], model[1][a, b]]) for model in (student, teacher))
            old = logprob.detach()
            advantage = returns(reward(of_teacher, old), 1.0)
            loss = loss + old.sum().exp() * clipped_surrogate(logprob, old, advantage).sum()
    responses = [(model[0][:, None] + model[1]).flatten().exp() for model in (student, teacher)]
    expected = torch.autograd.grad(kl(*responses), (first, second), retain_graph=True)
    for found, exact in zip(torch.autograd.grad(loss, (first, second)), expected, strict=True):
        torch.testing.assert_close(found, exact)

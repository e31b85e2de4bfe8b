"""Policy gradient on sampled tokens, for the on-policy objectives `opd` and `minillm` (MiniLLM, arXiv 2306.08543).

A student S_old sampled a response of T tokens a_t at states s_t (the prompt and the tokens before), the teacher has
scored it, and the student S that is trained is drawn to tokens that the teacher finds likelier than S_old did. Only the
surrogate is differentiated, for log S; everything else is a number of the sample. All are computed in at least float32.
"""

import math

import torch
from torch import Tensor

from pipeline.objectives.logprobs import at_least_float32

LENGTHS = ("none", "plain", "discounted")  # what a return is divided by
_MOST = 20.0  # log of the largest S / S_old: in float32 the next factors cannot make it infinite


def reward(teacher: Tensor, old: Tensor, scale: float = 1.0, clip: float = math.inf) -> Tensor:
    """r_t = (log T(a_t) - log S_old(a_t)) / scale, between -clip and clip, [T]; MiniLLM: scale .5, clip 100.

    teacher, old [T]: log-probabilities of the sampled tokens. With scale 1 and no clip, the mean over samples of
    sum_t r_t estimates -KL(S_old || T) without bias.
    """
    return ((at_least_float32(teacher) - at_least_float32(old)) / scale).clamp(-clip, clip)


def returns(rewards: Tensor, gamma: float, length: str = "none") -> Tensor:
    """R_t = sum_{k >= t} gamma^(k-t) r_k of one response, rewards [T] to [T], without a gradient.

    length: `plain` divides by the T - t tokens that remain (MiniLLM's published code), `discounted` by
    sum_{k >= t} gamma^(k-t), which makes R_t a weighted mean of rewards; `none` (opd) does not divide. With gamma 0,
    R_t is r_t, except that `plain` divides it.
    """
    if length not in LENGTHS:
        raise ValueError(f"length is {length!r}, expected one of {', '.join(LENGTHS)}")
    total, divisor, following = 0.0, 0.0, []
    for value in reversed(rewards.tolist()):  # in float64
        total = value + gamma * total if gamma else value  # 0 times an infinite return is no number
        divisor = 1.0 + (1.0 if length == "plain" else gamma) * divisor
        following.append(total if length == "none" else total / divisor)
    return at_least_float32(rewards).new_tensor(following[::-1])


def whitened(values: Tensor) -> Tensor:
    """(x - mean) / standard deviation over values [N] of all response tokens of a batch, [N].

    The deviation is the root of the mean square. Zeros where there is one token, or all are equal. MiniLLM's published
    code takes the mean and the deviation over a padded batch, so that padding counts as values of 0; here only
    response tokens do.
    """
    values = at_least_float32(values)
    if not len(values) or values.min() == values.max():
        return torch.zeros_like(values)
    centred = values.double() - values.double().mean()
    return (centred / centred.square().mean().sqrt()).to(values.dtype)


def log_mixture(teacher: Tensor, student: Tensor, alpha: float) -> Tensor:
    """log p~ = log((1 - alpha) S + alpha T) of log-probabilities of any one shape; exact where alpha is 0 or 1."""
    teacher, student = at_least_float32(teacher), at_least_float32(student)
    if alpha in (0, 1):
        return teacher if alpha else student
    return torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))


def mixture_weight(teacher: Tensor, old: Tensor, alpha: float) -> Tensor:
    """w_t = S_old / p~, with p~ = (1 - alpha) S_old + alpha T that a_t was drawn from (MiniLLM, section 2.2), [T].

    teacher, old [T]: log-probabilities of the sampled tokens. Per token: MiniLLM takes no product over tokens. At most
    1 / (1 - alpha); 1 where alpha is 0.
    """
    return (at_least_float32(old) - log_mixture(teacher, old, alpha)).exp()


def probability_ratio(logprob: Tensor, old: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """rho_t w_t = S(a_t) / S_old(a_t) w_t, [N], differentiable for log S(a_t) alone.

    Its value ends at S / S_old = e^20, and its derivative is its value: beyond, both stay finite and the derivative
    keeps its sign.
    """
    logprob, old = at_least_float32(logprob), at_least_float32(old).detach()
    log_ratio = logprob - old
    log_ratio = torch.where(log_ratio > _MOST, logprob - logprob.detach() + _MOST, log_ratio)
    return log_ratio.exp() * (weight.detach() if isinstance(weight, Tensor) else weight)


def clipped_surrogate(
    logprob: Tensor, old: Tensor, advantage: Tensor, weight: Tensor | float = 1.0, eps: float = 0.2
) -> Tensor:
    """-min(rho w A, clip(rho w, 1 - eps, 1 + eps) A), [N] (PPO, arXiv 1707.06347, eq. 7; MiniLLM puts w beside rho).

    logprob [N]: log S(a_t) of the student that is trained; old [N]: log S_old(a_t); advantage A [N]; weight w [N], 1
    for opd. Differentiable for logprob alone: the gradient is -rho w A, and 0 where rho w is above 1 + eps with A > 0,
    or below 1 - eps with A < 0.
    """
    ratio, advantage = probability_ratio(logprob, old, weight), at_least_float32(advantage).detach()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)

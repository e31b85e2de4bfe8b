"""AVRIL's terms on sequences of tokens (Chan & van der Schaar, ICLR 2021, arXiv 2102.06483).

The state s_t is the prompt and the first t tokens, the action a_t the next token. Steps are flat, [N]: response after
response; `followed` says where the next step belongs to the same response. A mean is a sum over what is kept divided
by its count; these functions return the summands, so that counts can be taken over several micro-batches.
"""

import math

import torch
from torch import Tensor

CLIP = 5.0  # of delta / c where a posterior is fitted to it: residuals have heavy tails


def action_values(logprob: Tensor, lse: Tensor, q_source: str) -> Tensor:
    """Q(s_t, a_t) from log pi(a_t | s_t) and the lse of the raw logits: `logits` log pi + lse, `logprobs` log pi."""
    return logprob + lse if q_source == "logits" else logprob


def soft_state_values(lse: Tensor, q_source: str) -> Tensor:
    """logsumexp_a Q(s_t, a): the lse itself for `logits`, zero for `logprobs`."""
    return lse if q_source == "logits" else torch.zeros_like(lse)


def followed_steps(mask: Tensor) -> Tensor:
    """Steps after which the response goes on, [B, R] bool, of mask [B, R] (a prefix of each row)."""
    return mask & torch.nn.functional.pad(mask[:, 1:], (0, 1), value=False)


def kept_steps(mask: Tensor, stop: Tensor, terminal: str) -> Tensor:
    """Steps that have a residual, [B, R] bool.

    mask [B, R] (a prefix of each row), stop [B]: the response ended with EOS. The last step is kept with terminal
    `zero` where the response ended by itself; a response cut by the length limit has no terminal step.
    """
    followed = followed_steps(mask)
    return followed | (mask & stop[:, None]) if terminal == "zero" else followed


def td_residual(q: Tensor, v: Tensor, followed: Tensor, kept: Tensor, gamma: float, td: str) -> Tensor:
    """delta [N], zero where not kept.

    `sarsa`: delta_t = Q(s_t, a_t) - gamma Q(s_{t+1}, a_{t+1}); `soft`: the second Q is v(s_{t+1}) =
    logsumexp_a Q(s_{t+1}, a). The value after the last step is 0.
    """
    following = torch.nn.functional.pad((q if td == "sarsa" else v)[1:], (0, 1))
    return torch.where(kept, q - gamma * torch.where(followed, following, 0), 0)


def gaussian_nll(delta: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """-log N(delta; mu, sigma^2), elementwise."""
    return 0.5 * math.log(2 * math.pi) + log_sigma + 0.5 * ((delta - mu) * torch.exp(-log_sigma)) ** 2


def kl_to_prior(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)), elementwise."""
    return 0.5 * (torch.exp(2 * log_sigma) + mu**2 - 1) - log_sigma

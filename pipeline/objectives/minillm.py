"""MiniLLM's advantages (Gu et al. 2023, arXiv 2306.08543): reverse KL as a reward, discounted and length-normalised."""

import torch
from torch import Tensor


def advantages(student: Tensor, teacher: Tensor, gamma: float, length_normalization: bool) -> Tensor:
    """Reward-to-go of r_t = log T(a_t) - log S(a_t) for one response, [R] -> [R].

    A_t = sum_{j >= t} gamma^(j-t) r_j, divided by the discounted remaining length sum_{j >= t} gamma^(j-t) where
    `length_normalization` is set.
    """
    reward = teacher - student
    togo, length = torch.zeros_like(reward), torch.zeros_like(reward)
    total = count = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        total, count = reward[t] + gamma * total, 1 + gamma * count
        togo[t], length[t] = total, count
    return togo / length if length_normalization else togo

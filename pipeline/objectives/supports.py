"""Which tokens of the teacher a row keeps: all above a threshold tau, and of the others one for every tau of mass.

A support of k tokens that is drawn so is an unbiased picture of the whole distribution: with the weights
w_i = max(p_i, tau) it sums to 1, and its mean over the offsets of the grid is p. Systematic sampling with inclusion
probabilities min(1, p_i / tau) (Madow 1949; Horvitz and Thompson 1952), one uniform number per position.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 256  # ids whose mass is summed before any of them is looked at
_SEED, _STEP, _FIRST, _SECOND = 0x1E3779B97F4A7C15, 0x1E3779B97F4A7C15, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


class Support(NamedTuple):
    """Places [N, k] (distinct, the likeliest first) and thresholds tau [N] of the tokens that were kept."""

    places: Tensor
    tau: Tensor


def offsets(k: int, tokens: Tensor, top: Tensor, values: Tensor) -> Tensor:
    """One uniform number per position, float64 [N] in [0, 1), from the position's own values: same bits, same number.

    k: tokens per position. tokens [N]: of the response. top [N]: likeliest id. values [N]: log-sum-exp of the raw
    logits, or the likeliest id's log-probability where that is not known; read as float32.

    A chain of splitmix64's finalizer (Steele, Lea, Flood 2014) over the four.
    """
    bits = values.float().view(torch.int32).long() & 0xFFFFFFFF
    state = torch.full_like(bits, _SEED)
    for field in (torch.full_like(bits, k), tokens.long(), top.long(), bits):
        state = _mixed((state ^ field) + _STEP)
    return _shifted(state, 32).double() / 2.0**32


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by of int64 taken as unsigned."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def top_place(top: Tensor, places: Tensor) -> Tensor:
    """Of the likeliest masses [N, k], in order, and their places: the first place that has the largest mass, [N]."""
    return places.masked_fill(top < top[:, :1], torch.iinfo(places.dtype).max).amin(-1)


def systematic(mass: Tensor, k: int, offset: Tensor, top: tuple[Tensor, Tensor] | None = None) -> Support:
    """k of V places by their mass [N, V], which is overwritten; offset [N] of the grid, in [0, 1).

    tau is in the unit of the mass: a probability where a row sums to 1.

    top: `mass.topk(k)`, where it is known. Where fewer than k places have any mass, tau is 0 and the places left over
    have none. A place is drawn where the mass cumulated over the places that are not certain, in their order and from
    offset * tau on, reaches a multiple of tau.
    """
    size = mass.shape[-1]
    if k >= size:
        ordered = mass.sort(dim=-1, descending=True, stable=True)
        return Support(ordered.indices, mass.new_zeros(len(mass)))
    masses, places = mass.topk(k, -1) if top is None else top
    mass.scatter_(-1, places, 0)
    blocks = _block_sums(mass)
    # The mass of all but the j likeliest is their own sum: 1 - mass would cancel on peaked positions.
    others = blocks.sum(-1, keepdim=True) + masses.double().flip(-1).cumsum(-1).flip(-1)  # [N, k]
    slots = torch.arange(k, 0, -1, device=mass.device)  # k - j
    certain = (masses > others / slots).long().cumprod(-1).bool()  # the first place at most tau ends them
    drawn = masses.masked_fill(certain, 0)
    mass.scatter_(-1, places, drawn)
    blocks.scatter_add_(-1, places // _BLOCK, drawn.double())
    total, left = blocks.sum(-1), k - certain.sum(-1)  # at least one slot is left
    step = total / left
    points = (torch.arange(1, k + 1, device=mass.device) - offset[:, None]) * step[:, None]
    hit = _locate(mass, blocks, points.minimum(total[:, None]))
    valid = (torch.arange(k, device=mass.device) < left[:, None]) & (total > 0)[:, None]
    valid[:, 1:] &= hit[:, 1:] != hit[:, :-1]  # rounding may put two points on a place of just tau
    again = ((places[:, :, None] == hit[:, None]) & valid[:, None]).any(-1)
    # First the certain ones, then the drawn; slots left over go to the likeliest of the others.
    rank = torch.cat([torch.where(certain, 0, torch.where(again, 3, 2)), torch.where(valid, 1, 3)], -1)
    chosen = rank.sort(dim=-1, stable=True).indices[:, :k]
    kept = torch.cat([places, hit], -1).gather(-1, chosen)
    kept_mass = torch.cat([masses, mass.gather(-1, hit)], -1).gather(-1, chosen)
    kept, order = kept.sort(-1)
    order = kept_mass.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    return Support(kept.gather(-1, order), step.to(mass.dtype))


def _block_sums(mass: Tensor) -> Tensor:
    """Mass of every block of places, float64 [N, blocks]."""
    full = mass.shape[-1] // _BLOCK * _BLOCK
    sums = mass[:, :full].unflatten(-1, (-1, _BLOCK)).sum(-1) if full else mass[:, :0]
    return torch.cat([sums, mass[:, full:].sum(-1, keepdim=True)], -1).double()


def _locate(mass: Tensor, blocks: Tensor, points: Tensor) -> Tensor:
    """The first place where the cumulated mass reaches each of the points, [N, k], which are above 0."""
    ends = blocks.cumsum(-1)
    block = torch.searchsorted(ends, points).clamp_max(blocks.shape[-1] - 1)
    within = points - (ends - blocks).gather(-1, block)
    size = min(_BLOCK, mass.shape[-1])
    places = block[..., None] * _BLOCK + torch.arange(size, device=mass.device)  # [N, k, size]
    inside = places < mass.shape[-1]
    here = mass.gather(-1, places.clamp_max(mass.shape[-1] - 1).flatten(1)).view(places.shape)
    ends = here.double().masked_fill_(~inside, 0).cumsum(-1)
    place = (ends < within[..., None].minimum(ends[..., -1:])).sum(-1)
    return (block * _BLOCK + place).clamp_max(mass.shape[-1] - 1)


def weighted(logprobs: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """log p and the weights w = max(p, tau) of a row's kept tokens, [N, k] each; at least float32.

    logprobs [N, k] as they are stored; tau [N]. Rounding to float16 keeps a row from summing to 1: the certain tokens
    (p > tau) are rescaled to what the others leave of it. A token of probability 0 has weight 0; where a row has
    some (ids that the reader does not have), the rest is rescaled to sum to 1.
    """
    logprobs = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    p, tau = logprobs.exp(), tau.to(logprobs.dtype)[:, None]
    possible = ~torch.isneginf(logprobs)
    certain = (p > tau) & possible
    drawn = possible & ~certain & (tau > 0)
    rest = tau * drawn.sum(-1, keepdim=True)
    mass = (p * certain).sum(-1, keepdim=True)
    whole = possible.all(-1, keepdim=True) | (tau == 0)
    goal = torch.where(whole, 1 - rest, mass)
    scale = torch.where(certain & (mass > 0) & (goal > 0), goal / mass, 1)
    logprobs = logprobs + scale.log()
    w = torch.where(certain, p * scale, torch.where(drawn, tau, p))
    return logprobs, w / w.sum(-1, keepdim=True).where(~whole, 1).clamp_min(torch.finfo(w.dtype).tiny)


def tail_mass(logprobs: Tensor, tau: Tensor) -> Tensor:
    """Mass of all tokens that a sampled row does not keep, [N]: (k - j) tau less the p of the kept that are drawn."""
    logprobs = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    return (tau.to(logprobs.dtype)[:, None] - logprobs.exp()).clamp_min(0).sum(-1)


def narrowed(ids: Tensor, logprobs: Tensor, tau: Tensor, k: int, tokens: Tensor, lse: Tensor | None) -> Support:
    """k of a row's kept tokens by the same rule on its weights, with the offset of k: unbiased as well.

    ids, logprobs [N, K]; tau [N]; tokens [N] of the response; lse [N], or None where it is not known. The places are
    those in the row; w = max(p, tau) still sums to 1.
    """
    _, w = weighted(logprobs, tau)
    values = logprobs[:, 0] if lse is None else lse
    order = ids.argsort(-1)
    drawn = systematic(w.gather(-1, order), k, offsets(k, tokens, ids[:, 0], values))
    places = order.gather(-1, drawn.places).sort(-1).values  # rank order
    return Support(places, torch.maximum(tau.to(w.dtype), drawn.tau))

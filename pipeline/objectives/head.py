"""From hidden states to a loss: the language-model head in chunks of positions, its gradient made along the way.

[N, V] logits are never kept. Each chunk's logits are reduced to `SparseLogprobs`, the loss is differentiated with
respect to those few numbers, and the gradient of states and weights follows at once while the chunk is still there,
so that the head is multiplied three times and not four, as it would be if the backward pass made the logits again.
A divergence over the whole vocabulary is reduced to its value and its derivative for the chunk's logits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.objectives.logprobs import SparseLogprobs, TopK, at_least_float32
from pipeline.objectives.supports import tail_mass

_CHUNK_BYTES = 64 * 2**20  # of logits
_CHUNK_ROWS = 64, 320  # fewer do not use the processor, more only take memory
_NO_TEACHER = (None,) * len(TopK._fields)


class Head(NamedTuple):
    """A linear language-model head: logits = states @ weight.T + bias."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]


class Scores(NamedTuple):
    """What a loss may depend on at n consecutive positions."""

    logprob: Tensor  # [n] log pi(a_t | s_t)
    lse: Tensor  # [n] log-sum-exp of the raw logits
    divergence: Tensor | None  # [n] between teacher and student


# (sparse teacher, student) -> [N]. The head sets the teacher to -inf at ids that the student does not have, and its
# `own` where the response's token is among the ids.
Divergence = Callable[[TopK, SparseLogprobs], Tensor]
# (student's logits [n, V] at n consecutive positions, where they are among the N) -> [n], differentiable
Dense = Callable[[Tensor, slice], Tensor]
# (scores of n consecutive positions, where they are among the N, further inputs there) -> {term: [n]}
Terms = Callable[..., Mapping[str, Tensor]]


def chunk_rows(vocabulary: int) -> int:
    """Positions per chunk: as many as make 64 MiB of float32 logits, at least 64, at most 320."""
    fewest, most = _CHUNK_ROWS
    return min(max(_CHUNK_BYTES // (4 * vocabulary), fewest), most)


def chunked_loss(
    head: Head,
    states: Tensor,
    labels: Tensor,
    terms: Terms,
    weights: Mapping[str, float | Tensor],
    teacher: TopK | None = None,
    divergence: Divergence | None = None,
    inputs: Sequence[Tensor] = (),
    chunk: int = 0,
    neighbours: bool = False,
    dense: Dense | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_i weights_i sum_n terms_i[n] over N positions, differentiable once, and the sums of all terms, detached.

    states [N, H], labels [N]; terms(scores, rows, *inputs) -> {name: [n]} at positions `rows` (a slice), which may
    depend on the next position where `neighbours` is set; a term without a weight is only summed. inputs: further
    tensors [N], sliced alike, which may require gradients. chunk: positions at once, 0: `chunk_rows`. dense: in place
    of a sparse teacher and `divergence`.
    """
    call = _Call(terms, dict(weights), divergence, dense, chunk or chunk_rows(len(head.weight)), neighbours)
    known = _NO_TEACHER if teacher is None or divergence is None or dense is not None else teacher
    loss, *sums = _ChunkedLoss.apply(call, head.weight, head.bias, states, labels, *known, *inputs)
    return loss, dict(zip(call.names, sums, strict=True))


@torch.no_grad()
def token_scores(
    head: Head,
    states: Tensor,
    labels: Tensor,
    teacher: TopK | None = None,
    divergence: Divergence | None = None,
    chunk: int = 0,
) -> Scores:
    """Scores of all N positions, without gradients."""
    parts = []

    def keep(scores: Scores, rows: slice) -> dict[str, Tensor]:
        parts.append(scores)
        return {}

    chunked_loss(head, states, labels, keep, {}, teacher, divergence, chunk=chunk)
    logprob, lse, divergences = zip(*parts, strict=True)
    return Scores(torch.cat(logprob), torch.cat(lse), None if divergences[0] is None else torch.cat(divergences))


@dataclass
class _Call:
    """The arguments of `chunked_loss` that are not tensors; the terms' `names` are filled in on the way."""

    terms: Terms
    weights: dict
    divergence: Divergence | None
    dense: Dense | None
    chunk: int
    neighbours: bool
    learning: bool = field(default_factory=torch.is_grad_enabled)
    names: list[str] = field(default_factory=list)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *tensors):
        needed = [call.learning and need for need in ctx.needs_input_grad[1:]]
        sums, ctx.gradients = _run(call, needed, *tensors)
        ctx.call, ctx.needed = call, needed
        ctx.save_for_backward(*tensors)
        call.names = list(sums)
        ctx.mark_non_differentiable(*sums.values())
        states = tensors[2]
        nothing = torch.zeros((), dtype=at_least_float32(states[:0]).dtype, device=states.device)
        return sum((call.weights[name] * sums[name] for name in call.weights), nothing), *sums.values()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        tensors, gradients, ctx.gradients = ctx.saved_tensors, ctx.gradients, None
        if gradients is None:  # they were handed out, and the graph is used a second time
            _, gradients = _run(ctx.call, ctx.needed, *tensors)
        pairs = zip(gradients, tensors, strict=True)
        return None, *(None if grad is None else grad.mul_(d_loss).to(x.dtype) for grad, x in pairs)


def _run(call: _Call, needed: Sequence[bool], *tensors: Tensor | None):
    """Sums of all terms, and the gradients of the loss for the tensors that need one."""
    weight, bias, states, labels, *others = tensors
    teacher, inputs = TopK(*others[: len(_NO_TEACHER)]), others[len(_NO_TEACHER) :]
    dtype = at_least_float32(states[:0]).dtype
    # Gradients that grow chunk by chunk do so in at least float32.
    gradients = [
        torch.zeros_like(x, dtype=dtype if x is weight or x is bias else x.dtype) if need else None
        for x, need in zip(tensors, needed, strict=True)
    ]
    d_weight, d_bias, d_states, *_ = gradients
    d_inputs = [gradient for gradient in gradients[len(gradients) - len(inputs) :] if gradient is not None]
    teacher, padded = _known(teacher, labels, len(weight))
    sums, halo = {}, 1 if call.neighbours else 0
    buffer = states.new_empty(min(call.chunk + 2 * halo, len(states)), len(weight) + padded, dtype=dtype)
    for first in range(0, max(len(states), 1), call.chunk):
        last = min(first + call.chunk, len(states))
        # A position's loss may depend on the next one, and so its gradient on the loss before it.
        rows = slice(max(first - halo, 0), min(last + halo, len(states)))
        own = slice(first - rows.start, last - rows.start)
        logits = _logits(states[rows], weight, bias, buffer, padded)
        extra = [x[rows].detach().requires_grad_(x.requires_grad) for x in inputs]
        values, d_chunk = _chunk(call, any(needed), logits, labels[rows], teacher.at(rows), rows, last, extra)
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value[own].sum()
        if d_chunk is None:
            continue
        d_logits, *d_extra = d_chunk
        _accumulate(d_weight, d_bias, d_states, d_logits[own, : len(weight)], slice(first, last), states, weight)
        for gradient, d_x in zip(d_inputs, d_extra, strict=True):
            gradient[first:last] = d_x[own]
    return sums, gradients


def _chunk(
    call: _Call,
    learning: bool,
    logits: Tensor,
    labels: Tensor,
    teacher: TopK,
    rows: slice,
    last: int,
    extra: list[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor] | None]:
    """The terms at the positions `rows`, detached, and the gradients of the logits and of `extra`, where there are any.

    What the loss is differentiated through exists in here only, so that no chunk holds that of the one before.
    """
    ids, labels = teacher.ids.long(), labels[:, None].long()
    divergence, derivative = (None, None) if call.dense is None else _whole(call.dense, learning, logits, rows)
    student, exponentials = _reduce(logits, ids, labels, teacher.logprobs is None)
    for x in student:
        x.requires_grad_()
    with torch.set_grad_enabled(learning):
        divergence = divergence if teacher.logprobs is None else call.divergence(teacher, student)
        values = call.terms(Scores(student.label, student.lse, divergence), rows, *extra)
        complete = slice(0, last - rows.start)
        objective = sum(call.weights[name] * values[name][complete].sum() for name in call.weights)
    values = {name: value.detach() for name, value in values.items()}
    if not (torch.is_tensor(objective) and objective.requires_grad):
        return values, None
    variables = [*student, *(x for x in extra if x.requires_grad), *([] if derivative is None else [divergence])]
    gradients = torch.autograd.grad(objective, variables, allow_unused=True, materialize_grads=True)
    d_student, d_extra = SparseLogprobs(*gradients[: len(student)]), gradients[len(student) :]
    d_logits = _expand(exponentials, ids, labels, student, d_student)
    if derivative is not None:
        *d_extra, d_divergence = d_extra
        d_logits.addcmul_(derivative, d_divergence[:, None])
    return values, [d_logits, *d_extra]


def _whole(dense: Dense, learning: bool, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
    """A divergence over the whole vocabulary [n], and its derivative for the logits [n, V] where there is to be one."""
    with torch.set_grad_enabled(learning):
        logits = logits.detach().requires_grad_(learning)
        value = dense(logits, rows)
        derivative = torch.autograd.grad(value.sum(), logits)[0] if learning else None
    return value.detach().requires_grad_(learning), derivative


def _known(teacher: TopK, labels: Tensor, vocabulary: int) -> tuple[TopK, int]:
    """The teacher as divergences take it, and how many impossible logits stand for ids that the student does not have.

    Their mass belongs to the tail. Without a teacher the only id is the label.
    """
    if teacher.ids is None:
        return teacher._replace(ids=labels[:, None]), 0
    if teacher.own is not None:
        kept = (teacher.ids == labels[:, None]).any(-1)
        teacher = teacher._replace(own=teacher.own.masked_fill(kept, -torch.inf))
    unknown = teacher.ids >= vocabulary
    if not unknown.any():
        return teacher, 0
    ids, tail = teacher.ids.clamp_max(vocabulary), teacher.tail
    if teacher.tau is not None:
        tail = tail_mass(teacher.logprobs, teacher.tau)
    if tail is not None:
        tail = tail + at_least_float32(teacher.logprobs).exp().masked_fill(~unknown, 0).sum(-1)
    return teacher._replace(ids=ids, logprobs=teacher.logprobs.masked_fill(unknown, -torch.inf), tail=tail), 1


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, padded: int) -> Tensor:
    """states @ weight.T + bias [n, V + padded] in `buffer`, promoted to its type; impossible where padded."""
    logits = buffer[: len(states)]
    if padded or states.dtype != buffer.dtype:
        logits[:, : len(weight)] = states @ weight.T
        logits[:, len(weight) :] = -torch.inf
    else:
        torch.mm(states, weight.T, out=logits)
    if bias is not None:
        logits[:, : len(weight)] += bias
    return logits


class _Exponentials(NamedTuple):
    """exp(logit - top) outside the ids, 0 at them, in the logits' memory; `total` [n, 1] their sum."""

    values: Tensor  # [n, V]
    total: Tensor  # [n, 1]


def _reduce(logits: Tensor, ids: Tensor, labels: Tensor, plain: bool) -> tuple[SparseLogprobs, _Exponentials]:
    """What the loss depends on, in one pass over the logits [n, V]; `plain`: the only id is the label."""
    label = None if plain else logits.gather(-1, labels)
    outcomes = logits.new_empty(len(ids), ids.shape[-1] + 1)
    inside, outside = outcomes[:, :-1], outcomes[:, -1:]
    inside.copy_(logits.gather(-1, ids))
    values = logits.scatter_(-1, ids, -torch.inf)
    top = values.amax(-1, keepdim=True)
    top = torch.where(torch.isneginf(top), 0, top)
    values = values.sub_(top).exp_()
    total = values.sum(-1, keepdim=True)
    outside.copy_(top + total.log())
    highest = inside.amax(-1, keepdim=True).clamp_min(torch.finfo(inside.dtype).min)
    lse = torch.logaddexp(highest + (inside - highest).exp_().sum(-1, keepdim=True).log(), outside)
    outcomes -= lse
    label = inside[:, 0].clone() if plain else (label - lse).squeeze(-1)
    return SparseLogprobs(outcomes, label, lse.squeeze(-1)), _Exponentials(values, total)


def _expand(
    exponentials: _Exponentials, ids: Tensor, labels: Tensor, student: SparseLogprobs, d_student: SparseLogprobs
) -> Tensor:
    """Gradient of the logits [n, V] from that of the student's numbers, in the memory of both.

    Each log-probability is a logit less the lse, whose gradient is the student's distribution.
    """
    values, total = exponentials
    shared = (d_student.lse - d_student.outcomes.sum(-1) - d_student.label)[:, None]
    d_logit = student.outcomes.detach().exp_().mul_(shared).add_(d_student.outcomes)
    values.mul_(torch.where(total > 0, d_logit[:, -1:] / total, 0))
    values.scatter_(-1, ids, d_logit[:, :-1])
    return values.scatter_add_(-1, labels, d_student.label[:, None])


def _accumulate(
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    d_states: Tensor | None,
    d_logits: Tensor,
    rows: slice,
    states: Tensor,
    weight: Tensor,
) -> None:
    """Add what a chunk's gradient of the logits [n, V] gives to those of weight, bias and states."""
    if d_states is not None:
        if weight.dtype == d_logits.dtype:
            torch.mm(d_logits, weight, out=d_states[rows])
        else:
            d_states[rows] = d_logits.to(weight.dtype) @ weight
    if d_weight is not None:
        d_weight.addmm_(d_logits.T, states[rows].to(d_logits.dtype))
    if d_bias is not None:
        d_bias += d_logits.sum(0)

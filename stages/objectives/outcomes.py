"""The outcomes that a divergence compares: the whole vocabulary, or the teacher's top k and a bucket for the rest."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half types promoted, float32 and float64 kept."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def dense(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the whole vocabulary, [..., V] each; no T^2 factor."""
    teacher = torch.log_softmax(at_least_float32(teacher_logits) / temperature, -1)
    return teacher, torch.log_softmax(at_least_float32(student_logits) / temperature, -1)


def bucket(topk_ids: Tensor, topk_logprobs: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Top k and one bucket: the tail is an extra outcome on both sides.

    topk_ids [N, k] distinct ids, topk_logprobs [N, k] with full-vocabulary normalisation, student_logits [N, V]
    -> log-probabilities [N, k + 1] of teacher and student; [N, k] where k = V, which leaves no tail.

    Grouping outcomes never increases a divergence, so each is a lower bound of its full value, and still zero where
    student and teacher agree. Ids at or above V (the padding of a larger embedding in the teacher) have no
    counterpart and belong to the tail.

    The student's tail is a logsumexp over the other ids: 1 - p errs by 3e-2 at a tail of 4e-5 in float32.
    """
    logits = at_least_float32(student_logits)
    teacher = at_least_float32(topk_logprobs).to(logits.dtype)
    vocabulary = logits.shape[-1]
    teacher = teacher.masked_fill(topk_ids >= vocabulary, -torch.inf)
    # One impossible token more, which all ids without a counterpart point to.
    logits = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
    ids = topk_ids.clamp_max(vocabulary).long()
    lse = torch.logsumexp(logits, -1, keepdim=True)
    student = logits.gather(-1, ids) - lse
    if topk_ids.shape[-1] < vocabulary:
        teacher = torch.cat([teacher, log_tail(teacher)], -1)
        others = torch.logsumexp(logits.scatter(-1, ids, -torch.inf), -1, keepdim=True)
        student = torch.cat([student, others - lse], -1)
    # Values rounded to float16 can sum to more or less than one.
    return teacher - torch.logsumexp(teacher, -1, keepdim=True), student


def log_tail(logprobs: Tensor) -> Tensor:
    """log(1 - sum exp) of log-probabilities [..., k] -> [..., 1], floored at the precision of 1."""
    mass = torch.logsumexp(logprobs, -1, keepdim=True).exp()
    return torch.log((1 - mass).clamp_min(torch.finfo(logprobs.dtype).eps))


TAILS = {"bucket": bucket}

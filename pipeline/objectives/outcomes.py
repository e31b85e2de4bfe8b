"""The outcomes that a divergence compares: the whole vocabulary, or what a teacher of k tokens per position leaves.

A sparse teacher sees the student through k + 1 numbers per position: its log-probabilities at the teacher's ids, and
that of all others together. Every way to treat the tail, the mass outside the k, is a function of these.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.objectives import supports
from pipeline.objectives.logprobs import SparseLogprobs, TopK, at_least_float32


def shared(teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, V] over the ids that both sides have, each renormalised there; at least float32.

    Logits [n, V] of vocabularies of one family, of which only the padding of an embedding differs.
    """
    size = min(teacher_logits.shape[-1], student_logits.shape[-1])
    both = (at_least_float32(logits[:, :size]) for logits in (teacher_logits, student_logits))
    teacher, student = (torch.log_softmax(logits, -1) for logits in both)
    return teacher.to(student.dtype), student


def outside_too(student: SparseLogprobs, ids: Tensor) -> SparseLogprobs:
    """The same student with some of the k ids, [N, k] bool, counted among all others.

    What the teacher excludes is not an outcome of its own: reverse KL would be infinite at any student that is not
    exactly 0 there.
    """
    joined = torch.cat([student.inside.masked_fill(~ids, -torch.inf), student.outside[:, None]], -1)
    nothing = torch.isneginf(joined).all(-1, keepdim=True)
    # The logsumexp of nothing but -inf has no gradient.
    outside = torch.logsumexp(joined.clamp_min(torch.finfo(joined.dtype).min), -1, keepdim=True)
    inside = student.inside.masked_fill(ids, -torch.inf)
    return student._replace(outcomes=torch.cat([inside, outside.masked_fill(nothing, -torch.inf)], -1))


def bucket(teacher: TopK, student: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """The tail is one extra outcome on both sides: log-probabilities [N, k + 1] of teacher and student.

    Grouping outcomes never increases a divergence, so each is a lower bound of its full value, and still zero where
    student and teacher agree. The student's tail is a logsumexp over the other ids: 1 - p errs by 3e-2 at a tail of
    4e-5 in float32. Where the student has nothing outside the k, the teacher's tail is dropped too.
    """
    tail = tail_mass(teacher).masked_fill(torch.isneginf(student.outside), 0)
    both = torch.cat([teacher.logprobs, tail.log()[:, None]], -1)
    return both.sub_(log_total(both)), student.outcomes


def own_apart(teacher: TopK, student: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """As `bucket`, with the response's own token as an outcome beside the rest: [N, k + 2].

    Impossible on both sides where the teacher's `own` is -inf: there it is one of the k, or not looked at. Otherwise
    the rest is what the own token leaves of the mass outside the k, on either side.
    """
    own = teacher.own.to(teacher.logprobs.dtype)
    rest = _difference(tail_mass(teacher).log(), own).masked_fill(torch.isneginf(student.outside), -torch.inf)
    label = student.label.masked_fill(torch.isneginf(own), -torch.inf)
    t = torch.cat([teacher.logprobs, own[:, None], rest[:, None]], -1)
    s = torch.cat([student.inside, label[:, None], _difference(student.outside, label)[:, None]], -1)
    return t.sub_(log_total(t)), s


def _difference(whole: Tensor, part: Tensor) -> Tensor:
    """log(exp(whole) - exp(part)) to the precision of the whole, and not below it; part <= whole but for rounding."""
    limits = torch.finfo(whole.dtype)
    share = (part - whole.clamp_min(limits.min)).exp()
    return whole + torch.log1p(-share.clamp_max(1 - limits.eps))


def tail_mass(teacher: TopK) -> Tensor:
    """The teacher's mass outside the ids, [N], above 0: as it is known, else 1 - the mass of the ids.

    The latter is not below the precision of 1: values rounded to float16 can sum to one and more.
    """
    limits = torch.finfo(teacher.logprobs.dtype)
    if teacher.tail is not None:
        return teacher.tail.to(teacher.logprobs.dtype).clamp_min(limits.tiny)
    if teacher.tau is not None:
        return supports.tail_mass(teacher.logprobs, teacher.tau).clamp_min(limits.tiny)
    return (1 - teacher.logprobs.exp().sum(-1)).clamp_min(limits.eps)


def renorm(teacher: TopK, student: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """Both sides renormalised on the k ids, [N, k]: blind to the mass that the student puts elsewhere."""
    impossible = torch.isneginf(student.inside)
    # The softmax of nothing but -inf has no gradient.
    inside = torch.log_softmax(student.inside.clamp_min(torch.finfo(student.inside.dtype).min), -1)
    return teacher.logprobs - log_total(teacher.logprobs), inside.masked_fill(impossible, -torch.inf)


def teacher_renorm(teacher: TopK, student: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """The teacher renormalised on the k ids, zero elsewhere; the student over its whole vocabulary, [N, k + 1].

    The last outcome, the student's tail, is one that the teacher excludes. Not zero at equality: it pushes the
    student's tail to nothing. Reverse KL is infinite.
    """
    return pad(teacher.logprobs - log_total(teacher.logprobs), (0, 1), value=-torch.inf), student.outcomes


def truncate(teacher: TopK, student: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """The sum over the k ids only, [N, k], neither side renormalised: can be negative."""
    return teacher.logprobs, student.inside


def log_total(logprobs: Tensor) -> Tensor:
    """Logarithm of the mass of log-probabilities [N, M], [N, 1]; 0 where there is none.

    In log space: all that the student has of the teacher may be ids that are less likely than the type can say.
    """
    total = torch.logsumexp(logprobs, -1, keepdim=True)
    return total.masked_fill_(torch.isneginf(total), 0)


TAILS = {"bucket": bucket, "renorm": renorm, "teacher_renorm": teacher_renorm, "truncate": truncate}

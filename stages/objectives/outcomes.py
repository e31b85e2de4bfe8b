"""The outcomes that a divergence compares: the whole vocabulary, or what a teacher of k tokens a position leaves of it.

A sparse teacher sees the student through k + 1 numbers a position: its log-probabilities at the teacher's ids, and
that of all others together. Every way to treat the tail, the mass outside the k, is a function of these.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


def at_least_float32(x: Tensor) -> Tensor:
    """Half types promoted, float32 and float64 kept."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class SparseLogprobs(NamedTuple):
    """A student at N positions, as far as a sparse loss depends on it; at least float32."""

    outcomes: Tensor  # [N, k + 1] log-probabilities at the teacher's ids, and of all others together; -inf for none
    label: Tensor  # [N] of the token that followed
    lse: Tensor  # [N] log-sum-exp of the raw logits

    @property
    def inside(self) -> Tensor:
        """[N, k] at the teacher's ids; -inf where the student has no such id."""
        return self.outcomes[:, :-1]

    @property
    def outside(self) -> Tensor:
        """[N] of all other ids together; -inf where there are none."""
        return self.outcomes[:, -1]


def dense(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the whole vocabulary, [..., V] each; no T^2 factor.

    The smaller of two vocabularies that are padded to different sizes gives no mass to what it does not have.
    """
    size = max(teacher_logits.shape[-1], student_logits.shape[-1])
    teacher, student = (
        pad(at_least_float32(logits), (0, size - logits.shape[-1]), value=-torch.inf)
        for logits in (teacher_logits, student_logits)
    )
    return torch.log_softmax(teacher / temperature, -1), torch.log_softmax(student / temperature, -1)


def bucket(teacher: Tensor, student: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """The tail is one extra outcome on both sides.

    teacher [N, k], normalised over the full vocabulary, -inf where the student has no such id
    -> log-probabilities [N, k + 1] of teacher and student.

    Grouping outcomes never increases a divergence, so each is a lower bound of its full value, and still zero where
    student and teacher agree. The student's tail is a logsumexp over the other ids: 1 - p errs by 3e-2 at a tail of
    4e-5 in float32. Where the student has nothing outside the k, the teacher's tail is dropped too.
    """
    mass = teacher.exp().sum(-1)
    tail = tail_mass(mass).masked_fill(torch.isneginf(student.outside), 0)
    both = torch.cat([teacher, tail.log()[:, None]], -1).sub_((mass + tail).log()[:, None])
    return both, student.outcomes


def tail_mass(mass: Tensor) -> Tensor:
    """1 - mass, not below the precision of 1: values rounded to float16 can sum to one and more."""
    return (1 - mass).clamp_min(torch.finfo(mass.dtype).eps)


def renorm(teacher: Tensor, student: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """Both sides renormalised on the k ids, [N, k]: blind to the mass that the student puts elsewhere."""
    impossible = torch.isneginf(student.inside)
    # The softmax of nothing but -inf has no gradient.
    inside = torch.log_softmax(student.inside.clamp_min(torch.finfo(student.inside.dtype).min), -1)
    return _normalised(teacher), inside.masked_fill(impossible, -torch.inf)


def teacher_renorm(teacher: Tensor, student: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """The teacher renormalised on the k ids, zero elsewhere; the student over its whole vocabulary, [N, k + 1].

    The last outcome, the student's tail, is one that the teacher excludes. Not zero at equality: it pushes the
    student's tail to nothing.
    """
    return pad(_normalised(teacher), (0, 1), value=-torch.inf), student.outcomes


def truncate(teacher: Tensor, student: SparseLogprobs) -> tuple[Tensor, Tensor]:
    """The sum over the k ids only, [N, k], neither side renormalised: can be negative."""
    return teacher, student.inside


def _normalised(teacher: Tensor) -> Tensor:
    """The teacher's log-probabilities [N, k] as they are among the k; a row without any mass stays as it is."""
    mass = teacher.exp().sum(-1, keepdim=True)
    return teacher - mass.clamp_min(torch.finfo(mass.dtype).tiny).log()


TAILS = {"bucket": bucket, "renorm": renorm, "teacher_renorm": teacher_renorm, "truncate": truncate}

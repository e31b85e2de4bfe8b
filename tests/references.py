"""What the objectives must equal: formulas on float64 probabilities, and the head's reduction by autograd alone."""

import torch
from torch import Tensor

from pipeline.objectives.divergences import DIVERGENCES
from pipeline.objectives.logprobs import SparseLogprobs, at_least_float32
from pipeline.objectives.outcomes import TAILS

# Reverse KL to a teacher that gives nothing to the tail is infinite: the configuration refuses it.
FINITE = [(name, tail) for name in DIVERGENCES for tail in TAILS if (name, tail) != ("rkl", "teacher_renorm")]


def random_logits(seed: int, n: int = 4, v: int = 12, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [N, k] of a sparse teacher."""
    values, ids = torch.log_softmax(logits, -1).topk(k, -1)
    return ids, values


def dense(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the whole vocabulary, [..., V] each; no T^2 factor.

    The smaller of two vocabularies that are padded to different sizes gives no mass to what it does not have.
    """
    size = max(teacher_logits.shape[-1], student_logits.shape[-1])
    teacher, student = (
        torch.nn.functional.pad(at_least_float32(logits), (0, size - logits.shape[-1]), value=-torch.inf)
        for logits in (teacher_logits, student_logits)
    )
    return torch.log_softmax(teacher / temperature, -1), torch.log_softmax(student / temperature, -1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), 0 log 0 = 0."""
    return torch.where(p > 0, p * (p / q).log(), 0).sum(-1)


def divergence(name: str, t: Tensor, s: Tensor, w: float) -> Tensor:
    """Of measures [N, M] of teacher and student."""
    mixed = w * t + (1 - w) * s
    return {
        "fkl": lambda: kl(t, s),
        "rkl": lambda: kl(s, t),
        "jsd": lambda: w * kl(t, mixed) + (1 - w) * kl(s, mixed),
        "skew_fkl": lambda: kl(t, mixed),
        "skew_rkl": lambda: kl(s, w * s + (1 - w) * t),
        "tvd": lambda: 0.5 * (t - s).abs().sum(-1),
    }[name]()


def sparse_measures(tail: str, ids: Tensor, teacher: Tensor, student: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """What the two sides are compared on.

    ids [N, k]: those that the student lacks or the teacher excludes count as outside. teacher [N, Vt] and student
    [N, Vs], probabilities of the whole vocabularies, padded to any size.
    floor: the least mass of the teacher's tail in `bucket`.
    """
    size = max(teacher.shape[-1], student.shape[-1])
    known = (ids < student.shape[-1]) & (teacher.gather(-1, ids) > 0)
    teacher, student = (torch.nn.functional.pad(p, (0, size - p.shape[-1])) for p in (teacher, student))
    chosen = torch.zeros_like(student, dtype=torch.bool).scatter(-1, ids, known)
    t, s = (torch.where(chosen, p, 0) for p in (teacher, student))
    outside = [torch.where(chosen, 0, p).sum(-1, keepdim=True) for p in (teacher, student)]
    if tail == "bucket":
        left = outside[0].clamp_min(floor) * (outside[1] > 0)  # no tail where the student has none
        t, s = torch.cat([t, left], -1), torch.cat([s, outside[1]], -1)
        return t / t.sum(-1, keepdim=True), s
    if tail == "renorm":
        return t / t.sum(-1, keepdim=True), s / s.sum(-1, keepdim=True)
    if tail == "teacher_renorm":
        return t / t.sum(-1, keepdim=True), student
    return t, s


def sparse_divergence(
    name: str, tail: str, ids: Tensor, teacher: Tensor, student: Tensor, w: float, floor: float = 2.0**-52
) -> Tensor:
    """Of a top-k teacher, from the whole distributions [N, V] of both."""
    t, s = sparse_measures(tail, ids, teacher, student, floor)
    return divergence(name, t, s, w)


def sparse_logprobs(logits: Tensor, ids: Tensor, labels: Tensor) -> SparseLogprobs:
    """What the head makes of logits [N, V] at distinct ids [N, k] and labels [N]; ids at or above V are impossible."""
    logits = at_least_float32(logits)
    vocabulary = logits.shape[-1]
    padded = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
    ids = ids.clamp_max(vocabulary).long()
    lse = torch.logsumexp(logits, -1)
    outside = torch.logsumexp(padded.scatter(-1, ids, -torch.inf), -1)
    label = logits.gather(-1, labels[:, None].long()).squeeze(-1) - lse
    return SparseLogprobs(torch.cat([padded.gather(-1, ids), outside[:, None]], -1) - lse[:, None], label, lse)


def every_support(p: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """All supports of k tokens that p [V] can have: how often each comes [M], tokens [M, k] by id, and tau [].

    Between two offsets of the grid at which a token comes in or goes out, the support is one and the same. tau is 0
    where fewer than k tokens have any mass, or there are no more; then there is one support.
    """
    ordered = p.sort(descending=True, stable=True)
    if k >= len(p) or ordered.values[k - 1] == 0:
        return p.new_ones(1), ordered.indices[:k].sort().values[None], p.new_zeros(())
    taus = [ordered.values[j:].sum() / (k - j) for j in range(k)]
    tau = next(tau for j, tau in enumerate(taus) if ordered.values[j] <= tau)
    share = torch.where(p > tau, 0, p / tau)
    ends = share.cumsum(0)
    cuts = torch.cat([p.new_tensor([0.0, 1.0]), -ends % 1]).sort().values
    places, lengths = [], cuts.diff()
    for offset in ((cuts[1:] + cuts[:-1]) / 2)[lengths > 1e-12]:
        drawn = (offset + ends).floor() > (offset + ends - share).floor()
        places.append((drawn | (p > tau)).nonzero()[:, 0])
    return lengths[lengths > 1e-12], torch.stack(places), tau

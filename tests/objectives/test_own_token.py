"""What holds for the response's own token as an outcome beside the rest: exact, a tighter bound, and nobody else's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.objectives.divergences import DIVERGENCES
from pipeline.objectives.head import Head, chunked_loss, token_scores
from pipeline.objectives.logprobs import TopK
from pipeline.objectives.outcomes import TAILS, own_apart
from pipeline.objectives.sparse import sparse_divergence
from tests import references
from tests.objectives.test_sparse import HARD, masked
from tests.references import FINITE, dense, random_logits, sparse_logprobs, top_k

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
every_case = pytest.mark.parametrize("case", HARD)
INF = math.inf
TINY = torch.finfo(torch.float64).tiny


def said(teacher, student, number):
    """A token that both can say at each position, [N]: of those not among the likeliest, the `number`th."""
    both = min(teacher.shape[-1], student.shape[-1])
    possible = teacher[:, :both].isfinite() & student[:, :both].isfinite()
    likely = teacher[:, :both].masked_fill(~possible, -INF)
    return likely.argsort(-1).gather(-1, (~possible).sum(-1, keepdim=True) + number).squeeze(-1)


def row_of(teacher, student, k, labels, own=True):
    """A plain top k as the store has it and the head hands it over."""
    full = torch.log_softmax(teacher, -1)
    ids, logprobs = top_k(teacher, k)
    known, kept = ids < student.shape[-1], (ids == labels[:, None]).any(-1)
    tail = full.exp().scatter(-1, ids, torch.where(known, 0, logprobs.exp())).sum(-1)
    label = full.gather(-1, labels[:, None]).squeeze(-1).masked_fill(kept, -INF)
    return TopK(ids, logprobs.masked_fill(~known, -INF), tail=tail, own=label if own else None)


def value(name, row, student, labels, weight=0.3, tail="bucket"):
    return sparse_divergence(name, weight, tail)(row, sparse_logprobs(student, row.ids, labels))


@every_divergence
@every_case
@pytest.mark.parametrize("number", [0, 1])
def test_it_is_the_divergence_over_the_kept_tokens_the_own_token_and_the_rest(name, case, number):
    """Against float64 formulas on whole distributions."""
    teacher, student, k = HARD[case]
    labels = said(teacher, student, 0 if case in ("one-hot teacher", "all but one excluded") else number)
    row = row_of(teacher, student, k, labels)
    found = value(name, row, student, labels)
    alone = torch.cat([row.ids, labels[:, None]], -1)  # the reference takes a set of ids
    t, s = torch.softmax(teacher, -1), torch.softmax(student, -1)
    expected = references.sparse_divergence(name, "bucket", alone, t, s, 0.3, floor=TINY)
    # Where next to nothing is left, the rest is known to the precision of what it is left of.
    left = [p.scatter(-1, alone.clamp_max(p.shape[-1] - 1), 0).sum(-1) for p in (t, s)]
    unknown = left[1] * (1e-14 * row.tail / left[0].clamp_min(TINY)).clamp_max(1) * 40
    infinite = expected.isinf() & (found > 1e30)
    assert (infinite | ((found - expected).abs() <= unknown + 1e-9 * (1 + expected))).all(), (found, expected)


@every_divergence
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), k=st.integers(1, 11), scale=st.floats(0.1, 15), weight=st.floats(0.01, 0.99),
    number=st.integers(0, 11),
)  # fmt: skip
def test_it_lies_between_k_and_the_rest_and_the_full_divergence(name, seed, k, scale, weight, number):
    teacher, student = random_logits(seed, scale=scale), random_logits(seed + 1, scale=scale)
    labels = said(teacher, student, number)
    with_own, without = (row_of(teacher, student, k, labels, own) for own in (True, False))
    coarse, found = (value(name, row, student, labels, weight) for row in (without, with_own))
    full = DIVERGENCES[name](*dense(teacher, student), weight)
    slack = 1e-7 * (1 + full)
    assert (coarse >= -1e-12).all() and (coarse <= found + slack).all() and (found <= full + slack).all()
    at_equality = value(name, with_own, teacher + 2, labels, weight)
    torch.testing.assert_close(at_equality, torch.zeros_like(at_equality), atol=1e-9, rtol=0)


@every_divergence
def test_it_is_more_than_k_and_the_rest_where_the_student_says_what_the_teacher_would_not(name):
    teacher, student = random_logits(0), random_logits(1)
    labels = said(teacher, student, 0)
    student = student.scatter(-1, labels[:, None], 6.0)
    found, without = (value(name, row_of(teacher, student, 4, labels, own), student, labels) for own in (True, False))
    assert (found >= without - 1e-12).all() and (name == "tvd" or (found > without + 0.01).any())


@every_divergence
@every_case
@pytest.mark.parametrize("number", [0, 1])
def test_the_gradients_are_those_of_finite_differences(name, case, number):
    teacher, student, k = HARD[case]
    labels = said(teacher, student, 0 if case in ("one-hot teacher", "all but one excluded") else number)
    row, free = row_of(teacher, student, k, labels), student.isfinite()
    start = student[free].clone().requires_grad_()

    def of(values):
        return value(name, row, torch.full_like(student, -INF).masked_scatter(free, values), labels)

    found = of(start)
    smooth = name != "tvd" or case not in ("identical", "one-hot teacher")  # |T - S| has a corner at equality
    if smooth and (found < 1e30).all():
        assert torch.autograd.gradcheck(of, start, atol=1e-5)
    (gradient,) = torch.autograd.grad(found[found < 1e30].sum(), start)
    assert gradient.isfinite().all()


@every_divergence
@pytest.mark.parametrize("tail", TAILS)
def test_other_positions_are_not_touched_bit_for_bit(name, tail):
    """Those without an own token, in a batch with some that have one; and all of them in the other tail modes."""
    teacher, student = random_logits(0, n=9).float(), random_logits(1, n=9).float()
    labels = said(teacher, student, 3)
    row = row_of(teacher, student, 4, labels)
    row = row._replace(own=row.own.masked_fill(torch.arange(9) % 3 > 0, -INF))
    start = student.requires_grad_()
    found, plain = (value(name, each, start, labels, tail=tail) for each in (row, row._replace(own=None)))
    touched = row.own.isfinite() if tail == "bucket" else torch.zeros(9, dtype=torch.bool)
    assert torch.equal(found[~touched], plain[~touched])
    assert (found[touched] != plain[touched]).any() == (tail == "bucket")
    if (name, tail) in FINITE:
        gradients = [torch.autograd.grad(each.sum(), start)[0] for each in (found, plain)]
        assert torch.equal(*(gradient[~touched] for gradient in gradients))


@every_divergence
def test_sampled_tokens_under_bucket_have_no_own_outcome(name):
    teacher, student = random_logits(0), random_logits(1)
    labels = said(teacher, student, 0)
    row = row_of(teacher, student, 4, labels)._replace(tau=torch.full((4,), 0.01))
    assert torch.equal(value(name, row, student, labels), value(name, row._replace(own=None), student, labels))


@every_divergence
def test_a_token_that_the_student_cannot_say_belongs_to_the_rest(name):
    """Also where the student has nothing at all outside the k."""
    teacher, labels = random_logits(0), torch.full((4,), 7)
    teacher[:, 7] = teacher.amin(-1) - 1
    for impossible in ([7], list(range(12))):
        student = random_logits(1)
        kept = torch.zeros(4, 12, dtype=torch.bool).scatter(-1, top_k(teacher, 4)[0], True)
        student = torch.where(kept, student, masked(student, impossible)).requires_grad_()
        row = row_of(teacher, student, 4, labels)
        found, plain = (value(name, each, student, labels) for each in (row, row._replace(own=None)))
        assert torch.equal(found, plain) and found.isfinite().all()
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert gradient[student.isfinite()].isfinite().all()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", [0.01, None])
def test_rounding_may_leave_less_outside_the_k_than_the_own_token_has(name, tail, dtype):
    """Then nothing is left for the rest, and not less than nothing; likewise for the student."""
    ids, labels = torch.tensor([[0, 1]]), torch.tensor([2])
    logprobs = torch.tensor([[math.log(0.6), math.log(0.39)]]).half().to(dtype)
    own = torch.tensor([math.log(0.0101)])
    row = TopK(ids, logprobs, tail=None if tail is None else torch.tensor([tail]), own=own)
    logits = torch.tensor([[0.0, 0, 0, -200, -INF]], dtype=dtype).requires_grad_()
    seen = sparse_logprobs(logits, ids, labels)
    for above in (0, 1e-3):
        student = seen._replace(label=seen.label + above)
        t, s = own_apart(row, student)
        assert (t.exp() >= 0).all() and t.isfinite().all() and s.isfinite().all()
        torch.testing.assert_close(t.exp().sum(-1), torch.ones(1, dtype=dtype))
        found = sparse_divergence(name, 0.3)(row, student)
        (gradient,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
        assert found.isfinite().all() and (found >= 0).all() and gradient.isfinite().all()


@every_divergence
@pytest.mark.parametrize("teacher_v", [12, 9, 16])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_of_the_head_change_nothing(name, teacher_v, chunk):
    """Labels among the kept tokens and not, rows of either kind, vocabularies that are padded to different sizes."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((11, 6), (12, 6), (12,))]
    states, weight, bias = leaves = [x.requires_grad_() for x in draws]
    labels = torch.randint(min(12, teacher_v), (11,), generator=generator)
    logits = random_logits(0, n=11, v=teacher_v)
    ids, logprobs = top_k(logits, 6)
    own = torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0].masked_fill(torch.arange(11) % 4 == 0, -INF)
    stored = TopK(ids, logprobs, tail=1 - logprobs.exp().sum(-1), own=own)
    loss, _ = chunked_loss(
        Head(weight, bias), states, labels, lambda s, rows: {"kd": s.divergence, "nll": -s.logprob},
        {"kd": 1.0, "nll": 0.3}, stored, sparse_divergence(name, 0.3), chunk=chunk, neighbours=True,
    )  # fmt: skip
    student = states @ weight.T + bias
    t, s = torch.softmax(logits, -1), torch.softmax(student, -1)
    alone = torch.cat([ids, torch.where(own.isfinite(), labels, ids[:, 0])[:, None]], -1)
    expected = references.sparse_divergence(name, "bucket", alone, t, s, 0.3, floor=TINY)
    expected = (expected - 0.3 * torch.log_softmax(student, -1).gather(-1, labels[:, None])[:, 0]).sum()
    torch.testing.assert_close(loss, expected)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other)


@every_divergence
def test_a_position_whose_tokens_the_student_lacks_still_teaches_nothing(name):
    states, weight = torch.randn(3, 6).requires_grad_(), torch.randn(12, 6)
    teacher = TopK(torch.tensor([[12, 13]]).expand(3, 2), torch.full((3, 2), -1.0), own=torch.full((3,), -2.0))
    labels, divergence = torch.arange(3), sparse_divergence(name, 0.3)
    assert (token_scores(Head(weight), states, labels, teacher, divergence).divergence == 0).all()
    loss, _ = chunked_loss(
        Head(weight), states, labels, lambda s, rows: {"kd": s.divergence}, {"kd": 1.0}, teacher, divergence
    )
    assert (torch.autograd.grad(loss, states)[0] == 0).all()

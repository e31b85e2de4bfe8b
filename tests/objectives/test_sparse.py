"""What holds for teachers of k tokens per position: exactness in all four tail modes, properties, gradients."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.objectives.divergences import DIVERGENCES
from pipeline.objectives.logprobs import TopK
from pipeline.objectives.outcomes import TAILS, bucket, tail_mass
from pipeline.objectives.sparse import sparse_divergence
from pipeline.params import Distill
from tests import references
from tests.references import FINITE, dense, random_logits, sparse_logprobs, top_k

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
every_tail = pytest.mark.parametrize("tail", TAILS)
every_finite_pair = pytest.mark.parametrize(("name", "tail"), FINITE)
INF = math.inf
ONE_HOT = torch.full((4, 12), -INF, dtype=torch.float64).scatter(1, torch.tensor([[0], [3], [5], [11]]), 0.0)


def labels(logits):
    return torch.zeros(len(logits), dtype=torch.long)


def sparse(name, tail, ids, logprobs, student, weight=0.3):
    """The product's value for student logits [N, V]."""
    unknown = ids >= student.shape[-1]
    logprobs = logprobs.masked_fill(unknown, -INF)
    return sparse_divergence(name, weight, tail)(TopK(ids, logprobs), sparse_logprobs(student, ids, labels(student)))


def masked(logits, columns):
    logits = logits.clone()
    logits[:, columns] = -INF
    return logits


# name -> teacher's logits, student's logits, k
HARD = {
    "random": (random_logits(0), random_logits(1), 4),
    "k is the vocabulary": (random_logits(0), random_logits(1), 12),
    "k is one": (random_logits(0), random_logits(1), 1),
    "identical": (random_logits(0), random_logits(0), 4),
    "far apart": (random_logits(0, scale=30), random_logits(1, scale=30), 4),
    "tiny tails": (random_logits(0) + 12 * (torch.arange(12) < 3), random_logits(1) + 12 * (torch.arange(12) < 3), 3),
    "one-hot teacher": (ONE_HOT, random_logits(1), 1),
    "almost one-hot teacher": (40.0 * ONE_HOT.exp(), random_logits(1), 3),
    "logits of -inf on both sides": (masked(random_logits(0), [1, 7]), masked(random_logits(1), [1, 7]), 4),
    "ids that the teacher excludes": (masked(random_logits(0), [1, 7]), random_logits(1), 12),
    "ids that both exclude": (masked(random_logits(0), [1, 7]), masked(random_logits(1), [1, 7]), 12),
    "all but one excluded": (ONE_HOT, random_logits(1), 4),
    "a student without a tail": (random_logits(0), masked(random_logits(1), list(range(6, 12))), 12),
    "a larger student vocabulary": (random_logits(0, v=9), random_logits(1), 4),
    "a larger teacher vocabulary": (random_logits(0, v=15), random_logits(1), 6),
}


@every_tail
@every_divergence
@pytest.mark.parametrize("case", HARD)
def test_sparse_divergences_are_exact(name, tail, case):
    """Against float64 formulas on whole distributions; float32 and half-precision logits within their precision."""
    teacher, student, k = HARD[case]
    ids, logprobs = top_k(teacher, k)
    if case == "a larger teacher vocabulary":
        assert (ids >= 12).any()
    for dtype, logits in ((torch.float64, student), (torch.float32, student), (torch.bfloat16, student.bfloat16())):
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        eps = torch.finfo(precise).eps
        found = sparse(name, tail, ids, logprobs.to(precise), logits.to(dtype))
        assert found.dtype == precise
        t, s = torch.softmax(teacher, -1), torch.softmax(logits.double(), -1)
        expected = references.sparse_divergence(name, tail, ids, t, s, 0.3, floor=eps)
        # 1 - sum knows the teacher's tail to about eps, so its logarithm to eps / tail, times the student's tail.
        t_tail, s_tail = (p.scatter(-1, ids.clamp_max(11), 0).sum(-1) for p in (t[:, :12], s))
        known = s_tail * (16 * eps / t_tail).clamp_max(3)
        allowed = known + 10 * eps**0.75 * (1 + expected)
        close = (found.double() - expected).abs() <= allowed
        infinite = expected.isinf() & (found > 1e30)
        assert (close | infinite).all(), (dtype, found, expected)


@every_finite_pair
@pytest.mark.parametrize("case", HARD)
def test_gradients_are_finite_and_those_of_finite_differences(name, tail, case):
    teacher, student, k = HARD[case]
    ids, logprobs = top_k(teacher, k)
    free = student.isfinite()
    start = student[free].clone().requires_grad_()

    def value(values):
        return sparse(name, tail, ids, logprobs, torch.full_like(student, -INF).masked_scatter(free, values))

    smooth = name != "tvd" or case not in ("identical", "one-hot teacher")  # |T - S| has a corner at equality
    if smooth and (value(start) < 1e30).all():
        assert torch.autograd.gradcheck(value, start, atol=1e-5)
    found = value(start)
    (gradient,) = torch.autograd.grad(found[found < 1e30].sum(), start)
    assert gradient.isfinite().all()


@every_finite_pair
def test_ids_that_the_student_lacks_are_as_if_they_were_not_among_the_k(name, tail):
    """Half of them; and all but one."""
    ids, logprobs = top_k(random_logits(0), 6)
    for known in (3, 1):
        mixed = ids.clone()
        mixed[:, known:] = 12 + torch.arange(6 - known)
        found = sparse(name, tail, mixed, logprobs, random_logits(1))
        expected = sparse(name, tail, ids[:, :known], logprobs[:, :known], random_logits(1))
        torch.testing.assert_close(found, expected)


@every_finite_pair
def test_all_that_the_student_has_may_be_ids_that_the_teacher_all_but_excludes(name, tail):
    """Their probability is below float32's least, and the student has nothing outside the k."""
    ids, logprobs = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[-200.0, -210.0, -0.7, -0.7]])
    start = torch.tensor([[1.0, -1.0]], requires_grad=True)
    found = sparse(name, tail, ids, logprobs, start)
    (gradient,) = torch.autograd.grad(found.sum(), start)
    assert found.isfinite().all() and gradient.isfinite().all()
    if tail == "bucket":
        expected = sparse(name, tail, ids[:, :2], torch.log_softmax(logprobs[:, :2], -1), start)
        torch.testing.assert_close(found, expected)


def nearest_student(name: str, weight: float, tail: str) -> tuple[float, float]:
    """The least value over all students, and what that student puts outside the k of a teacher who has .1 there."""
    teacher, ids = torch.tensor([[0.45, 0.25, 0.15, 0.05]]).double().log(), torch.arange(4)[None]
    logits = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        value = sparse(name, tail, ids, teacher, logits, weight).sum()
        value.backward()
        return value

    value = step().item()
    if math.isfinite(value):
        value = optimizer.step(step) and sparse(name, tail, ids, teacher, logits, weight).item()
    return value, torch.softmax(logits, -1)[0, 4:].sum().item()


@every_tail
@pytest.mark.parametrize(
    ("name", "weight"),
    [("fkl", 0), ("rkl", 0), ("tvd", 0), *(("jsd", w) for w in (0, 0.1, 0.5, 0.9, 1))]
    + [(name, w) for name in ("skew_fkl", "skew_rkl") for w in (0.1, 0.5, 0.9)],
)
def test_the_configuration_refuses_what_pushes_the_mass_out_of_the_top_k_and_nothing_else(name, weight, tail):
    value, outside = nearest_student(name, weight, tail)
    mixture = {"beta": weight} if name == "jsd" else {"alpha": weight} if weight else {}
    if math.isinf(value) or outside > 0.6:
        with pytest.raises(ValueError, match=f"{tail}.*use tail: bucket"):
            Distill(objective=name, tail=tail, **mixture)
        return
    assert Distill(objective=name, tail=tail, **mixture).tail == tail
    if tail == "teacher_renorm" or (tail == "truncate" and name != "tvd" and not (name == "jsd" and weight)):
        assert outside < 0.05
    elif tail != "renorm":  # which does not see it
        assert 0.05 < outside < 0.15


def test_values_that_were_rounded_to_half_precision_and_sum_above_one_still_give_a_divergence():
    ids, logprobs = torch.tensor([[0, 1]]), (torch.tensor([[math.log(0.5), math.log(0.5)]]) + 0.001).half()
    assert logprobs.float().exp().sum() > 1
    rounded = TopK(ids, logprobs.float())
    teacher, _ = bucket(rounded, sparse_logprobs(torch.zeros(1, 9), ids, torch.tensor([0])))
    torch.testing.assert_close(teacher.exp().sum(-1), torch.ones(1))
    assert teacher.isfinite().all() and tail_mass(rounded).item() == pytest.approx(1.2e-7, rel=0.01)
    for name in DIVERGENCES:
        found = sparse(name, "bucket", ids, logprobs, torch.zeros(1, 9))
        assert found.isfinite().all() and (found >= 0).all()


@every_divergence
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), scale=st.floats(0.1, 30), weight=st.floats(0.01, 0.99))
def test_bucket_is_a_divergence_and_a_lower_bound(name, seed, k, scale, weight):
    teacher, student = random_logits(seed, scale=scale), random_logits(seed + 1, scale=scale)
    ids, logprobs = top_k(teacher, k)
    found = sparse(name, "bucket", ids, logprobs, student, weight)
    full = DIVERGENCES[name](*dense(teacher, student), weight)
    assert (found >= -1e-12).all()
    # The teacher's tail is 1 - sum, so its logarithm is known to about eps / tail: that much of the student's tail.
    tail = torch.softmax(teacher, -1).scatter(-1, ids, 0).sum(-1)
    rounding = (16 * torch.finfo(torch.float64).eps / tail).clamp_max(1) if k < 12 else 0
    slack = torch.softmax(student, -1).scatter(-1, ids, 0).sum(-1) * rounding
    assert (found <= full + slack + 1e-12 * (1 + full)).all()
    at_equality = sparse(name, "bucket", ids, logprobs, teacher, weight)
    torch.testing.assert_close(at_equality, torch.zeros_like(at_equality), atol=1e-9, rtol=0)


@every_divergence
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), scale=st.floats(0.1, 10), weight=st.floats(0.01, 0.99))
def test_renorm_and_dense_are_never_negative_and_zero_at_equality(name, seed, k, scale, weight):
    teacher, student = random_logits(seed, scale=scale), random_logits(seed + 1, scale=scale)
    ids, logprobs = top_k(teacher, k)
    for other, expected_zero in ((student, False), (teacher, True)):
        both = sparse(name, "renorm", ids, logprobs, other, weight), DIVERGENCES[name](*dense(teacher, other), weight)
        for found in both:
            assert (found >= -1e-12).all()
            assert not expected_zero or found.abs().max() < 1e-9


@every_tail
@every_divergence
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(2, 12))
def test_the_order_of_the_ids_does_not_matter(name, tail, seed, k):
    ids, logprobs = top_k(random_logits(seed), k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    assume(not torch.equal(order, torch.arange(k)))
    student = random_logits(seed + 1)
    turned = sparse(name, tail, ids[:, order], logprobs[:, order], student)
    torch.testing.assert_close(turned, sparse(name, tail, ids, logprobs, student))


@every_divergence
def test_what_the_other_tail_modes_lose(name):
    """renorm does not see mass that leaves the k; teacher_renorm and truncate are not zero at equality."""
    teacher = random_logits(0)
    ids, logprobs = top_k(teacher, 4)
    elsewhere = teacher.clone().scatter_add(-1, torch.topk(-teacher, 3).indices, torch.full((4, 3), 9.0).double())
    assert sparse(name, "renorm", ids, logprobs, elsewhere).abs().max() < 1e-9
    assert (sparse(name, "bucket", ids, logprobs, elsewhere) > 1e-6).all()
    assert sparse(name, "teacher_renorm", ids, logprobs, teacher).abs().min() > 1e-7
    if name == "fkl":
        shrunk = teacher.scatter_add(-1, ids, torch.full((4, 4), 3.0).double())
        assert (sparse(name, "truncate", ids, logprobs, shrunk) < 0).any()


def test_the_students_tail_is_exact_where_one_minus_p_is_not():
    logits = torch.tensor([[20.0, 10.0, 0.0, 0.0]])
    student = sparse_logprobs(logits, torch.tensor([[0, 1]]), torch.tensor([0]))
    exact = torch.log_softmax(logits.double(), -1)[0, 2:].logsumexp(-1)
    torch.testing.assert_close(student.outside[0].double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(student.lse[0].double(), logits.double().logsumexp(-1)[0], atol=1e-5, rtol=0)

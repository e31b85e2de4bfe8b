"""What holds for losses on sampled tokens: unbiased and exact, in value and gradient, and finite whatever comes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.objectives.divergences import DIVERGENCES, SUMMANDS
from pipeline.objectives.head import Head, chunked_loss, token_scores
from pipeline.objectives.logprobs import TopK
from pipeline.objectives.outcomes import TAILS
from pipeline.objectives.sparse import sparse_divergence
from pipeline.objectives.supports import systematic, weighted
from tests import references
from tests.references import dense, every_support, random_logits, sparse_logprobs

every_estimate = pytest.mark.parametrize("name", SUMMANDS)
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
INF = math.inf


def rows_of(teacher, ids, tau, label=0):
    """M positions with one teacher, log-probabilities [V], of which ids [M, k] are kept."""
    own = teacher[label].expand(len(ids)).masked_fill((ids == label).any(-1), -INF)
    return TopK(ids, teacher[ids], tau.expand(len(ids)), own=own)


def estimates(name, teacher, ids, tau, student, weight=0.3, label=0):
    """[M], with one student of logits [V]."""
    student = sparse_logprobs(student.expand(len(ids), -1), ids, torch.full((len(ids),), label))
    return sparse_divergence(name, weight, "sampled")(rows_of(teacher, ids, tau, label), student)


def excluded(logits, ids):
    return logits.index_fill(0, torch.as_tensor(ids), -INF)


ONE_HOT = excluded(torch.zeros(12, dtype=torch.float64), [0, 1, 2, *range(4, 12)])
TIES = torch.tensor([2.0, 2, 2, 0, 0, 0, 0, 0, 0, 1, 1, 1], dtype=torch.float64)
ONE, OTHER = random_logits(0)[0], random_logits(1)[0]
# name -> teacher's logits [V], student's logits [V], k
HARD = {
    "random": (ONE, OTHER, 4),
    "k is one": (ONE, OTHER, 1),
    "k is the vocabulary": (ONE, OTHER, 12),
    "k is all but one": (ONE, OTHER, 11),
    "k is more than the vocabulary": (ONE, OTHER, 20),
    "identical": (ONE, ONE, 4),
    "flat": (ONE / 30, OTHER, 4),
    "uniform": (torch.zeros_like(ONE), OTHER, 4),
    "ties": (TIES, OTHER, 5),
    "far apart": (10 * ONE, 10 * OTHER, 4),
    "peaked": (4 * ONE, OTHER, 4),
    "one-hot teacher": (ONE_HOT, OTHER, 4),
    "ids that the teacher excludes": (excluded(ONE, range(8)), OTHER, 6),
    "ids that both exclude": (excluded(ONE, range(8)), excluded(OTHER, range(4)), 6),
    "a larger student vocabulary": (ONE, random_logits(1, v=15)[0], 4),
}
every_case = pytest.mark.parametrize("case", HARD)


@every_estimate
@pytest.mark.parametrize("weight", [0.01, 0.3, 0.99])
@every_case
def test_the_mean_over_all_supports_is_the_dense_value_and_its_gradient(name, weight, case):
    teacher, student, k = HARD[case]
    teacher, student = torch.log_softmax(teacher, -1), student.clone().requires_grad_()
    often, ids, tau = every_support(teacher.exp(), k)
    mean = often @ estimates(name, teacher, ids, tau, student, weight)
    expected = DIVERGENCES[name](*dense(teacher, student), weight)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)
    if name != "tvd" or case != "identical":  # |T - S| has a corner at equality
        gradients = (torch.autograd.grad(x, student)[0] for x in (mean, expected))
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@every_estimate
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), v=st.integers(1, 40), k=st.integers(1, 45), scale=st.floats(0.01, 20),
    weight=st.floats(0.01, 0.99),
)  # fmt: skip
def test_every_estimate_is_unbiased_for_any_distributions(name, seed, v, k, scale, weight):
    teacher = torch.log_softmax(random_logits(seed, v=v, scale=scale)[0], -1)
    student = random_logits(seed + 1, v=v, scale=scale)[0].requires_grad_()
    often, ids, tau = every_support(teacher.exp(), k)
    mean = often @ estimates(name, teacher, ids, tau, student, weight)
    expected = DIVERGENCES[name](*dense(teacher, student), weight)
    torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-9)
    gradients = (torch.autograd.grad(x, student)[0] for x in (mean, expected))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


@every_divergence
@every_case
def test_the_written_gradients_are_those_of_finite_differences(name, case):
    """Also where the response's own token is all that is not kept, and where it is kept."""
    teacher, student, k = HARD[case]
    teacher, free = torch.log_softmax(teacher, -1), student.isfinite()
    _, ids, tau = every_support(teacher.exp(), k)
    for label in (9, 11):

        def value(values, label=label):
            logits = torch.full_like(student, -INF).masked_scatter(free, values)
            return estimates(name, teacher, ids[:5], tau, logits, label=label)

        start = student[free].clone().requires_grad_()
        if name != "tvd" or case != "identical":
            assert torch.autograd.gradcheck(value, start, atol=1e-5)
        (gradient,) = torch.autograd.grad(value(start).sum(), start)
        assert gradient.isfinite().all()


@every_divergence
def test_every_estimate_is_zero_where_student_and_teacher_agree(name):
    teacher = torch.log_softmax(ONE, -1)
    _, ids, tau = every_support(teacher.exp(), 4)
    for label in range(12):
        found = estimates(name, teacher, ids, tau, ONE + 3, label=label)
        torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("beta", "name"), [(0, "fkl"), (1, "rkl")])
def test_jsd_is_a_kl_at_either_end(beta, name):
    teacher = torch.log_softmax(ONE, -1)
    _, ids, tau = every_support(teacher.exp(), 4)
    found, expected = (estimates(n, teacher, ids, tau, OTHER, beta) for n in ("jsd", name))
    assert torch.equal(found, expected)


def grouped(p, ids, label):
    """p [V] as outcomes: ids, the label where it is none of them, and all others."""
    alone = sorted({*ids, label})
    others = [i for i in range(len(p)) if i not in alone]
    return torch.cat([p[alone], p[others].sum()[None]])


@pytest.mark.parametrize("label", [0, 3, 11])
@every_case
def test_reverse_kl_is_that_of_the_kept_tokens_the_response_s_own_and_the_rest(case, label):
    """At most the dense value, and at least that of the plain bucket. The teacher says the label."""
    teacher, student, k = HARD[case]
    teacher = torch.log_softmax(torch.nn.functional.pad(teacher, (0, len(student) - len(teacher)), value=-INF), -1)
    if teacher[label] == -INF:
        label = int(teacher.argmax())
    _, ids, tau = every_support(teacher.exp(), k)
    found = estimates("rkl", teacher, ids, tau, student, label=label)
    t, s = teacher.exp(), torch.softmax(student, -1)
    expected = []
    for kept in ids.tolist():
        sides = [grouped(p, [i for i in kept if t[i] > 0], label) for p in (t, s)]
        sides[0][-1] = sides[0][-1].clamp_min(torch.finfo(torch.float64).tiny)
        expected.append(references.kl(sides[1], sides[0]))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-9)
    assert (found <= DIVERGENCES["rkl"](teacher, torch.log_softmax(student, -1)) + 1e-9).all()
    seen = sparse_logprobs(student.expand(len(ids), -1), ids, torch.full((len(ids),), label))
    plain = sparse_divergence("rkl", tail="bucket")(rows_of(teacher, ids, tau, label), seen)
    assert (found >= plain - 1e-9 * (1 + plain)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reverse_kl_is_the_dense_one_where_the_response_says_all_that_is_left(dtype):
    """The rest is nothing then, on both sides."""
    teacher, student = torch.log_softmax(ONE, -1).to(dtype), OTHER.to(dtype).requires_grad_()
    expected = DIVERGENCES["rkl"](teacher, torch.log_softmax(student, -1))
    gradient = torch.autograd.grad(expected, student)[0]
    _, ids, tau = every_support(teacher.double().exp(), 11)
    for kept in ids:
        (label,) = set(range(12)) - set(kept.tolist())
        found = estimates("rkl", teacher, kept[None], tau.to(dtype), student, label=label)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(found, student)[0], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", ["sampled", "bucket"])
def test_the_teacher_s_tail_is_dropped_where_the_student_says_the_kept_tokens_alone(tail):
    teacher = torch.log_softmax(ONE, -1)
    _, ids, tau = every_support(teacher.exp(), 4)
    for kept in ids:
        row, others = rows_of(teacher, kept[None], tau, kept[0]), list(set(range(12)) - set(kept.tolist()))
        student = sparse_logprobs(excluded(OTHER, others)[None], kept[None], kept[:1])
        expected = DIVERGENCES["rkl"](torch.log_softmax(teacher[kept], -1), torch.log_softmax(OTHER[kept], -1))
        torch.testing.assert_close(sparse_divergence("rkl", tail=tail)(row, student)[0], expected)


@every_divergence
@pytest.mark.parametrize("tail", TAILS)
@every_case
def test_the_other_tails_take_probabilities_and_the_exact_tail_of_sampled_tokens(name, tail, case):
    teacher, student, k = HARD[case]
    _, ids, tau = every_support(torch.softmax(teacher, -1), k)
    t, s = torch.softmax(teacher, -1).expand(len(ids), -1), torch.softmax(student, -1).expand(len(ids), -1)
    seen = sparse_logprobs(student.expand(len(ids), -1), ids, torch.zeros(len(ids), dtype=torch.long))
    row = rows_of(torch.log_softmax(teacher, -1), ids, tau)
    found = sparse_divergence(name, 0.3, tail)(row, seen)
    expected = references.sparse_divergence(name, tail, ids, t, s, 0.3, floor=torch.finfo(torch.float64).tiny)
    infinite = expected.isinf() & (found > 1e30)
    assert (infinite | ((found - expected).abs() <= 1e-7 * (1 + expected.abs()))).all()


def test_estimates_of_a_plain_top_k_are_refused():
    student = sparse_logprobs(OTHER[None], torch.tensor([[1, 2]]), torch.tensor([0]))
    teacher = TopK(torch.tensor([[1, 2]]), torch.log_softmax(ONE, -1)[None, 1:3])
    for name in DIVERGENCES:
        with pytest.raises(ValueError, match="a plain top k"):
            sparse_divergence(name, tail="sampled")(teacher, student)
    with pytest.raises(ValueError, match="the response's own"):
        sparse_divergence("rkl", tail="sampled")(teacher._replace(tau=torch.tensor([0.1])), student)


def test_the_stored_tail_of_a_plain_top_k_is_used():
    """1 - a sum of rounded values is off by as much as a peaked teacher's whole tail."""
    logits = torch.tensor([[20.0, 10.0, 0.0, 1.0, 2.0]], dtype=torch.float64)
    logprobs, ids, student = torch.log_softmax(logits, -1), torch.tensor([[0, 1]]), torch.zeros(1, 5)
    tail, seen = logprobs[:, 2:].exp().sum(-1), sparse_logprobs(student, ids, torch.tensor([0]))
    rounded = TopK(ids, logprobs[:, :2].half())
    expected = references.sparse_divergence(
        "rkl", "bucket", ids, logprobs.exp(), torch.softmax(student.double(), -1), 0.3, floor=0
    )
    found, without = (
        sparse_divergence("rkl")(teacher, seen).double() for teacher in (rounded._replace(tail=tail.float()), rounded)
    )
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    assert (without - expected).abs().item() > 0.5


EXTREME = {
    "a student that is certain of something else": (ONE, 500 * OTHER),
    "a teacher that is certain": (500 * ONE, OTHER),
    "both certain": (500 * ONE, 500 * OTHER),
    "a student that cannot say most of it": (ONE, excluded(OTHER, range(9))),
    "a student that can say one": (ONE, excluded(OTHER, range(1, 12))),
    "tokens below float32's least": (torch.tensor([0.0, -200, *[-210.0] * 10]), OTHER),
}


@every_divergence
@pytest.mark.parametrize("weight", [1e-6, 0.3, 1 - 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", EXTREME)
def test_no_value_and_no_gradient_is_nan_and_no_gradient_is_infinite(name, weight, dtype, case):
    teacher, student = (x.to(dtype) for x in EXTREME[case])
    teacher, student = torch.log_softmax(teacher, -1), student.requires_grad_()
    for k in (1, 3, 8, 12):
        places, tau = systematic(teacher.exp().expand(9, -1).clone(), k, torch.rand(9, dtype=torch.float64))
        for row_tau in (tau, tau.clamp_min(1e-3)):  # as if a token that is all but impossible had been drawn
            seen = sparse_logprobs(student.expand(9, -1), places, torch.zeros(9, dtype=torch.long))
            own = teacher[0].expand(9).masked_fill((places == 0).any(-1), -INF)
            row = TopK(places, teacher[places], row_tau, own=own)
            found = sparse_divergence(name, weight, "sampled")(row, seen)
            possible = not student.isinf().any() or name not in ("fkl", "skew_fkl")
            assert not found.isnan().any() and (not possible or found.isfinite().all())
            (gradient,) = torch.autograd.grad(found[found.isfinite()].sum(), student)
            assert gradient[student.isfinite()].isfinite().all()


class Rows:
    """A head, states, and teachers of which k tokens are drawn at each of N positions."""

    def __init__(self, n=11, v=12, teacher_v=12, k=4, dtype=torch.float64, seed=0, storage=None):
        generator = torch.Generator().manual_seed(seed)
        draws = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, 6), (v, 6), (v,)))
        self.leaves = [x.to(dtype).requires_grad_() for x in draws]
        self.labels = torch.randint(min(v, teacher_v), (n,), generator=generator)
        full = torch.log_softmax(random_logits(seed + 1, n=n, v=teacher_v), -1)
        places, tau = systematic(full.exp(), k, torch.rand(n, generator=generator, dtype=torch.float64))
        own = full.gather(-1, self.labels[:, None])[:, 0]
        self.teacher = TopK(places.int(), full.gather(-1, places).to(storage or dtype), tau.float(), own=own.float())

    @property
    def logits(self):
        states, weight, bias = self.leaves
        return states @ weight.T + bias

    def chunked(self, name, tail, chunk=3):
        states, weight, bias = self.leaves
        loss, _ = chunked_loss(
            Head(weight, bias), states, self.labels, lambda s, rows: {"kd": s.divergence, "nll": -s.logprob},
            {"kd": 1.0, "nll": 0.3}, self.teacher, sparse_divergence(name, 0.3, tail), chunk=chunk, neighbours=True,
        )  # fmt: skip
        return loss

    def whole(self, name, tail):
        """From [N, V] logits that autograd keeps, with what the head is to make of the teacher made here."""
        ids, known = self.teacher.ids, self.teacher.ids < len(self.leaves[1])
        kept = (ids == self.labels[:, None]).any(-1)
        mass = self.teacher.logprobs.exp()
        teacher = self.teacher._replace(
            logprobs=self.teacher.logprobs.masked_fill(~known, -INF), own=self.teacher.own.masked_fill(kept, -INF),
            tail=torch.where(mass < self.teacher.tau[:, None], self.teacher.tau[:, None] - mass, 0).sum(-1)
            + (mass * ~known).sum(-1),
        )  # fmt: skip
        student = sparse_logprobs(self.logits, ids, self.labels)
        return (sparse_divergence(name, 0.3, tail)(teacher, student) - 0.3 * student.label).sum()


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("teacher_v", [12, 9, 16])
@pytest.mark.parametrize("tail", ["sampled", "bucket"])
@every_divergence
def test_chunks_change_nothing(name, tail, teacher_v, chunk):
    """Also with vocabularies of different sizes: what the student does not have belongs to the tail, or is left out."""
    rows = Rows(teacher_v=teacher_v, k=6)
    assert (rows.teacher.ids >= 12).any() == (teacher_v == 16)
    loss, expected = rows.chunked(name, tail, chunk), rows.whole(name, tail)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(
        torch.autograd.grad(loss, rows.leaves), torch.autograd.grad(expected, rows.leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("teacher_v", [12, 16])
@every_divergence
def test_the_stored_tail_of_a_top_k_is_that_of_its_values(name, teacher_v):
    """Also where some of its ids belong to the tail, because the student does not have them."""
    rows = Rows(teacher_v=teacher_v, k=6)
    plain = TopK(rows.teacher.ids, rows.teacher.logprobs)
    rows.teacher = plain
    expected = rows.chunked(name, "bucket")
    rows.teacher = plain._replace(tail=1 - plain.logprobs.exp().sum(-1))
    torch.testing.assert_close(rows.chunked(name, "bucket"), expected)
    rows.teacher = plain._replace(tail=2 - plain.logprobs.exp().sum(-1))
    assert not torch.allclose(rows.chunked(name, "bucket"), expected)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 9), chunk=st.integers(1, 10), k=st.integers(1, 14), seed=st.integers(0, 1000))
def test_any_number_of_positions_in_any_chunks(n, chunk, k, seed):
    rows = Rows(n=n, k=k, seed=seed)
    torch.testing.assert_close(rows.chunked("rkl", "sampled", chunk), rows.whole("rkl", "sampled"))


@every_divergence
def test_a_position_whose_tokens_the_student_lacks_teaches_nothing(name):
    rows = Rows()
    place, ids = torch.arange(11), rows.teacher.ids.clone()
    silent, ids[place % 3 == 0] = place % 3 == 0, 12 + torch.arange(4, dtype=torch.int32)
    rows.teacher = rows.teacher._replace(ids=ids)
    states, weight, bias = rows.leaves
    divergence = sparse_divergence(name, 0.3, "sampled")
    found = token_scores(Head(weight, bias), states, rows.labels, rows.teacher, divergence, 4).divergence
    assert found.isfinite().all() and (found[silent] == 0).all() and (found[~silent] != 0).all()
    loss, _ = chunked_loss(
        Head(weight, bias), states, rows.labels, lambda s, rows: {"kd": s.divergence}, {"kd": 1.0}, rows.teacher,
        divergence, chunk=4,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, rows.leaves)
    assert all(gradient.isfinite().all() for gradient in gradients) and (gradients[0][silent] == 0).all()


@every_estimate
def test_of_tokens_that_the_student_lacks_the_others_stand_for_all(name):
    teacher = torch.log_softmax(ONE, -1)
    _, ids, tau = every_support(teacher.exp(), 5)
    logprobs = teacher[ids].masked_fill(ids >= 9, -INF)
    w = weighted(teacher[ids], tau.expand(len(ids)))[1] * (ids < 9)
    w = w / w.sum(-1, keepdim=True)
    student = sparse_logprobs(OTHER[:9].expand(len(ids), -1), ids, torch.zeros(len(ids), dtype=torch.long))
    found = sparse_divergence(name, 0.3, "sampled")(TopK(ids, logprobs, tau.expand(len(ids))), student)
    log_ratio = torch.where(ids < 9, student.inside - teacher[ids], 0)
    torch.testing.assert_close(found, (w * SUMMANDS[name](log_ratio, 0.3)[0]).sum(-1))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
@every_divergence
def test_rows_that_are_stored_in_half_precision_lose_only_that(name, storage):
    exact, rounded = Rows(n=200, dtype=torch.float32), Rows(n=200, dtype=torch.float32, storage=storage)
    found, expected = rounded.chunked(name, "sampled", 64), exact.chunked(name, "sampled", 64)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-3 if storage == torch.float16 else 2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_divergence
def test_half_precision_heads_compute_in_float32(name, dtype):
    rows, exact = Rows(dtype=dtype, storage=torch.float16), Rows(storage=torch.float16)
    loss = rows.chunked(name, "sampled")
    exact.leaves = [x.detach().double().requires_grad_() for x in rows.leaves]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact.chunked(name, "sampled"), rtol=0.02, atol=0.02)
    gradients = torch.autograd.grad(loss, rows.leaves)
    assert all(g.isfinite().all() and g.dtype == dtype for g in gradients)

"""What holds for the head: chunks change nothing, gradients are exact, [N, V] is never kept."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.objectives.avril import gaussian_nll, td_residual
from pipeline.objectives.divergences import DIVERGENCES
from pipeline.objectives.head import Head, Scores, chunk_rows, chunked_loss, token_scores
from pipeline.objectives.logprobs import TopK
from pipeline.objectives.outcomes import shared
from pipeline.objectives.sparse import sparse_divergence
from tests import references
from tests.references import FINITE, random_logits, sparse_logprobs, top_k

WEIGHTS = {"kd": 1.0, "nll": 0.3, "td": 0.7}


class Case:
    """A head, states, a sparse teacher, and a loss with every kind of term: own, of the next step, with inputs."""

    def __init__(self, n=11, hidden=6, v=12, k=4, dtype=torch.float64, seed=0, teacher_v=None, bias=None):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        self.states, self.weight, self.bias = draw(n, hidden), draw(v, hidden), draw(v)
        if bias is not None:
            self.bias = bias.to(dtype).requires_grad_()
        self.mu, self.log_sigma = draw(n), draw(n)
        self.labels = torch.randint(v, (n,), generator=generator)
        ids, logprobs = top_k(random_logits(seed, n=n, v=teacher_v or v), k)
        self.teacher = TopK(ids.int(), logprobs.to(dtype))
        self.kept = torch.rand(n, generator=generator) > 0.2
        self.followed = torch.rand(n, generator=generator) > 0.3

    def terms(self, scores, rows, mu, log_sigma):
        q = scores.logprob + scores.lse
        delta = td_residual(q, scores.lse, self.followed[rows], self.kept[rows], 0.9, "sarsa")
        td = torch.where(self.kept[rows], gaussian_nll(delta, mu, log_sigma), 0)
        return {"kd": scores.divergence, "nll": -scores.logprob, "td": td, "unweighted": scores.lse}

    @property
    def leaves(self):
        return [self.states, self.weight, self.bias, self.mu, self.log_sigma]

    def whole(self, name, tail="bucket"):
        """Loss and sums from [N, V] logits that autograd keeps."""
        logits = self.states @ self.weight.T + self.bias
        student = sparse_logprobs(logits, self.teacher.ids, self.labels)
        logprobs = self.teacher.logprobs.masked_fill(self.teacher.ids >= len(self.weight), -math.inf)
        divergence = sparse_divergence(name, 0.3, tail)(self.teacher._replace(logprobs=logprobs), student)
        scores = Scores(student.label, student.lse, divergence)
        values = self.terms(scores, slice(None), self.mu, self.log_sigma)
        return sum(WEIGHTS[n] * values[n].sum() for n in WEIGHTS), {n: v.sum().detach() for n, v in values.items()}

    def chunked(self, name, tail="bucket", chunk=3):
        return chunked_loss(
            Head(self.weight, self.bias), self.states, self.labels, self.terms, WEIGHTS, self.teacher,
            sparse_divergence(name, 0.3, tail), (self.mu, self.log_sigma), chunk, neighbours=True,
        )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 11, 100])
@pytest.mark.parametrize(("name", "tail"), FINITE)
def test_chunks_do_not_change_the_loss_its_sums_or_any_gradient(name, tail, chunk):
    case = Case()
    loss, sums = case.chunked(name, tail, chunk)
    expected, expected_sums = case.whole(name, tail)
    torch.testing.assert_close(loss, expected)
    assert sums.keys() == expected_sums.keys()
    for term in sums:
        torch.testing.assert_close(sums[term], expected_sums[term])
    found = torch.autograd.grad(3 * loss, case.leaves)
    for one, other in zip(found, torch.autograd.grad(3 * expected, case.leaves), strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), chunk=st.integers(1, 10), k=st.integers(1, 12), seed=st.integers(0, 1000))
def test_any_size_in_any_chunks(n, chunk, k, seed):
    case = Case(n=n, k=k, seed=seed)
    (loss, _), (expected, _) = case.chunked("jsd", chunk=chunk), case.whole("jsd")
    torch.testing.assert_close(loss, expected)
    for one, other in zip(
        torch.autograd.grad(loss, case.leaves), torch.autograd.grad(expected, case.leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_written_gradient_passes_gradcheck(name):
    case = Case(n=4, hidden=3, v=7, k=3)

    def loss(states, weight, bias, mu, log_sigma):
        case.states, case.weight, case.bias, case.mu, case.log_sigma = states, weight, bias, mu, log_sigma
        return case.chunked(name, chunk=2)[0]

    assert torch.autograd.gradcheck(loss, case.leaves, atol=1e-6)


@pytest.mark.parametrize("teacher_v", [8, 16])
def test_vocabularies_that_are_padded_to_different_sizes(teacher_v):
    case = Case(teacher_v=teacher_v, k=6)
    assert (case.teacher.ids >= 12).any() == (teacher_v == 16)
    (loss, _), (expected, _) = case.chunked("fkl"), case.whole("fkl")
    torch.testing.assert_close(loss, expected)
    for one, other in zip(
        torch.autograd.grad(loss, case.leaves), torch.autograd.grad(expected, case.leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.01, 0.3, 0.99])
@pytest.mark.parametrize(("name", "tail"), FINITE)
def test_a_position_whose_teacher_ids_the_student_lacks_teaches_nothing(name, tail, weight, dtype):
    """All ids beyond the student's vocabulary at positions 0, 3, ..., one of them at 1, 4, ...: finite everywhere."""
    case = Case(dtype=dtype)
    beyond = 12 + torch.arange(4, dtype=torch.int32)
    ids, place = case.teacher.ids.clone(), torch.arange(11)
    ids[place % 3 == 0] = beyond
    ids[place % 3 == 1, 0] = beyond[0]
    states, silent = case.states.detach().requires_grad_(), place % 3 == 0
    divergence, teacher = sparse_divergence(name, weight, tail), TopK(ids, case.teacher.logprobs)
    found = token_scores(Head(case.weight, case.bias), states, case.labels, teacher, divergence, 4).divergence
    assert found.isfinite().all() and (found[silent] == 0).all() and (found[~silent] != 0).all()
    loss, _ = chunked_loss(
        Head(case.weight, case.bias), states, case.labels, lambda s, rows: {"kd": s.divergence}, {"kd": 1.0},
        teacher, divergence, chunk=4,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, [states, case.weight, case.bias])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][silent] == 0).all() and (gradients[0][~silent].abs().amax(-1) > 0).all()


def test_impossible_tokens_give_finite_gradients():
    """Logits of -inf (a head that forbids tokens), also where all that is left is the teacher's k."""
    bias = torch.zeros(12, dtype=torch.float64)
    bias[4:] = -math.inf
    case = Case(bias=bias)
    case.teacher = TopK(torch.arange(4).expand(11, 4), torch.log_softmax(random_logits(0, n=11, v=4), -1))
    case.labels = case.labels % 4
    (loss, _), (expected, _) = case.chunked("fkl"), case.whole("fkl")
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, case.leaves)
    assert all(gradient.isfinite().all() for gradient in found)
    assert (found[1][4:] == 0).all()


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("teacher_v", [12, 9, 16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_over_the_whole_vocabulary_is_exact_in_chunks(name, teacher_v, chunk):
    """Beside terms of the next step and with inputs; over the ids that both have, each side renormalised there."""
    case, of_teacher = Case(), random_logits(5, n=11, v=teacher_v)
    seen = []

    def dense(logits, rows):
        seen.append(logits.shape)
        return DIVERGENCES[name](*shared(of_teacher[rows], logits), 0.3)

    loss, sums = chunked_loss(
        Head(case.weight, case.bias), case.states, case.labels, case.terms, WEIGHTS,
        inputs=(case.mu, case.log_sigma), chunk=chunk, neighbours=True, dense=dense,
    )  # fmt: skip
    logits = case.states @ case.weight.T + case.bias
    both = (torch.softmax(x[:, : min(12, teacher_v)], -1) for x in (of_teacher, logits))
    logprobs = torch.log_softmax(logits, -1).gather(-1, case.labels[:, None])[:, 0]
    scores = Scores(logprobs, torch.logsumexp(logits, -1), references.divergence(name, *both, 0.3))
    values = case.terms(scores, slice(None), case.mu, case.log_sigma)
    expected = sum(WEIGHTS[term] * values[term].sum() for term in WEIGHTS)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert all(torch.allclose(sums[term], values[term].sum(), rtol=1e-10) for term in values)
    assert max(shape[0] for shape in seen) <= chunk + 2
    first, second = (torch.autograd.grad(loss, case.leaves, retain_graph=True) for _ in range(2))
    for one, again, other in zip(first, second, torch.autograd.grad(expected, case.leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(again, other, rtol=1e-10, atol=1e-10)


def test_no_positions_at_all_give_zero_and_zero_gradients():
    case = Case(n=0)
    loss, sums = case.chunked("fkl")
    assert loss == 0 and all(value == 0 for value in sums.values())
    loss.backward()
    assert (case.weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_compute_in_float32_and_get_gradients_of_their_type(dtype):
    case, exact = Case(dtype=dtype), Case(dtype=dtype)
    case.mu, case.log_sigma = case.mu.detach().float(), case.log_sigma.detach().float()
    loss, sums = case.chunked("fkl")
    assert loss.dtype == torch.float32 and sums["kd"].dtype == torch.float32
    loss.backward()
    assert case.states.grad.dtype == case.weight.grad.dtype == case.bias.grad.dtype == dtype
    for name in ("states", "weight", "bias", "mu", "log_sigma"):
        setattr(exact, name, getattr(exact, name).detach().double().requires_grad_())
    exact.teacher = TopK(exact.teacher.ids, exact.teacher.logprobs.double())
    expected, _ = exact.whole("fkl")
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(case.weight.grad.double(), exact.weight.grad, rtol=0.1, atol=0.1)


def test_a_frozen_head_gets_no_gradient_and_the_states_do():
    case = Case()
    case.weight, case.bias = case.weight.detach(), case.bias.detach()
    loss, _ = case.chunked("fkl")
    loss.backward()
    assert case.states.grad is not None and case.weight.grad is None


def test_without_a_teacher_it_is_cross_entropy():
    case = Case()
    loss, _ = chunked_loss(
        Head(case.weight, case.bias),
        case.states,
        case.labels,
        lambda s, rows: {"nll": -s.logprob},
        {"nll": 1.0},
        chunk=4,
    )
    expected = torch.nn.functional.cross_entropy(case.states @ case.weight.T + case.bias, case.labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, case.weight), torch.autograd.grad(expected, case.weight))


def test_token_scores_are_those_of_the_whole_vocabulary():
    case = Case()
    scores = token_scores(
        Head(case.weight, case.bias), case.states, case.labels, case.teacher, sparse_divergence("fkl"), chunk=4
    )
    logits = case.states @ case.weight.T + case.bias
    expected = torch.log_softmax(logits, -1).gather(-1, case.labels[:, None])[:, 0]
    torch.testing.assert_close(scores.logprob, expected.detach())
    torch.testing.assert_close(scores.lse, torch.logsumexp(logits, -1).detach())
    assert not scores.divergence.requires_grad and (scores.divergence > 0).all()


def test_a_graph_that_is_kept_gives_the_same_gradient_again_and_leaves_the_first_alone():
    case = Case()
    loss, _ = case.chunked("fkl")
    first = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(2 * loss, case.leaves)
    for one, copy, other in zip(first, kept, second, strict=True):
        torch.testing.assert_close(one, copy)
        torch.testing.assert_close(2 * one, other)


def test_a_chunk_is_bounded_in_bytes_and_never_tiny():
    assert [chunk_rows(v) for v in (100, 50_000, 10**7)] == [320, 320, 64]

"""What holds for sampled supports: exactly k tokens, unbiased, reproducible, and narrowed without bias."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.objectives import supports
from pipeline.objectives.supports import narrowed, offsets, systematic, tail_mass, top_place, weighted
from tests.references import every_support, random_logits

INF = math.inf
# name -> probabilities [V], k
SHAPES = {
    "random": (torch.softmax(random_logits(0, v=40)[0], 0), 8),
    "k is one": (torch.softmax(random_logits(0)[0], 0), 1),
    "k is all but one": (torch.softmax(random_logits(0)[0], 0), 11),
    "k is the vocabulary": (torch.softmax(random_logits(0)[0], 0), 12),
    "k is more": (torch.softmax(random_logits(0)[0], 0), 20),
    "uniform": (torch.full((30,), 1 / 30, dtype=torch.float64), 7),
    "a grid that ends on every token": (torch.full((32,), 1 / 32).double(), 8),
    "ties at tau": (torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64), 5),
    "peaked": (torch.softmax(random_logits(0, v=40, scale=12)[0], 0), 8),
    "one-hot": (torch.eye(12, dtype=torch.float64)[3], 4),
    "less than k tokens of any mass": (torch.tensor([0.5, 0, 0.25, 0, 0, 0.25, 0, 0, 0]).double(), 5),
    "just k tokens of any mass": (torch.tensor([0.5, 0, 0.25, 0, 0, 0.25, 0, 0, 0]).double(), 3),
    "more than a block": (torch.softmax(random_logits(0, v=1000, scale=1)[0], 0), 16),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def grid(count: int) -> torch.Tensor:
    """Offsets in the middle of as many equal parts of [0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def draw(p: torch.Tensor, k: int, offset: torch.Tensor) -> supports.Support:
    """Supports of p [V], one for each offset."""
    return systematic(p.expand(len(offset), -1).clone(), k, offset)


@every_shape
def test_tokens_are_those_of_the_rule(shape):
    """Against every support that there is, which are found from the rule token by token."""
    p, k = SHAPES[shape]
    often, ids, tau = every_support(p, k)
    assert often.sum().item() == pytest.approx(1)
    middles = often.cumsum(0) - often / 2
    found = draw(p, k, middles)
    if tau > 0:
        torch.testing.assert_close(found.places.sort(-1).values[often > 1e-9], ids[often > 1e-9])
    torch.testing.assert_close(found.tau, tau.expand(len(often)), rtol=1e-12, atol=0)


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k_distinct_tokens_the_likeliest_first_whose_weights_sum_to_one(shape, dtype):
    p, k = SHAPES[shape]
    places, tau = draw(p.to(dtype), k, grid(100))
    assert places.shape == (100, min(k, len(p)))
    assert (places.sort(-1).values.diff() > 0).all()
    logprobs = p.to(dtype).log()[places]
    assert (logprobs[:, 1:] <= logprobs[:, :-1]).all() and tau.dtype == dtype
    _, w = weighted(logprobs, tau)
    torch.testing.assert_close(w.sum(-1), torch.ones(100, dtype=dtype), atol=1e-5, rtol=0)
    assert (w >= p.to(dtype)[places] * (1 - 1e-5)).all()


@every_shape
def test_the_mean_weight_of_a_token_is_its_probability(shape):
    p, k = SHAPES[shape]
    often, ids, tau = every_support(p, k)
    _, w = weighted(p.log()[ids], tau.expand(len(ids)))
    mean = torch.zeros_like(p).index_add_(0, ids.flatten(), (often[:, None] * w).flatten())
    torch.testing.assert_close(mean, p, atol=1e-12, rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), v=st.integers(1, 700), k=st.integers(1, 40), scale=st.floats(0, 40),
    banned=st.floats(0, 0.99),
)  # fmt: skip
def test_any_distribution_gives_k_distinct_tokens_that_sum_to_one(seed, v, k, scale, banned):
    generator = torch.Generator().manual_seed(seed)
    logits = random_logits(seed, n=8, v=v, scale=scale)
    logits[:, 1:][torch.rand(8, v - 1, generator=generator) < banned] = -INF
    logprobs = torch.log_softmax(logits.float(), -1)
    places, tau = systematic(logprobs.exp(), k, torch.rand(8, generator=generator, dtype=torch.float64))
    assert places.shape == (8, min(k, v)) and (places.sort(-1).values.diff() > 0).all()
    kept = logprobs.gather(-1, places)
    assert (kept.exp()[:, 1:] <= kept.exp()[:, :-1]).all()
    _, w = weighted(kept, tau)
    torch.testing.assert_close(w.sum(-1), torch.ones(8), atol=1e-5, rtol=0)
    least = (logprobs > math.log(1e-37)).sum(-1) <= k  # all that have any mass are kept
    exact = kept.exp().sum(-1)[least]
    torch.testing.assert_close(exact, torch.ones_like(exact), atol=1e-5, rtol=0)


def test_the_likeliest_may_be_given():
    p = torch.softmax(random_logits(0, n=50, v=600, scale=2).float(), -1)
    offset = torch.rand(50, dtype=torch.float64)
    found, again = systematic(p.clone(), 16, offset), systematic(p.clone(), 16, offset, p.topk(16))
    assert torch.equal(found.places, again.places) and torch.equal(found.tau, again.tau)


def test_a_position_does_not_depend_on_the_batch_it_is_in():
    logits = random_logits(0, n=40, v=3000, scale=2).float()
    tokens, order = torch.arange(40), torch.randperm(40, generator=torch.Generator().manual_seed(0))

    def kept(rows):
        logprobs = torch.log_softmax(logits[rows], -1)
        lse = logits[rows].logsumexp(-1)
        top = logprobs.topk(16)
        offset = offsets(16, tokens[rows], top_place(*top), lse)
        return offset, *systematic(logprobs.exp(), 16, offset)

    together, turned = kept(slice(None)), kept(order)
    alone = [torch.cat(values) for values in zip(*(kept(slice(n, n + 1)) for n in range(40)), strict=True)]
    for one, other, single in zip(together, turned, alone, strict=True):
        assert torch.equal(one[order], other) and torch.equal(one, single)


def uniform(x: torch.Tensor) -> bool:
    """Kolmogorov and Smirnov's test at about 1e-6."""
    x = x.sort().values
    return bool((x - (torch.arange(len(x)) + 0.5) / len(x)).abs().max() < 2.7 / len(x) ** 0.5)


def test_offsets_are_uniform_and_independent_in_everything_they_are_made_of():
    count = 20_000
    many, one = torch.arange(count), torch.ones(count, dtype=torch.long)
    values, flat = 10 * torch.rand(count, generator=torch.Generator().manual_seed(0)), torch.ones(count)
    found = {
        "tokens": offsets(16, many, one, flat), "top": offsets(16, one, many, flat),
        "values": offsets(16, one, one, values), "all": offsets(16, many, many, values),
        "all, k = 8": offsets(8, many, many, values), "all, k = 17": offsets(17, many, many, values),
    }  # fmt: skip
    for name, offset in found.items():
        assert ((offset >= 0) & (offset < 1)).all() and uniform(offset), name
        assert uniform((offset[1:] - offset[:-1]) % 1), name
    for other in ("all, k = 8", "all, k = 17", "tokens"):
        assert uniform((found["all"] - found[other]) % 1), other
    half = offsets(16, many, many, values.half()), offsets(16, many, many, values.half().float())
    assert torch.equal(*half)


def test_the_first_of_the_likeliest_tokens_is_the_top_one():
    p = torch.tensor([[0.1, 0.4, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25]])
    for places in (torch.tensor([[1, 3], [2, 0]]), torch.tensor([[3, 1], [0, 2]])):
        assert top_place(p.gather(-1, places), places).tolist() == [1, 0]


@pytest.mark.parametrize("shape", ["random", "uniform", "peaked", "a grid that ends on every token"])
def test_a_narrowed_row_is_unbiased_too(monkeypatch, shape):
    """Over all supports of the wide row and offsets of the narrow one; k distinct tokens whose weights sum to 1."""
    p, wide = SHAPES[shape]
    often, ids, tau = every_support(p, wide)
    offset, narrow = grid(2000), 3
    monkeypatch.setattr(supports, "offsets", lambda k, tokens, top, values: offset[: len(values)])
    mean = torch.zeros_like(p)
    for share, kept in zip(often, ids, strict=True):
        kept = kept[p[kept].argsort(descending=True, stable=True)].expand(len(offset), -1)
        logprobs, tokens = p.log()[kept], torch.zeros(len(offset))
        places, step = narrowed(kept, logprobs, tau.expand(len(offset)), narrow, tokens, tokens)
        assert (places.diff() > 0).all() and (step >= tau).all()
        kept = kept.gather(-1, places)
        _, w = weighted(p.log()[kept], step)
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w[:, 0]), atol=1e-9, rtol=0)
        mean.index_add_(0, kept.flatten(), share / len(offset) * w.flatten())
    torch.testing.assert_close(mean, p, atol=1e-3, rtol=0)


def test_a_row_is_narrowed_alike_in_any_batch_and_any_order_of_equal_tokens():
    logprobs = torch.log_softmax(random_logits(0, n=30, v=200, scale=1).float(), -1)
    drawn = systematic(logprobs.exp(), 16, torch.rand(30, dtype=torch.float64))
    kept, tokens, lse = logprobs.gather(-1, drawn.places).half(), torch.arange(30), torch.rand(30)
    whole = narrowed(drawn.places, kept, drawn.tau, 4, tokens, lse)
    for n in range(30):
        alone = narrowed(*(x[n : n + 1] for x in (drawn.places, kept, drawn.tau)), 4, tokens[n : n + 1], lse[n : n + 1])
        assert torch.equal(alone.places, whole.places[n : n + 1]) and alone.tau == whole.tau[n]


@every_shape
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_rounded_rows_sum_to_one(shape, dtype):
    """What they sum to by themselves errs by the precision of the type."""
    p, k = SHAPES[shape]
    places, tau = draw(p.float(), k, grid(50))
    logprobs, w = weighted(p.float().log()[places].to(dtype), tau)
    assert logprobs.dtype == w.dtype == torch.float32
    near = 0.05 if dtype == torch.bfloat16 else 5e-3
    torch.testing.assert_close(w, weighted(p.float().log()[places], tau)[1], atol=1e-7, rtol=near)
    has_certain = (logprobs.exp() > tau[:, None]).any(-1)
    torch.testing.assert_close(w.sum(-1)[has_certain], torch.ones(int(has_certain.sum())), atol=1e-5, rtol=0)


def test_tokens_that_a_reader_does_not_have_weigh_nothing_and_the_others_stand_for_all():
    p, k = SHAPES["random"]
    places, tau = draw(p, k, grid(20))
    logprobs = p.log()[places]
    w, unknown = weighted(logprobs, tau)[1], places % 3 == 0
    found = weighted(logprobs.masked_fill(unknown, -INF), tau)[1]
    expected = torch.where(unknown, 0, w)
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))
    assert (weighted(torch.full((1, 4), -INF), torch.tensor([0.1]))[1] == 0).all()


@every_shape
def test_the_tail_is_the_mass_of_all_other_tokens(shape):
    """In float32 too, and with the precision of the tail where that is far below 1."""
    p, k = SHAPES[shape]
    places, tau = draw(p, k, grid(50))
    expected = p.expand(50, -1).scatter(-1, places, 0).sum(-1)
    torch.testing.assert_close(tail_mass(p.log()[places], tau), expected, rtol=1e-9, atol=1e-15)
    found = tail_mass(p.log()[places].float(), tau.float())
    allowed = 1e-5 * k * tau + 1e-30
    assert ((found - expected).abs() <= allowed).all() and found.dtype == torch.float32

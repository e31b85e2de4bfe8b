"""What holds for what engines keep of their logits: the numbers of float64, whatever is computed beside them."""

import numpy as np
import pytest
import torch

from pipeline.engines.kept import Kept, kept
from pipeline.objectives.supports import offsets, systematic

SIZES = [(44, 5), (1000, 3), (5000, 16)]  # few ids, and enough to find the likeliest by blocks, with a rest and without


def make_logits(size: int, count: int = 60, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat and peaked positions, and the response's tokens."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(count, size, generator=generator) * torch.linspace(0.1, 2 * scale, count)[:, None]
    return logits + 20, torch.randint(0, size, (count,), generator=generator)


def assert_is_the_support_of(found: Kept, logits: torch.Tensor, tokens: torch.Tensor, k: int, support: str) -> None:
    """The oracle: float64 over all of logits [N, V]; the offset is that of the row's own lse."""
    exact = logits.double().log_softmax(-1)
    places = found.ids.long()
    np.testing.assert_allclose(found.lse, logits.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.logprobs, exact.gather(-1, tokens[:, None]).squeeze(-1), atol=1e-5)
    np.testing.assert_allclose(found.values, exact.gather(-1, places), atol=1e-5)
    assert (found.values.diff(dim=-1) <= 0).all()
    assert all(column.dtype == torch.float32 for column in found if column is not found.ids)
    assert found.ids.dtype == torch.int32
    if support == "topk":
        np.testing.assert_array_equal(places, logits.topk(k).indices)
        outside = exact.exp().scatter(-1, places, 0).sum(-1)
        np.testing.assert_allclose(found.rest, outside, rtol=1e-5, atol=1e-30)
    else:
        expected = systematic(exact.exp(), k, offsets(k, tokens, logits.argmax(-1), found.lse))
        np.testing.assert_array_equal(places, expected.places)
        np.testing.assert_allclose(found.rest, expected.tau, rtol=1e-5)


@pytest.mark.parametrize("size, k", SIZES)
@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_what_is_kept_is_what_float64_keeps(size, k, support):
    logits, tokens = make_logits(size)
    before = logits.clone()
    assert_is_the_support_of(kept(logits, tokens, k, support), logits, tokens, k, support)
    assert (logits == before).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_logits_of_half_precision_are_read_in_float32(dtype, support):
    """And nothing is lost of what they say: equal to those of their float32 copy."""
    logits, tokens = make_logits(5000)
    half = logits.to(dtype)
    for ours, wide in zip(kept(half, tokens, 16, support), kept(half.float(), tokens, 16, support), strict=True):
        assert ours.dtype == wide.dtype and (ours == wide).all()


@pytest.mark.parametrize("size, k", SIZES)
@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_a_row_depends_on_nothing_but_itself(size, k, support, monkeypatch):
    """Alone, backwards and cut into any pieces: equal in every bit, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        logits, tokens = make_logits(size)
        whole = kept(logits, tokens, k, support, size - 4)
        backwards = kept(logits.flip(0), tokens.flip(0), k, support, size - 4)
        monkeypatch.setattr("pipeline.engines.kept._BYTES", 2**18)
        pieces = kept(logits, tokens, k, support, size - 4)
        rows = [kept(logits[i : i + 1], tokens[i : i + 1], k, support, size - 4) for i in range(len(logits))]
    finally:
        torch.set_num_threads(threads)
    for column, back, cut, *alone in zip(whole, backwards, pieces, *rows, strict=True):
        assert (back.flip(0) == column).all() and (cut == column).all() and (torch.cat(alone) == column).all()


def test_the_mass_outside_a_top_k_of_a_peaked_position_is_exact():
    """1 - mass would be 0 or noise."""
    logits = torch.tensor([[40.0, 10.0, 1.0, 0.0]])
    (tail,) = kept(logits, torch.tensor([0]), 1, "topk").rest.tolist()
    assert tail == pytest.approx(np.exp(-30) + np.exp(-39) + np.exp(-40), rel=1e-5)


@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_the_likeliest_token_of_a_peaked_position_keeps_its_log_probability(support):
    """Near 40 floats are 4e-6 apart, so a difference to the normaliser would be 0."""
    found = kept(torch.tensor([[40.0, 26.5, 1.0]]), torch.tensor([0]), 1, support)
    assert found.logprobs.item() == pytest.approx(-np.exp(-13.5), rel=0.05)
    assert found.values[0, 0] == found.logprobs[0]


def test_slots_that_no_mass_is_left_for_go_to_tokens_in_rank_order():
    """Their probabilities are 0 in float32, their log-probabilities are not."""
    logits = torch.linspace(-150, -300, 44)[None].flip(-1)
    logits[0, 7] = 0.0
    found = kept(logits, torch.tensor([7]), 5, "sampled")
    assert found.ids[0, 0] == 7 and found.rest == 0
    assert (found.values.diff() < 0).all() and found.values.isfinite().all()


@pytest.mark.parametrize("size, k", SIZES)
def test_without_a_token_the_normaliser_is_the_real_one_and_all_mass_is_outside(size, k):
    logits, tokens = make_logits(size)
    none, some = kept(logits, tokens, 0, "topk"), kept(logits, tokens, k, "topk")
    assert none.ids.shape == none.values.shape == (60, 0)
    assert (none.rest == 1).all()
    np.testing.assert_allclose(none.lse, some.lse, rtol=1e-6)
    np.testing.assert_allclose(none.logprobs, some.logprobs, atol=1e-5)


@pytest.mark.parametrize("support, rest", [("topk", 0), ("sampled", 0)])
def test_a_support_of_more_tokens_than_there_are_is_all_of_them(support, rest):
    logits, tokens = make_logits(44)
    found = kept(logits, tokens, 50, support)
    assert found.ids.shape == (60, 44) and (found.rest == rest).all()
    np.testing.assert_allclose(found.values.exp().sum(-1), 1, atol=1e-5)
    if support == "sampled":
        assert kept(logits, tokens, 50, support, 40).ids.shape == (60, 40)


@pytest.mark.parametrize("size, k", SIZES)
def test_ids_of_padding_are_out_of_a_sampled_support_before_everything_else(size, k):
    real = size - 9
    logits, tokens = make_logits(size)
    logits[::2, real:] -= 30
    found = kept(logits, tokens % real, k, "sampled", real)
    assert_is_the_support_of(found, logits[:, :real], tokens % real, k, "sampled")
    np.testing.assert_allclose(found.values.exp().maximum(found.rest[:, None]).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(found.dropped, logits.double().softmax(-1)[:, real:].sum(-1), rtol=1e-4, atol=1e-30)
    one = kept(logits, torch.full_like(tokens, real), k, "sampled", real)  # a response's own token can be one
    np.testing.assert_allclose(one.logprobs, logits[:, real] - one.lse, atol=1e-5)


def test_a_top_k_leaves_no_id_out():
    logits, tokens = make_logits(44)
    for ours, plain in zip(kept(logits, tokens, 5, "topk", 40), kept(logits, tokens, 5, "topk"), strict=True):
        assert (ours == plain).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("support", ["topk", "sampled"])
@pytest.mark.parametrize("size, k", SIZES)
def test_logits_that_are_no_numbers_spoil_their_own_row_alone(size, k, support, bad):
    logits, tokens = make_logits(size, 8)
    plain = kept(logits, tokens, k, support, size - 4)
    logits[1, 3], logits[2], logits[3, -2], logits[4, 2:] = bad, bad, bad, bad
    found = kept(logits, tokens, k, support, size - 4)
    assert ((found.ids >= 0) & (found.ids < size)).all()
    assert not found.lse[2].isfinite()
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours[[0, 5, 6, 7]] == theirs[[0, 5, 6, 7]]).all()


def test_no_position_is_no_error_and_the_answer_says_which_support_it_is():
    logits, tokens = make_logits(44)
    response = np.empty(0, np.int32)
    drawn = kept(logits[:0], tokens[:0], 5, "sampled").answer("a", response, "length", "sampled")
    plain = kept(logits[:0], tokens[:0], 5, "topk").answer("a", response, "length", "topk")
    assert drawn.tail is plain.tau is None
    assert drawn.tau.dtype == plain.tail.dtype == np.float32 and len(drawn.tau) == len(plain.tail) == 0
    assert drawn.topk_ids.shape == drawn.topk_logprobs.shape == (0, 5) and drawn.dropped == 0

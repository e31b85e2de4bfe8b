"""What holds for rows that are wanted with fewer tokens than they have: no bias, no other values, whatever is empty."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.objectives.supports import offsets, systematic, weighted
from pipeline.store.checks import RowCheck
from pipeline.store.identity import score_key
from pipeline.store.narrowing import holds_top, narrowed
from pipeline.store.schema import Row, from_table, row_digest, to_table

VOCABULARY = 60


def distributions(steps: int, sharp: float, seed: int = 0) -> np.ndarray:
    """Float64 [T, V]."""
    logits = np.random.default_rng(seed).standard_normal((steps, VOCABULARY)) * sharp
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def row_of(p: np.ndarray, k: int, support: str, lse: bool = True) -> Row:
    """What an engine keeps of distributions [T, V]; a scored response of their likeliest tokens."""
    steps = len(p)
    mass, response = torch.from_numpy(p), np.full(steps, 3, np.int32)
    normalisers = np.random.default_rng(1).random(steps).astype(np.float32)
    top = mass.topk(k, -1)
    if support == "sampled":
        values = torch.from_numpy(normalisers) if lse else top.values[:, 0].log().half()
        offset = offsets(k, torch.from_numpy(response), top.indices[:, 0], values)
        places, tau = systematic(mass.clone(), k, offset)
        kept = {"tau": tau.numpy().astype(np.float32)}
    else:
        places = top.indices
        kept = {"tail": (1 - top.values.sum(-1)).numpy().astype(np.float32)}
    ids = places.numpy().astype(np.int32)
    prompt = np.arange(4, dtype=np.int32)
    return Row(
        score_key(prompt, response), "teacher", "p", 0, "a", "b", prompt, response, "stop",
        np.log(p[:, 3]).astype(np.float32), ids, np.log(np.take_along_axis(p, places.numpy(), 1)).astype(np.float16),
        normalisers if lse else None, **kept,
    )  # fmt: skip


def fault(row: Row, support: str, k: int) -> str | None:
    return RowCheck({"kind": "score"}, "", k, VOCABULARY, support).fault(row)


@pytest.mark.parametrize("support", ["sampled", "topk"])
@pytest.mark.parametrize("lse", [True, False])
@pytest.mark.parametrize("sharp", [0.5, 2, 6])
def test_a_narrowed_row_is_one_that_a_teacher_can_have_said(support, lse, sharp):
    row = row_of(distributions(40, sharp), 16, support, lse)
    assert fault(row, support, 16) is None and narrowed(row, 16, support) is row
    for k in (8, 1, 0):
        less = narrowed(row, k, support)
        assert less.k == k and fault(less, support if k else "topk", k) is None
        assert row_digest(less) == row_digest(narrowed(row, k, support))
        for ids, values, of, had in zip(
            less.topk_ids, less.topk_logprobs, row.topk_ids, row.topk_logprobs, strict=True
        ):
            known = dict(zip(of.tolist(), had.tolist(), strict=True))
            assert [known[token] for token in ids.tolist()] == values.tolist()
        if support == "sampled" and k:
            assert (less.tau >= row.tau).all()


def test_a_row_that_is_drawn_twice_is_an_unbiased_picture_of_the_teacher():
    """One distribution at 20,000 positions that differ in their normalisers; with one offset it would be far off."""
    p = distributions(1, 1.5)
    steps = 20_000
    row = narrowed(row_of(np.repeat(p, steps, 0), 16, "sampled"), 6, "sampled")
    _, weights = weighted(torch.from_numpy(row.topk_logprobs.astype(np.float64)), torch.from_numpy(row.tau))
    found = np.zeros(VOCABULARY)
    np.add.at(found, row.topk_ids.ravel(), weights.numpy().ravel() / steps)
    assert np.abs(found - p[0]).max() < 4 * np.sqrt(p.max() * row.tau.max() / steps) + 1e-4


def test_the_tail_of_a_narrowed_top_k_is_what_was_cut_and_what_was_outside():
    p = distributions(30, 2)
    row = row_of(p, 16, "topk")
    np.testing.assert_allclose(narrowed(row, 4, "topk").tail, 1 - np.sort(p)[:, -4:].sum(-1), atol=2e-3)
    assert narrowed(replace(row, tail=None), 4, "topk").tail is None  # of version 1
    assert (narrowed(replace(row, tail=None), 0, "topk").tail == 1).all()


def test_a_sampled_row_serves_a_top_k_only_where_all_of_it_is_certain():
    peaked, flat = distributions(20, 6), distributions(20, 0.5)
    row = row_of(peaked, 32, "sampled")
    certain = int((np.exp(row.topk_logprobs.astype(float)) > 1.01 * row.tau[:, None]).sum(1).min())
    assert 2 <= certain < 32 and holds_top(row, certain) and not holds_top(row, certain + 1)
    served, plain = narrowed(row, certain, "topk"), narrowed(row_of(peaked, 32, "topk"), certain, "topk")
    assert (served.topk_ids == plain.topk_ids).all() and (served.topk_logprobs == plain.topk_logprobs).all()
    np.testing.assert_allclose(served.tail, 1 - np.sort(peaked)[:, -certain:].sum(-1), rtol=2e-3)
    assert served.tau is None and fault(served, "topk", certain) is None
    with pytest.raises(UserError, match=r"lacks some of the 8 likeliest.*generate"):
        narrowed(row_of(flat, 8, "sampled"), 8, "topk")
    everything = row_of(flat, VOCABULARY, "sampled")
    assert (everything.tau == 0).all() and (narrowed(everything, 8, "topk").topk_ids == np.argsort(-flat)[:, :8]).all()


def test_a_plain_row_serves_no_sample():
    with pytest.raises(UserError, match="has no tau"):
        narrowed(row_of(distributions(3, 1), 8, "topk"), 4, "sampled")


@pytest.mark.parametrize("support", ["sampled", "topk"])
def test_a_response_of_no_tokens_is_narrowed_alone_and_among_others(support):
    full = row_of(distributions(5, 1), 8, support)
    names = ("response_ids", "logprobs", "topk_ids", "topk_logprobs", "lse", "tau" if support == "sampled" else "tail")
    empty = replace(full, **{name: getattr(full, name)[:0] for name in names})
    empty = replace(empty, key=score_key(empty.prompt_ids, empty.response_ids))
    for rows in ([empty], [empty, full]):
        stored = from_table(to_table(rows))[0]
        assert fault(stored, support, 8) is None
        for wanted in ("topk", "sampled") if support == "sampled" else ("topk",):
            for k in (8, 4, 0):
                less = narrowed(stored, k, wanted)
                assert len(less.topk_ids) == 0 and fault(less, wanted if k else "topk", k) is None


def test_text_alone_stays_as_it_is():
    row = row_of(distributions(5, 1), 8, "topk")
    text = replace(row, logprobs=None, lse=None, tail=None, topk_ids=row.topk_ids[:, :0],
                   topk_logprobs=row.topk_logprobs[:, :0])  # fmt: skip
    assert narrowed(text, 0, None) is text and RowCheck({"kind": "score"}, "", 0, VOCABULARY, None).fault(text) is None
    assert "text alone" in fault(text, "topk", 0)
    assert "text alone" in RowCheck({"kind": "score"}, "", 0, VOCABULARY, None).fault(narrowed(row, 0, "topk"))

"""What holds for the exact KL: the plain formula over the whole vocabulary, whatever the chunks and the model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.learning.batches import collate
from pipeline.learning.closeness import HeldOut, LogitSource, both_kls
from pipeline.learning.forward import per_row
from pipeline.models import load_lm
from pipeline.objectives.supports import systematic
from pipeline.store.schema import Row
from tests.conftest import make_seq2seq_model


def responses(count: int = 7, seed: int = 0) -> list[Row]:
    """Of different lengths, one of them empty."""
    rng = np.random.default_rng(seed)
    sizes = [(rng.integers(1, 6), 0 if i == 3 else rng.integers(1, 9)) for i in range(count)]
    return [
        Row.bare(rng.integers(4, 40, p).astype(np.int32), rng.integers(4, 40, r).astype(np.int32)) for p, r in sizes
    ]


def plain(teacher, model, response: Row, shared: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The textbook formula, from transformers' own forward pass of one response, in float64."""
    ids = torch.tensor(np.concatenate([response.prompt_ids, response.response_ids]))[None].long()
    steps, found = len(response.response_ids), []
    for each in (teacher, model):
        if each.config.is_encoder_decoder:
            start = torch.tensor([[each.config.decoder_start_token_id, *response.response_ids[:-1]]])
            prompt = torch.tensor(response.prompt_ids)[None].long()
            logits = each(input_ids=prompt, decoder_input_ids=start).logits[0]
        else:
            logits = each(input_ids=ids).logits[0, len(response.prompt_ids) - 1 : -1]
        found.append(torch.log_softmax(logits[:steps, :shared].double(), -1))
    t, s = found
    return (t.exp() * (t - s)).sum(-1).detach().numpy(), (s.exp() * (s - t)).sum(-1).detach().numpy()


def measured(teacher, model, given, chunk: int = 0, size: int = 128) -> list[list[np.ndarray]]:
    sources = LogitSource(teacher, "t"), LogitSource(model, "s")
    return list(per_row(given, lambda batch: both_kls(*sources, batch, chunk), batch_size=size))


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    made = make_seq2seq_model(folder / "a", 0), make_seq2seq_model(folder / "b", 1, tied=False)
    return tuple(map(load_lm, made))


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("chunk", [0, 1, 5])
def test_it_is_the_plain_formula_in_both_directions(kind, chunk, teacher, student, seq2seq):
    pair = (load_lm(teacher), load_lm(student)) if kind == "causal" else seq2seq
    given = responses()
    found = measured(*pair, given, chunk, size=4)
    for response, (kl, reverse, dropped) in zip(given, found, strict=True):
        if len(response.response_ids):
            expected = plain(*pair, response)
            np.testing.assert_allclose(kl, expected[0], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(reverse, expected[1], rtol=1e-4, atol=1e-6)
        assert len(kl) == len(reverse) == len(response.response_ids) and np.allclose(dropped, 0, atol=1e-6)
    assert max(kl.max(initial=0) for kl, _, _ in found) > 0.05


def test_a_model_is_at_no_distance_from_itself(teacher):
    model = load_lm(teacher)
    for kl, reverse, _ in measured(model, model, responses()):
        assert (kl == 0).all() and (reverse == 0).all()


def test_padding_of_one_vocabulary_is_left_out_on_both_sides_and_counted(teacher, student):
    small, large = load_lm(teacher), load_lm(student)
    size = small.config.vocab_size
    large.resize_token_embeddings(size + 20, mean_resizing=False)
    with torch.no_grad():
        large.get_output_embeddings().weight[size:] *= 3  # padding that a model really says
    given = responses()
    for response, (kl, reverse, dropped) in zip(given, measured(small, large, given), strict=True):
        if len(response.response_ids):
            expected = plain(small, large, response, size)
            np.testing.assert_allclose(kl, expected[0], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(reverse, expected[1], rtol=1e-4, atol=1e-6)
            assert (dropped > 1e-3).all() and (dropped < 1).all()


def capped_model(size: int):
    """A tiny Gemma 2 with a vocabulary of this size, most of whose logits are near its cap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.5, max_position_embeddings=64,
    )  # fmt: skip
    gemma = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        gemma.get_output_embeddings().weight.mul_(40)
    return gemma


def test_a_teacher_that_caps_its_logits_after_its_head_says_what_it_says(student):
    model = load_lm(student)
    gemma = capped_model(model.config.vocab_size)
    assert not LogitSource(gemma, "gemma").plain
    given = responses()
    for response, (kl, reverse, _) in zip(given, measured(gemma, model, given, size=1), strict=True):
        if len(response.response_ids):
            expected = plain(gemma, model, response)
            np.testing.assert_allclose(kl, expected[0], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(reverse, expected[1], rtol=1e-4, atol=1e-6)


def test_half_precision_is_compared_in_float32(teacher, student):
    pair = load_lm(teacher, "bfloat16"), load_lm(student, "bfloat16")
    found = measured(*pair, responses())
    assert all(kl.dtype == np.float32 and (kl > -1e-5).all() for kl, _, _ in found)
    exact = measured(load_lm(teacher), load_lm(student), responses())
    means = [np.concatenate([kl for kl, _, _ in each]).mean() for each in (found, exact)]
    assert means[0] == pytest.approx(means[1], rel=0.1)


def test_no_more_than_a_chunk_of_logits_exists_at_once(teacher, student, monkeypatch):
    seen = []
    linear = torch.nn.functional.linear

    def watched(states, weight, bias=None):
        found = linear(states, weight, bias)
        seen.append(tuple(found.shape))
        return found

    sources, batch = (LogitSource(load_lm(teacher), "t"), LogitSource(load_lm(student), "s")), collate(responses())
    count = int((batch["labels"] != -100).sum())
    monkeypatch.setattr("pipeline.learning.closeness.linear", watched)
    with torch.no_grad():
        both_kls(*sources, batch, chunk=3)
    assert sum(shape[0] for shape in seen) == 2 * count and max(shape[0] for shape in seen) == 3


def sampled_rows(teacher, given: list[Row], k: int, seed: int) -> list[Row]:
    """The responses with supports of the teacher's distribution, whose offsets are drawn by `seed`."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for number, response in enumerate(given):
        ids = torch.tensor(np.concatenate([response.prompt_ids, response.response_ids]))[None].long()
        logits = teacher(input_ids=ids).logits[0, len(response.prompt_ids) - 1 : -1].float()
        logprobs = torch.log_softmax(logits, -1)
        offset = torch.rand(len(logprobs), generator=generator, dtype=torch.float64)
        kept, tau = systematic(logprobs.exp(), k, offset)
        own = logprobs.gather(-1, torch.tensor(response.response_ids)[:, None].long()).squeeze(-1)
        arrays = (kept.int(), logprobs.gather(-1, kept).half(), torch.logsumexp(logits, -1), tau)
        rows.append(Row(
            str(number), "teacher", str(number), 0, "", "", response.prompt_ids, response.response_ids, "stop",
            own.numpy(), *(array.numpy() for array in arrays),
        ))  # fmt: skip
    return rows


@torch.no_grad()
def test_sampled_rows_say_the_kl_without_bias(teacher, student):
    pair, given = (load_lm(teacher), load_lm(student)), responses(12, seed=3)
    exact = np.concatenate([kl for kl, _, _ in measured(*pair, given)]).mean()

    def estimate(seed: int) -> float:
        found = HeldOut(sampled_rows(pair[0], given, 4, seed), None, 8).of(LogitSource(pair[1], "s"))
        assert found.keys() == {"kl_estimate", "cross_entropy"}
        return found["kl_estimate"][:, 0].sum() / found["kl_estimate"][:, 1].sum()

    errors = np.array([estimate(seed) for seed in range(200)]) - exact
    assert abs(errors.mean()) < 3 * errors.std(ddof=1) / 200**0.5
    assert 1e-4 < errors.std() < 0.5 * exact  # it is an estimate, and one that says something


@torch.no_grad()
def test_rows_without_any_kept_token_have_their_cross_entropy(teacher, student):
    rows = sampled_rows(load_lm(teacher), responses(), 4, 0)
    rows = [
        replace(row, topk_ids=row.topk_ids[:, :0], topk_logprobs=row.topk_logprobs[:, :0], tau=None) for row in rows
    ]
    held_out = HeldOut(rows, None, 8)
    of_student, of_teacher = held_out.of(LogitSource(load_lm(student), "s")), held_out.of_the_teacher()[0]
    assert of_student.keys() == of_teacher.keys() == {"cross_entropy"}

"""What holds for the engines: one answer a sample whatever its batch, and the same from transformers and from vLLM."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.engines import Answer, Ask, Failure, choose_engine, open_engine, require_supported
from pipeline.engines.hf import HfEngine
from pipeline.engines.stub import StubEngine
from pipeline.errors import UserError, reason_of
from pipeline.models import load_lm, load_tokenizer, save_model
from pipeline.objectives.supports import offsets, systematic
from pipeline.params import Generate
from pipeline.store.identity import Sampling, sample_seed
from pipeline.teacher.teacher import Teacher, vocabulary
from tests.conftest import make_model, make_params

GREEDY, DRAWN = Sampling(0.0, 1.0, 8, (2,)), Sampling(1.0, 1.0, 8, (2,))


def make_asks(n: int) -> list[Ask]:
    rng = np.random.default_rng(0)
    return [
        Ask(f"{i:032x}", rng.integers(4, 44, rng.integers(2, 12)).astype(np.int32), sample_seed(str(i)))
        for i in range(n)
    ]


def by_key(answers) -> dict[str, Answer]:
    found = {answer.key: answer for answer in answers}
    assert not any(isinstance(answer, Failure) for answer in found.values())
    return found


@pytest.fixture(scope="module")
def hf(teacher) -> HfEngine:
    return HfEngine(load_lm(teacher), batch_size=7)


def assert_columns_are_those_of_the_model(answer: Answer, ask: Ask, model, k: int, tolerance: float) -> None:
    """The oracle: one forward pass over prompt and response."""
    ids = torch.tensor(np.concatenate([ask.prompt_ids, answer.response_ids]))[None].long()
    steps = len(answer.response_ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -steps - 1 : -1].float()
    lse = torch.logsumexp(logits, -1)
    logprobs = logits - lse[:, None]
    np.testing.assert_allclose(answer.lse, lse, atol=tolerance)
    np.testing.assert_allclose(answer.logprobs, logprobs[range(steps), answer.response_ids], atol=tolerance)
    np.testing.assert_allclose(answer.topk_logprobs, logprobs.topk(k).values, atol=tolerance)
    np.testing.assert_allclose(
        logprobs.gather(-1, torch.tensor(answer.topk_ids).long()), answer.topk_logprobs, atol=tolerance
    )
    assert (np.diff(answer.topk_logprobs, axis=1) <= 0).all()
    assert answer.finish == ("stop" if answer.response_ids[-1] == 2 else "length")
    assert 2 not in answer.response_ids[:-1]


def causal_logits(model, ask: Ask, response: np.ndarray) -> torch.Tensor:
    """[T, V] of one pass over prompt and response, float32."""
    ids = torch.tensor(np.concatenate([ask.prompt_ids, response]))[None].long()
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -len(response) - 1 : -1].float()


def assert_support_is_that_of(answer: Answer, logits: torch.Tensor, k: int, real: int, tolerance: float = 1e-4) -> None:
    """The oracle of a sampled support: float64 over logits [T, V], with the offset of the answer's own normaliser.

    real: ids that are no padding.
    """
    exact, tokens = logits[:, :real].double(), torch.tensor(answer.response_ids)
    lse, own = exact.logsumexp(-1), logits.double().gather(-1, tokens.long()[:, None])[:, 0]
    logprobs = exact - lse[:, None]
    drawn = systematic(logprobs.exp(), k, offsets(k, tokens, logprobs.argmax(-1), torch.tensor(answer.lse)))
    np.testing.assert_array_equal(answer.topk_ids, drawn.places)
    np.testing.assert_allclose(answer.tau, drawn.tau, atol=tolerance)
    np.testing.assert_allclose(answer.lse, lse, atol=tolerance)
    np.testing.assert_allclose(answer.topk_logprobs, logprobs.gather(-1, drawn.places), atol=tolerance)
    np.testing.assert_allclose(answer.logprobs, own - lse, atol=tolerance)
    np.testing.assert_allclose(np.maximum(np.exp(answer.topk_logprobs), answer.tau[:, None]).sum(-1), 1, atol=1e-5)
    assert (np.diff(answer.topk_logprobs, axis=1) <= 0).all() and answer.tail is None
    assert answer.topk_logprobs.dtype == answer.tau.dtype == answer.lse.dtype == answer.logprobs.dtype == np.float32
    assert answer.dropped == pytest.approx(logits.double().softmax(-1)[:, real:].sum(-1).max().item(), abs=tolerance)


def as_given(asks, drawn: dict[str, Answer]) -> list[Ask]:
    """The same prompts with the responses that were drawn."""
    return [replace(ask, response_ids=drawn[ask.key].response_ids) for ask in asks]


@pytest.mark.parametrize("real", [44, 38])
def test_hf_draws_the_support_that_the_models_logits_have(hf, real):
    """Sampling and scoring; also of a model that has 6 more embeddings than its tokenizer has ids."""
    engine, asks = HfEngine(hf.model, 7, vocabulary=real), make_asks(20)
    drawn = by_key(engine.sample(asks, DRAWN, 5, support="sampled"))
    scored = by_key(engine.score(as_given(asks, drawn), 5, (2,), support="sampled"))
    for ask in asks:
        for answer in (drawn[ask.key], scored[ask.key]):
            logits = causal_logits(hf.model, ask, answer.response_ids)
            assert_support_is_that_of(answer, logits, 5, real)
    assert max(answer.topk_ids.max() for answer in drawn.values()) < real
    assert any(answer.dropped > 1e-6 for answer in drawn.values()) == (real < 44)


def test_where_two_readings_agree_in_the_normalisers_bits_they_keep_the_same_tokens(hf, one_thread):
    asks = make_asks(40)
    drawn = by_key(hf.sample(asks, DRAWN, 5, support="sampled"))
    scored = by_key(hf.score(as_given(asks, drawn), 5, (2,), support="sampled"))
    agreeing = 0
    for key, answer in drawn.items():
        same = answer.lse == scored[key].lse
        np.testing.assert_array_equal(answer.topk_ids[same], scored[key].topk_ids[same])
        agreeing += same.sum()
    assert agreeing > 20


def test_the_support_changes_no_response_and_no_top_k_leaves_padding_out(hf):
    """A response belongs to its prompt and seed: its tokens, and a top k, are those of the whole embedding."""
    asks, padded = make_asks(12), HfEngine(hf.model, vocabulary=30)
    plain = by_key(hf.sample(asks, DRAWN, 5))
    for key, answer in by_key(padded.sample(asks, DRAWN, 5)).items():
        np.testing.assert_array_equal(answer.topk_ids, plain[key].topk_ids)
        assert answer.tau is None and answer.dropped == 0
        np.testing.assert_allclose(np.exp(answer.topk_logprobs).sum(-1) + answer.tail, 1, atol=1e-6)
    for key, answer in by_key(padded.sample(asks, DRAWN, 5, support="sampled")).items():
        np.testing.assert_array_equal(answer.response_ids, plain[key].response_ids)
    assert any((answer.response_ids >= 30).any() for answer in plain.values())


def test_a_teacher_with_more_embeddings_than_its_tokenizer_has_ids_says_nothing_of_the_others(tmp_path):
    """48 and 44. Tokens that were added to the tokenizer count."""
    folder = make_model(tmp_path / "model", seed=0)
    model, tokenizer = load_lm(folder), load_tokenizer(folder)
    model.resize_token_embeddings(48, mean_resizing=False)
    save_model(folder, model, tokenizer, "# padded\n")
    settings = make_params(folder, "generate.k=46", "generate.dtype=float32").generate
    teacher = Teacher.of(settings)
    assert teacher.k == 44 and Teacher.of(settings.model_copy(update={"support": "topk"})).k == 46
    loading = replace(teacher.loading, context=40)
    assert loading.vocabulary == 44
    asks = make_asks(12)
    for name, k in (("hf", 5), ("hf", 46), ("stub", 5)):
        engine = open_engine(name, folder, loading)
        for answer in by_key(
            engine.score(as_given(asks, by_key(engine.sample(asks, DRAWN, 2))), k, (2,), "sampled")
        ).values():
            assert answer.topk_ids.shape[1] == min(k, 44) and answer.topk_ids.max() < 44 and answer.dropped > 1e-6
            np.testing.assert_allclose(
                np.maximum(np.exp(answer.topk_logprobs), answer.tau[:, None]).sum(-1), 1, atol=1e-5
            )
    tokenizer.add_tokens(["new", "newer"])
    assert vocabulary(tokenizer) == 46


@pytest.mark.parametrize("support, k, width", [("topk", 0, 0), ("topk", 50, 44), ("sampled", 50, 40)])
def test_hf_keeps_none_or_all_of_the_tokens_there_are(hf, support, k, width):
    engine, asks = HfEngine(hf.model, vocabulary=40), make_asks(9)
    drawn = by_key(engine.sample(asks, DRAWN, k, support=support))
    for ask in asks:
        answer = drawn[ask.key]
        logits = causal_logits(hf.model, ask, answer.response_ids)[:, : 40 if support == "sampled" else 44]
        assert answer.topk_ids.shape == answer.topk_logprobs.shape == (len(answer.response_ids), width)
        np.testing.assert_allclose(answer.lse, logits.logsumexp(-1), atol=1e-4)
        np.testing.assert_array_equal(answer.tau if support == "sampled" else answer.tail, 0 if width else 1)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_hf_returns_the_models_own_numbers(hf, sampling):
    asks = make_asks(20)
    found = by_key(hf.sample(asks, sampling, 5))
    assert found.keys() == {ask.key for ask in asks}
    for ask in asks:
        assert_columns_are_those_of_the_model(found[ask.key], ask, hf.model, 5, 1e-4)
    assert {answer.finish for answer in found.values()} == {"stop", "length"} or sampling is GREEDY


def test_hf_greedy_takes_the_likeliest_token(hf):
    for answer in hf.sample(make_asks(9), GREEDY, 3):
        np.testing.assert_array_equal(answer.response_ids, answer.topk_ids[:, 0])


def assert_identical(one: dict[str, Answer], other: dict[str, Answer]) -> None:
    """In every bit."""
    assert one.keys() == other.keys()
    for key, answer in one.items():
        for name in ("response_ids", "logprobs", "topk_ids", "topk_logprobs", "lse", "tau", "tail", "dropped"):
            np.testing.assert_array_equal(getattr(answer, name), getattr(other[key], name))


@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_a_sample_does_not_depend_on_its_batch(hf, one_thread, support):
    """Prompts of 2 to 40 tokens, alone and in batches of any size and order: equal in every bit."""
    rng = np.random.default_rng(0)
    asks = [replace(ask, prompt_ids=rng.integers(4, 44, 2 + 5 * i % 39).astype(np.int32))
            for i, ask in enumerate(make_asks(50))]  # fmt: skip
    drawn = by_key(HfEngine(hf.model, batch_size=64).sample(asks, DRAWN, 5, support=support))
    given = as_given(asks, drawn)
    scored = by_key(HfEngine(hf.model, batch_size=64).score(given, 5, (2,), support=support))
    for size in (1, 3, 7, 20):
        engine = HfEngine(hf.model, batch_size=size)
        assert_identical(drawn, by_key(engine.sample(asks[::-1], DRAWN, 5, support=support)))
        assert_identical(scored, by_key(engine.score(given[::-1], 5, (2,), support=support)))


def test_samples_follow_the_models_distribution(hf):
    """First tokens of 4000 draws against the model's probabilities."""
    prompt = make_asks(1)[0].prompt_ids
    asks = [Ask(str(i), prompt, sample_seed(str(i))) for i in range(4000)]
    engine = HfEngine(hf.model, batch_size=1000)
    answers = list(engine.sample(asks, Sampling(1.0, 1.0, 1, (2,)), 44))
    first = np.bincount([answer.response_ids[0] for answer in answers], minlength=44) / len(answers)
    expected = np.zeros(44)
    expected[answers[0].topk_ids[0]] = np.exp(answers[0].topk_logprobs[0])
    assert np.abs(first - expected).sum() < 0.1
    nucleus = {a.response_ids[0] for a in engine.sample(asks[:500], Sampling(1.0, 0.5, 1, (2,)), 44)}
    needed = int((np.cumsum(np.sort(expected)[::-1]) < 0.5).sum()) + 1
    assert nucleus <= set(answers[0].topk_ids[0][:needed].tolist())


def test_scoring_a_response_gives_what_sampling_it_gave(hf):
    asks = make_asks(15)
    drawn = by_key(hf.sample(asks, DRAWN, 5))
    scored = by_key(hf.score([Ask(a.key, a.prompt_ids, 0, drawn[a.key].response_ids) for a in asks], 5, (2,)))
    for key, answer in drawn.items():
        assert scored[key].finish == answer.finish
        for name in ("logprobs", "topk_logprobs", "lse"):
            np.testing.assert_allclose(getattr(scored[key], name), getattr(answer, name), atol=1e-4)


def test_an_error_becomes_one_line_of_bounded_length():
    assert reason_of(ValueError("no such\n  token")) == "ValueError: no such token"
    assert len(reason_of(ValueError("x" * 1000))) == 300


@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_the_stub_is_deterministic_and_scores_what_it_sampled(support):
    stub, asks = StubEngine(44, vocabulary=40), make_asks(10)
    drawn = by_key(stub.sample(asks, DRAWN, 5, support=support))
    assert_identical(drawn, by_key(stub.sample(asks[::-1], DRAWN, 5, support=support)))
    assert_identical(drawn, by_key(stub.score(as_given(asks, drawn), 5, (2,), support=support)))
    for answer in drawn.values():
        p = np.exp(answer.topk_logprobs)
        mass = np.maximum(p, answer.tau[:, None]).sum(-1) if support == "sampled" else p.sum(-1) + answer.tail
        np.testing.assert_allclose(mass, 1, atol=1e-5)
        assert (p.sum(-1) < 1).all() and (answer.topk_ids < (40 if support == "sampled" else 44)).all()


def test_auto_prefers_vllm_and_a_missing_vllm_is_a_clear_error(monkeypatch):
    installed = importlib.util.find_spec("vllm") is not None
    assert choose_engine("auto") == ("vllm" if installed else "hf") and choose_engine("stub") == "stub"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto") == "hf"
    with pytest.raises(UserError, match="vllm is not installed"):
        choose_engine("vllm")


def test_an_engine_that_is_not_there_or_cannot_do_what_is_asked_is_a_clear_error(monkeypatch):
    asked = {"quantization": "fp8", "tensor_parallel": 2, "pipeline_parallel": 2}
    asked |= {"engine_options": {"max_num_seqs": 8}}
    require_supported("vllm", Generate(**asked))
    require_supported("hf", Generate())
    for name, value in asked.items():
        with pytest.raises(UserError, match=f"engine hf has no generate.{name}.*--engine vllm"):
            require_supported("hf", Generate(**{name: value}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ray is not installed.*\[ray\]"):
        choose_engine("ray")


def test_hf_reads_its_asks_as_it_goes_and_keeps_near_their_order(hf):
    """16 batches of 7 are sorted together; nothing of the next window is asked before they are answered."""
    asks, taken = make_asks(300), []
    stream = hf.sample((taken.append(ask.key) or ask for ask in asks), Sampling(0.0, 1.0, 1, (2,)), 2)
    first = [next(stream).key for _ in range(112)]
    assert len(taken) == 112 and set(first) == set(taken)
    assert len(first + [answer.key for answer in stream]) == 300 == len(taken)


def test_hf_leaves_out_what_does_not_fit_its_context_and_goes_on(hf):
    long = np.full(58, 5, np.int32)
    drawn = list(hf.sample([Ask("long", long, 1), *make_asks(3)], DRAWN, 5))
    scored = list(hf.score([Ask("long", long, 0, np.full(8, 5, np.int32)), Ask("ok", long[:4], 0, long[:3])], 5, (2,)))
    for found, count in ((drawn, 4), (scored, 2)):
        (failure,) = [answer for answer in found if isinstance(answer, Failure)]
        assert len(found) == count and failure.key == "long" and "58 tokens" in failure.reason


def test_hf_halves_a_batch_that_does_not_fit_into_memory_down_to_one_row(hf, monkeypatch):
    asks, sizes, sampled = [ask for ask in make_asks(20) if len(ask.prompt_ids) <= 8][:7], [], HfEngine._sampled
    huge = asks[3].key

    def short_of_memory(self, batch, *asked):
        sizes.append(len(batch))
        if len(batch) > 2 or huge in {ask.key for ask in batch}:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return sampled(self, batch, *asked)

    expected = by_key(hf.sample(asks, DRAWN, 5))
    monkeypatch.setattr(HfEngine, "_sampled", short_of_memory)
    found = {answer.key: answer for answer in hf.sample(asks, DRAWN, 5)}
    assert isinstance(found[huge], Failure) and "2 GiB" in found[huge].reason
    assert sizes[0] == 7 and min(sizes) == 1 and found.keys() == expected.keys()
    for key in expected.keys() - {huge}:
        np.testing.assert_array_equal(found[key].response_ids, expected[key].response_ids)


def test_hf_remembers_the_batch_that_fitted_into_memory(teacher, monkeypatch):
    """Only the first batch of a length fails; another length is tried in full."""
    sizes, sampled = [], HfEngine._sampled

    def short_of_memory(self, batch, *asked):
        sizes.append(len(batch))
        if len(batch) > 4 and len(batch[0].prompt_ids) > 8:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return sampled(self, batch, *asked)

    monkeypatch.setattr(HfEngine, "_sampled", short_of_memory)
    lengths = [12] * 16 + [4] * 8
    asks = [Ask(str(i), np.full(length, 5, np.int32), i) for i, length in enumerate(lengths)]
    found = by_key(HfEngine(load_lm(teacher), batch_size=8).sample(asks, DRAWN, 3))
    assert len(found) == 24 and sizes == [8, 4, 4, 4, 4, 8]

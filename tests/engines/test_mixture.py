"""What holds for samples of a mixture: drawn from exactly p~, with both models' own numbers, whatever their batch."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, MistralConfig

from pipeline.engines.base import Ask, Failure
from pipeline.engines.hf import HfEngine
from pipeline.engines.mixture import MixtureAnswer, MixtureEngine
from pipeline.errors import UserError
from pipeline.models import load_lm
from pipeline.store.identity import Sampling, sample_seed
from tests.conftest import make_seq2seq_model
from tests.engines.test_engines import by_key, make_asks
from tests.learning.test_seq2seq import make_bart

DRAWN = Sampling(1.0, 1.0, 8, (2,))
STOP = 2


def from_config(config, seed: int):
    """A tiny causal model with large weights, so that its distributions are not uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig()
    return model


def gpt2(seed: int):
    """Absolute positions."""
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return from_config(GPT2Config(vocab_size=44, **size, initializer_range=0.5), seed)


def mistral(seed: int):
    """A window of 4 tokens."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=44, **size, num_key_value_heads=1, sliding_window=4, initializer_range=0.3)
    return from_config(config, seed)


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral", "t5", "bart"])
def pair(request, student, teacher, tmp_path_factory):
    """A student and its teacher."""
    folder = tmp_path_factory.mktemp("pair")
    if request.param == "llama":
        return load_lm(student), load_lm(teacher)
    if request.param == "gpt2":
        return load_lm(student), gpt2(0)
    if request.param == "mistral":
        return gpt2(1), mistral(0)
    if request.param == "t5":  # the models begin with different tokens
        models = load_lm(make_seq2seq_model(folder / "1", seed=1)), load_lm(make_seq2seq_model(folder / "2", seed=2))
        for config in (models[1].config, models[1].generation_config):
            config.decoder_start_token_id = 3
        return models
    return load_lm(make_seq2seq_model(folder / "t5", seed=1)), load_lm(make_bart(folder / "bart"))


@torch.no_grad()
def logprobs_of(model, prompt_ids, response_ids) -> torch.Tensor:
    """The oracle: [T, V] at the response's tokens, by one pass without padding or cache."""
    prompt, response = (torch.tensor(np.asarray(ids))[None].long() for ids in (prompt_ids, response_ids))
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id]])
        logits = model(input_ids=prompt, decoder_input_ids=torch.cat([start, response[:, :-1]], 1)).logits[0]
    else:
        logits = model(input_ids=torch.cat([prompt, response], 1)).logits[0, prompt.shape[1] - 1 : -1]
    return logits.double().log_softmax(-1)


def distribution(models, alpha: float, prompt_ids: np.ndarray, ids: range) -> dict[tuple[int, ...], float]:
    """The probability of each response of at most two of `ids`, by enumeration."""

    def following(response: tuple[int, ...]) -> torch.Tensor:
        student, teacher = (logprobs_of(model, prompt_ids, [*response, 0])[-1].exp()[list(ids)] for model in models)
        mixed = (1 - alpha) * student + alpha * teacher
        return mixed / mixed.sum()

    first = following(())
    second = {token: following((token,)) for token in ids if token != STOP}
    whole = {(a, b): (first[a] * second[a][b]).item() for a, b in product(second, ids)}
    return whole | {(STOP,): first[STOP].item()}


def distance(one: dict, other: dict) -> float:
    """Total variation."""
    return sum(abs(one.get(key, 0) - other.get(key, 0)) for key in one.keys() | other.keys()) / 2


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_samples_follow_the_mixture(pair, alpha):
    """Responses of up to two of 6 ids, 31 in all, against their exact probabilities.

    The expected distance of 8000 draws is below sqrt(31 / 8000) / 2 = .031, and one of .06 has a probability below
    1e-5 (McDiarmid). The other mixtures are at least twice as far away.
    """
    ids, n, prompt = range(6), 8000, make_asks(2)[1].prompt_ids
    engine = MixtureEngine(*pair, alpha, batch_size=1000, vocabulary=len(ids))
    asks = [Ask(str(i), prompt, sample_seed(str(i))) for i in range(n)]
    drawn: dict[tuple[int, ...], float] = {}
    for answer in engine.sample(asks, replace(DRAWN, max_tokens=2)):
        key = tuple(answer.response_ids.tolist())
        drawn[key] = drawn.get(key, 0) + 1 / n
    expected = distribution(pair, alpha, prompt, ids)
    assert len(expected) == 31 and sum(expected.values()) == pytest.approx(1)
    assert distance(drawn, expected) < 0.06
    for other in {0.0, 0.5, 1.0} - {alpha}:
        assert distance(expected, distribution(pair, other, prompt, ids)) > 0.12


def test_recorded_log_probabilities_are_those_of_each_model(pair):
    asks = make_asks(20)
    found = by_key(MixtureEngine(*pair, 0.4, batch_size=7).sample(asks, DRAWN))
    assert found.keys() == {ask.key for ask in asks}
    for ask in asks:
        answer = found[ask.key]
        steps = len(answer.response_ids)
        for recorded, model in ((answer.old, pair[0]), (answer.teacher, pair[1])):
            expected = logprobs_of(model, ask.prompt_ids, answer.response_ids)[range(steps), answer.response_ids]
            np.testing.assert_allclose(recorded, expected, rtol=1e-4, atol=1e-4)
            assert recorded.dtype == np.float32 and recorded.shape == (steps,)
        assert answer.response_ids.dtype == np.int32 and steps <= 8 and STOP not in answer.response_ids[:-1]
        assert answer.finish == ("stop" if answer.response_ids[-1] == STOP else "length")
    assert len({len(answer.response_ids) for answer in found.values()}) > 1  # some rows end before others


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_mixture_of_one_model_gives_that_models_own_samples(pair, alpha):
    """By the same seeds: those of the engine that runs it alone."""
    model, name = (pair[1], "teacher") if alpha else (pair[0], "old")
    asks = make_asks(20)
    alone = by_key(HfEngine(model).sample(asks, DRAWN, 0))
    for key, answer in by_key(MixtureEngine(*pair, alpha).sample(asks, DRAWN)).items():
        np.testing.assert_array_equal(answer.response_ids, alone[key].response_ids)
        np.testing.assert_allclose(getattr(answer, name), alone[key].logprobs, atol=1e-5)


def assert_identical(one: dict[str, MixtureAnswer], other: dict[str, MixtureAnswer]) -> None:
    """In every bit."""
    assert one.keys() == other.keys()
    for key, answer in one.items():
        for name in ("response_ids", "finish", "old", "teacher"):
            np.testing.assert_array_equal(getattr(answer, name), getattr(other[key], name))


def test_a_sample_does_not_depend_on_its_batch(pair, one_thread):
    """Prompts of 2 to 18 tokens, alone and in batches of any size and order: equal in every bit."""
    rng = np.random.default_rng(0)
    asks = [replace(ask, prompt_ids=rng.integers(4, 44, 2 + 5 * i % 17).astype(np.int32))
            for i, ask in enumerate(make_asks(30))]  # fmt: skip
    drawn = by_key(MixtureEngine(*pair, 0.2).sample(asks, DRAWN))
    for size in (1, 3, 7, 20):
        assert_identical(drawn, by_key(MixtureEngine(*pair, 0.2, batch_size=size).sample(asks[::-1], DRAWN)))


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_ids_that_only_one_model_has_or_only_pad_an_embedding_are_never_drawn(student, teacher, larger):
    """Embeddings of 44 and 48, a tokenizer of 40; each model's log-probabilities are over its whole vocabulary."""
    models = load_lm(student), load_lm(teacher)
    grown = models[0] if larger == "student" else models[1]
    grown.resize_token_embeddings(48, mean_resizing=False)
    with torch.no_grad():
        grown.get_output_embeddings().weight[44:] *= 5
    asks = make_asks(200)
    for vocabulary, highest in ((None, 44), (40, 40)):
        found = by_key(MixtureEngine(*models, 0.5, vocabulary=vocabulary).sample(asks, DRAWN))
        assert max(answer.response_ids.max() for answer in found.values()) == highest - 1
        for ask in asks[:5]:
            answer = found[ask.key]
            for recorded, model in ((answer.old, models[0]), (answer.teacher, models[1])):
                logprobs = logprobs_of(model, ask.prompt_ids, answer.response_ids)
                expected = logprobs[range(len(recorded)), answer.response_ids]
                np.testing.assert_allclose(recorded, expected, rtol=1e-4, atol=1e-4)
    unknown = Ask("unknown", np.array([45], np.int32), 1)
    (failed,) = MixtureEngine(*models, 0.5).sample([unknown], DRAWN)
    assert isinstance(failed, Failure) and "has token 45, and the model has 44" in failed.reason


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.9), (0.0, 1.0)])
def test_other_temperatures_and_nuclei_are_refused_at_once(student, teacher, temperature, top_p):
    engine = MixtureEngine(load_lm(student), load_lm(teacher), 0.2)
    with pytest.raises(UserError, match=f"temperature {temperature:g} and top_p {top_p:g}.*set both to 1"):
        engine.sample([], Sampling(temperature, top_p, 8, (2,)))


def test_a_causal_student_of_an_encoder_decoder_teacher_is_refused(student, tmp_path):
    t5 = load_lm(make_seq2seq_model(tmp_path / "t5", seed=0))
    with pytest.raises(UserError, match="LlamaForCausalLM and T5ForConditionalGeneration: one is an encoder-decoder"):
        MixtureEngine(load_lm(student), t5, 0.2)


def test_what_either_model_cannot_read_is_left_out(student, teacher):
    """Contexts of 64, and of 20 for the teacher."""
    models = load_lm(student), load_lm(teacher)
    models[1].config.max_position_embeddings = 20
    asks = [Ask("long", np.full(13, 5, np.int32), 1), Ask("short", np.full(12, 5, np.int32), 1)]
    answers = {answer.key: answer for answer in MixtureEngine(*models, 0.2).sample(asks, DRAWN)}
    assert isinstance(answers["short"], MixtureAnswer) and "context of 20" in answers["long"].reason


def test_a_batch_that_does_not_fit_into_memory_is_halved(student, teacher, monkeypatch):
    engine, asks, sizes = MixtureEngine(load_lm(student), load_lm(teacher), 0.2), make_asks(20), []
    expected, forward = by_key(engine.sample(asks, DRAWN)), engine.teacher.forward

    def short_of_memory(*inputs, **options):
        sizes.append(len(options["input_ids"]))
        if len(options["input_ids"]) > 8:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return forward(*inputs, **options)

    monkeypatch.setattr(engine.teacher, "forward", short_of_memory)
    found = by_key(engine.sample(asks, DRAWN))
    assert max(sizes) > 8 and found.keys() == expected.keys()
    for key, answer in expected.items():
        np.testing.assert_array_equal(found[key].response_ids, answer.response_ids)


def test_closing_lets_go_of_both_models(student, teacher):
    engine = MixtureEngine(load_lm(student), load_lm(teacher), 0.2)
    engine.close()
    assert engine.model is engine.teacher is None

"""What holds for the engines: one answer a sample whatever its batch, and the same from transformers and from vLLM."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import load_lm
from pipeline.shards.identity import Sampling, sample_seed
from pipeline.teachers import Answer, Ask, Failure, choose_engine, open_engine
from pipeline.teachers.hf import HfEngine
from pipeline.teachers.stub import StubEngine
from tests.conftest import ROOT

GREEDY, DRAWN = Sampling(0.0, 1.0, 8, (2,)), Sampling(1.0, 1.0, 8, (2,))
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


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


def test_a_sample_does_not_depend_on_its_batch(teacher, hf):
    asks = make_asks(20)
    together = by_key(hf.sample(asks, DRAWN, 5))
    alone = by_key(HfEngine(hf.model, batch_size=1).sample(asks[::-1], DRAWN, 5))
    for key, answer in together.items():
        np.testing.assert_array_equal(answer.response_ids, alone[key].response_ids)
        np.testing.assert_allclose(answer.topk_logprobs, alone[key].topk_logprobs, atol=1e-4)


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


def test_the_stub_is_deterministic_and_scores_what_it_sampled():
    stub, asks = StubEngine(44), make_asks(10)
    drawn = by_key(stub.sample(asks, DRAWN, 5))
    again = by_key(stub.sample(asks[::-1], DRAWN, 5))
    scored = by_key(stub.score([Ask(a.key, a.prompt_ids, 0, drawn[a.key].response_ids) for a in asks], 5, (2,)))
    for key, answer in drawn.items():
        for other in (again[key], scored[key]):
            np.testing.assert_array_equal(answer.response_ids, other.response_ids)
            np.testing.assert_array_equal(answer.topk_logprobs, other.topk_logprobs)
        assert (np.exp(answer.topk_logprobs).sum(-1) < 1).all()


def test_auto_prefers_vllm_and_a_missing_vllm_is_a_clear_error(monkeypatch):
    installed = importlib.util.find_spec("vllm") is not None
    assert choose_engine("auto") == ("vllm" if installed else "hf") and choose_engine("stub") == "stub"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto") == "hf"
    with pytest.raises(UserError, match="vllm is not installed"):
        choose_engine("vllm")


# vLLM: one engine a session, because a process can hold one.


@pytest.fixture(scope="module")
def vllm(teacher):
    return open_engine("vllm", teacher, "float32", 40)


@needs_vllm
@pytest.mark.slow
def test_vllm_and_hf_agree_greedy(vllm, hf):
    """The contract of the capture: tokens, top k, log-probabilities and the exact normaliser."""
    asks = make_asks(32)
    ours, oracle = by_key(vllm.sample(asks, GREEDY, 5)), by_key(hf.sample(asks, GREEDY, 5))
    for ask in asks:
        np.testing.assert_array_equal(ours[ask.key].response_ids, oracle[ask.key].response_ids)
        assert_columns_are_those_of_the_model(ours[ask.key], ask, hf.model, 5, 1e-3)


@needs_vllm
@pytest.mark.slow
def test_a_vllm_sample_does_not_depend_on_its_neighbours(vllm, hf):
    asks = make_asks(32)
    together = by_key(vllm.sample(asks, DRAWN, 5))
    apart = by_key(answer for ask in asks[::-1][:6] for answer in vllm.sample([ask], DRAWN, 5))
    for key, answer in apart.items():
        np.testing.assert_array_equal(answer.response_ids, together[key].response_ids)
    for ask in asks:
        assert_columns_are_those_of_the_model(together[ask.key], ask, hf.model, 5, 1e-3)


@needs_vllm
@pytest.mark.slow
def test_vllm_scores_as_hf_does(vllm, hf):
    asks = [Ask(a.key, a.prompt_ids, 0, np.array([5, 9, 30, 2], np.int32)) for a in make_asks(12)]
    for ask, (key, answer) in zip(asks, by_key(vllm.score(asks, 5, (2,))).items(), strict=True):
        assert_columns_are_those_of_the_model(answer, next(a for a in asks if a.key == key), hf.model, 5, 1e-3)
        assert ask.response_ids[-1] == 2


@needs_vllm
@pytest.mark.slow
def test_a_row_that_vllm_refuses_does_not_end_the_run(vllm):
    long = Ask("f" * 32, np.full(60, 5, np.int32), 1)
    found = list(vllm.sample([long, *make_asks(3)], DRAWN, 5))
    failures = [answer for answer in found if isinstance(answer, Failure)]
    assert len(found) == 4 and [failure.key for failure in failures] == [long.key]
    assert "60" in failures[0].reason


@needs_vllm
@pytest.mark.slow
def test_vllm_reads_a_full_context_and_keeps_the_whole_vocabulary(vllm, hf):
    """A scored sequence that fills the context, with every token of the vocabulary at every position."""
    ask = Ask("c" * 32, np.arange(4, 38, dtype=np.int32), 0, np.array([5, 9, 30, 7, 8, 2], np.int32))
    assert len(ask.prompt_ids) + len(ask.response_ids) == 40
    (answer,) = vllm.score([ask], 44, (2,))
    assert_columns_are_those_of_the_model(answer, ask, hf.model, 44, 1e-3)


WITHOUT_HOOK = """
import sys
from pathlib import Path
import numpy as np
from pipeline.teachers import Ask
from pipeline.teachers import vllm
from pipeline.shards.identity import Sampling

vllm.Capture.xkd_install = lambda self: False  # a vLLM whose sampler has no hook
engine = vllm.VllmEngine(Path(sys.argv[1]), "float32", 40)
(answer,) = engine.sample([Ask("a" * 32, np.array([5, 6, 7], np.int32), 1)], Sampling(0.0, 1.0, 4, (2,)), 5)
assert answer.lse is None and answer.topk_ids.shape == (len(answer.response_ids), 5)
np.savez(sys.argv[2], ids=answer.response_ids, logprobs=answer.logprobs, topk=answer.topk_logprobs)
"""


@needs_vllm
@pytest.mark.slow
def test_without_the_hook_vllm_gives_log_probabilities_and_no_lse(teacher, hf, tmp_path):
    command = [sys.executable, "-c", WITHOUT_HOOK, str(teacher), str(tmp_path / "answer.npz")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert found.returncode == 0, found.stderr[-3000:]
    answer = np.load(tmp_path / "answer.npz")
    (oracle,) = hf.sample([Ask("a" * 32, np.array([5, 6, 7], np.int32), 1)], Sampling(0.0, 1.0, 4, (2,)), 5)
    np.testing.assert_array_equal(answer["ids"], oracle.response_ids)
    np.testing.assert_allclose(answer["logprobs"], oracle.logprobs, atol=1e-3)
    np.testing.assert_allclose(answer["topk"], oracle.topk_logprobs, atol=1e-3)

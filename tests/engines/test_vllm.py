"""What holds for the vLLM engine: the numbers of transformers, whatever the batch and however the model is split."""

import importlib.util
import inspect
import os
import pickle
import runpy
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.engines import Answer, Ask, EngineDead, Failure, Loading, open_engine
from pipeline.engines.hf import HfEngine
from pipeline.engines.kept import kept
from pipeline.errors import UserError
from pipeline.models import load_lm
from pipeline.store.schema import value_fault
from pipeline.store.selection import Selection
from pipeline.teacher.teacher import Teacher, sampling_request
from stages.generate import generate
from tests.conftest import ROOT, make_params, make_prompts
from tests.engines.test_engines import (
    DRAWN,
    GREEDY,
    as_given,
    assert_columns_are_those_of_the_model,
    assert_identical,
    assert_support_is_that_of,
    by_key,
    causal_logits,
    make_asks,
)  # fmt: skip

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
pytestmark = [pytest.mark.slow, needs_vllm]


@pytest.fixture(scope="module")
def hf(teacher) -> HfEngine:
    return HfEngine(load_lm(teacher), batch_size=7)


# One engine a session, because a process can hold one.


@pytest.fixture(scope="module")
def vllm(teacher):
    return open_engine("vllm", teacher, Loading("float32", 40))


def test_vllm_and_hf_agree_greedy(vllm, hf):
    """The contract of the capture: tokens, top k, log-probabilities and the exact normaliser."""
    asks = make_asks(32)
    ours, oracle = by_key(vllm.sample(asks, GREEDY, 5)), by_key(hf.sample(asks, GREEDY, 5))
    for ask in asks:
        np.testing.assert_array_equal(ours[ask.key].response_ids, oracle[ask.key].response_ids)
        assert_columns_are_those_of_the_model(ours[ask.key], ask, hf.model, 5, 1e-3)


def test_a_vllm_sample_does_not_depend_on_its_neighbours(vllm, hf):
    asks = make_asks(32)
    together = by_key(vllm.sample(asks, DRAWN, 5))
    apart = by_key(answer for ask in asks[::-1][:6] for answer in vllm.sample([ask], DRAWN, 5))
    for key, answer in apart.items():
        np.testing.assert_array_equal(answer.response_ids, together[key].response_ids)
    for ask in asks:
        assert_columns_are_those_of_the_model(together[ask.key], ask, hf.model, 5, 1e-3)


def test_vllm_scores_as_hf_does(vllm, hf):
    asks = [Ask(a.key, a.prompt_ids, 0, np.array([5, 9, 30, 2], np.int32)) for a in make_asks(12)]
    for ask, (key, answer) in zip(asks, by_key(vllm.score(asks, 5, (2,))).items(), strict=True):
        assert_columns_are_those_of_the_model(answer, next(a for a in asks if a.key == key), hf.model, 5, 1e-3)
        assert ask.response_ids[-1] == 2


def test_a_row_that_vllm_refuses_does_not_end_the_run(vllm):
    long, beyond = Ask("f" * 32, np.full(60, 5, np.int32), 1), Ask("e" * 32, np.array([5, 44], np.int32), 1)
    found = list(vllm.sample([long, beyond, *make_asks(3)], DRAWN, 5))
    reasons = {answer.key: answer.reason for answer in found if isinstance(answer, Failure)}
    assert len(found) == 5 and reasons.keys() == {long.key, beyond.key}
    assert "60" in reasons[long.key] and "44" in reasons[beyond.key]


def test_vllm_scores_an_empty_response_with_no_rows(vllm):
    asks = [
        Ask(name * 32, np.arange(4, 10, dtype=np.int32), 0, np.array(ids, np.int32))
        for name, ids in (("a", []), ("b", [5]))
    ]
    found = by_key(vllm.score(asks, 5, (2,)))
    assert [len(found[ask.key].logprobs) for ask in asks] == [0, 1]
    assert found["a" * 32].topk_ids.shape == found["a" * 32].topk_logprobs.shape == (0, 5) and not len(
        found["a" * 32].lse
    )


def test_vllm_reads_a_full_context_and_keeps_the_whole_vocabulary(vllm, hf):
    """A scored sequence that fills the context, with every token of the vocabulary at every position."""
    ask = Ask("c" * 32, np.arange(4, 38, dtype=np.int32), 0, np.array([5, 9, 30, 7, 8, 2], np.int32))
    assert len(ask.prompt_ids) + len(ask.response_ids) == 40
    (answer,) = vllm.score([ask], 44, (2,))
    assert_columns_are_those_of_the_model(answer, ask, hf.model, 44, 1e-3)


def answers_of_both(engine, asks, k: int, support: str) -> list[tuple[Ask, Answer]]:
    """Drawn ones, and the same responses scored."""
    drawn = by_key(engine.sample(asks, DRAWN, k, support=support))
    scored = by_key(engine.score(as_given(asks, drawn), k, (2,), support=support))
    return [(ask, answers[ask.key]) for answers in (drawn, scored) for ask in asks]


@pytest.fixture
def padded(vllm, monkeypatch):
    """The open engine, with a tokenizer that has 38 of the model's 44 ids."""
    monkeypatch.setattr(vllm, "loading", replace(vllm.loading, vocabulary=38))
    return vllm


def test_vllm_draws_the_support_that_the_models_logits_have(vllm, hf):
    for ask, answer in answers_of_both(vllm, make_asks(32), 5, "sampled"):
        assert_support_is_that_of(answer, causal_logits(hf.model, ask, answer.response_ids), 5, 44, 1e-3)


def test_vllm_keeps_no_padding(padded, hf):
    for ask, answer in answers_of_both(padded, make_asks(32), 5, "sampled"):
        assert_support_is_that_of(answer, causal_logits(hf.model, ask, answer.response_ids), 5, 38, 1e-3)
        assert answer.topk_ids.max() < 38


def test_where_vllm_and_hf_agree_in_the_normalisers_bits_they_keep_the_same_tokens(vllm, hf):
    asks, agreeing = make_asks(64), 0
    drawn = by_key(vllm.sample(asks, DRAWN, 5, support="sampled"))
    given = as_given(asks, drawn)
    for other in (vllm.score(given, 5, (2,), support="sampled"), hf.score(given, 5, (2,), support="sampled")):
        for key, answer in by_key(other).items():
            same = answer.lse == drawn[key].lse
            np.testing.assert_array_equal(answer.topk_ids[same], drawn[key].topk_ids[same])
            agreeing += same.sum()
    assert agreeing > 50


def test_a_sampled_support_does_not_depend_on_its_neighbours(vllm):
    asks = make_asks(32)
    together = by_key(vllm.sample(asks, DRAWN, 5, support="sampled"))
    for ask in asks[::-1][:6]:
        for key, answer in by_key(vllm.sample([ask], DRAWN, 5, support="sampled")).items():
            same = answer.lse == together[key].lse
            np.testing.assert_array_equal(answer.topk_ids[same], together[key].topk_ids[same])
            np.testing.assert_array_equal(answer.response_ids, together[key].response_ids)


def test_one_open_engine_serves_both_supports_in_turn(vllm, hf):
    asks = make_asks(8)
    for support, k in (("topk", 5), ("sampled", 3), ("topk", 0), ("sampled", 44), ("topk", 1), ("sampled", 1)):
        for ask, answer in answers_of_both(vllm, asks, k, support):
            logits = causal_logits(hf.model, ask, answer.response_ids)
            if support == "sampled":
                assert_support_is_that_of(answer, logits, k, 44, 1e-3)
                continue
            assert answer.tau is None and answer.topk_ids.shape == (len(answer.response_ids), k)
            np.testing.assert_allclose(answer.tail, 1 - logits.softmax(-1).topk(k).values.sum(-1), atol=1e-3)
            np.testing.assert_allclose(answer.lse, logits.logsumexp(-1), atol=1e-3)


def test_the_normaliser_of_k_0_is_not_the_top_1(vllm, hf):
    """A request for no token looked like one of vLLM's own, which are left alone: `lse` held its only column."""
    for ask, answer in answers_of_both(vllm, make_asks(12), 0, "topk"):
        logits = causal_logits(hf.model, ask, answer.response_ids)
        np.testing.assert_allclose(answer.lse, logits.logsumexp(-1), atol=1e-3)
        assert (answer.tail == 1).all() and answer.topk_ids.shape == (len(answer.response_ids), 0)
        np.testing.assert_allclose(
            answer.logprobs, by_key(hf.score(as_given([ask], {ask.key: answer}), 1, (2,)))[ask.key].logprobs, atol=1e-3
        )


def test_more_tokens_than_there_are_ids_are_all_of_them(padded):
    for support, width in (("topk", 44), ("sampled", 38)):
        for _, answer in answers_of_both(padded, make_asks(4), 50, support):
            assert answer.topk_ids.shape == (len(answer.response_ids), width)
            np.testing.assert_allclose(np.exp(answer.topk_logprobs).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_requests_of_vllms_own_pass_the_hook_unchanged(vllm, hf, number):
    """They ask for fewer tokens than our rows have columns behind theirs, and get log-probabilities."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=1, logprobs=number, prompt_logprobs=number, flat_logprobs=True)
    ids = [5, 9, 30]
    (output,) = vllm.llm.generate([TokensPrompt(prompt_token_ids=ids)], params, use_tqdm=False)
    with torch.no_grad():
        logprobs = hf.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    for flat, expected, own in (
        (output.prompt_logprobs, logprobs[1], ids[2]),
        (output.outputs[0].logprobs, logprobs[2], output.outputs[0].token_ids[0]),
    ):
        top = expected.topk(number)
        np.testing.assert_allclose(flat.logprobs[-number - 1 :], [expected[own], *top.values], atol=1e-3)
        assert list(flat.token_ids[-number - 1 :]) == [own, *top.indices.tolist()]


@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_logits_that_are_no_numbers_make_rows_that_are_refused_and_leave_the_engine_alive(vllm, monkeypatch, support):
    asks = make_asks(6)
    (model,) = vllm.llm.collective_rpc(lambda worker: worker.model_runner.model)
    before = by_key(vllm.sample(asks, DRAWN, 5, support=support))
    with monkeypatch.context() as patched:
        compute = model.compute_logits
        patched.setattr(model, "compute_logits", lambda *given: torch.full_like(compute(*given), torch.nan))
        found = list(vllm.score(as_given(asks, before), 5, (2,), support=support))
    assert len(found) == 6 and all(value_fault(answer) for answer in found)
    assert_identical(before, by_key(vllm.sample(asks, DRAWN, 5, support=support)))


def run_python(code: str, folder, *arguments) -> str:
    """Run a script in a process of its own (a file, so that vLLM's workers can be spawned); what it printed."""
    (folder / "script.py").write_text(code)
    command = [sys.executable, folder / "script.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def test_where_the_hook_does_not_act_vllm_gives_log_probabilities_and_no_lse(vllm, hf, monkeypatch, capsys):
    """Taken for installed, it is found out by a question, on the loaded engine."""
    asks = [Ask("a" * 32, np.array([5, 6, 7], np.int32), 1)]
    vllm.llm.collective_rpc("xkd_remove")
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.engines.vllm._patch_v1", lambda worker: lambda: None)
        vllm._hook()
    (answer,), (oracle,) = vllm.sample(asks, GREEDY, 5), hf.sample(asks, GREEDY, 5)
    given = [replace(asks[0], response_ids=oracle.response_ids)]
    for found in (answer, *vllm.score(given, 5, (2,))):
        assert found.lse is found.tail is found.tau is None
        np.testing.assert_array_equal(found.response_ids, oracle.response_ids)
        np.testing.assert_allclose(found.logprobs, oracle.logprobs, atol=1e-3)
        np.testing.assert_allclose(found.topk_logprobs, oracle.topk_logprobs, atol=1e-3)
    assert "without lse and tail" in capsys.readouterr().err
    assert [answer.topk_ids.shape[1] for answer in vllm.score(given, 0, (2,))] == [0]
    for ask in (lambda: vllm.sample(asks, GREEDY, 5, support="sampled"), lambda: vllm.score(given, 5, (2,), "sampled")):
        with pytest.raises(UserError, match=r"generate\.support=topk"):
            list(ask())
    vllm._hook()
    assert vllm.hooked


@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_a_hook_that_is_not_given_the_logits_or_makes_rows_of_another_kind_does_not_act(vllm, monkeypatch, support):
    """A vLLM that computes log-probabilities in another way, and weights of either support that do not sum to 1."""
    (sampler,) = vllm.llm.collective_rpc(lambda worker: worker.model_runner.sampler)
    assert vllm._hook_acts()
    with monkeypatch.context() as patched:
        patched.setattr(sampler, "compute_logprobs", type(sampler).compute_logprobs)
        assert not vllm._hook_acts()
    with monkeypatch.context() as patched:

        def heavier(logits, tokens, k, asked, vocabulary):
            found = kept(logits, tokens, k, asked, vocabulary)
            return found._replace(rest=found.rest + 0.1) if asked == support else found

        patched.setattr("pipeline.engines.vllm.kept", heavier)
        assert not vllm._hook_acts()
    assert vllm._hook_acts()


def test_the_hook_of_the_second_model_runner_makes_the_same_rows(monkeypatch):
    """Its scores are a Triton kernel's, for which a machine without GPU has a stand-in here; its modules are vLLM's."""
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu.sample import prompt_logprob, sampler

    from pipeline.engines.vllm import Capture, _patch_v2

    names = ["logits", "num_logprobs", "sampled_token_ids", "cu_num_logits"]
    assert list(inspect.signature(sampler.compute_topk_scores).parameters)[:4] == names

    def compute(logits, num_logprobs, sampled_token_ids, cu_num_logits=None, **options):
        ids = torch.cat([sampled_token_ids[:, None], logits.topk(num_logprobs).indices], 1)
        return LogprobsTensors(ids, logits.log_softmax(-1).gather(-1, ids), sampled_token_ids * 0 + 7, cu_num_logits)

    for module in (sampler, prompt_logprob):
        monkeypatch.setattr(module, "compute_topk_scores", compute)
    worker = Capture()
    worker.xkd_keep("sampled", 40)
    restore = _patch_v2(worker)
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(6, 44, generator=generator).bfloat16(), torch.arange(6)
    for module in (sampler, prompt_logprob):
        rows = module.compute_topk_scores(logits, 5 + 3, tokens, [0, 6], logits_mode=False)
        assert rows.cu_num_generated_tokens == [0, 6] and (rows.selected_token_ranks == 7).all()
        found = kept(logits, tokens, 5, "sampled", 40)
        expected = torch.cat([found.logprobs[:, None], found.values, torch.stack(found[3:], 1)], 1)
        assert (rows.logprobs == expected).all() and (rows.logprob_token_ids[:, 1:6] == found.ids).all()
        assert (rows.logprob_token_ids[:, [0, 6, 7, 8]] == tokens[:, None]).all()
        own = module.compute_topk_scores(logits, 2, tokens)  # a request of vLLM's own
        assert own.logprobs.shape == (6, 3) and (own.logprobs <= 0).all()
    restore()
    assert sampler.compute_topk_scores is prompt_logprob.compute_topk_scores is compute


def test_engines_fill_the_store_with_the_same_rows(vllm, teacher, tmp_path):
    """Greedy and in float32: keys, responses, numbers, and the same tokens in the top k but for near ties."""
    prompts = make_prompts(tmp_path / "prompts.parquet", train=20, validation=6)
    greedy = ("generate.temperature=0", "generate.samples=1", "generate.dtype=float32", "generate.support=topk")
    generate(
        make_params(teacher, *greedy, "generate.engine=vllm"), prompts, tmp_path / "v", tmp_path / "1", engine=vllm
    )
    generate(make_params(teacher, *greedy), prompts, tmp_path / "h", tmp_path / "2")
    for part, count in (("train", 20), ("validation", 6), ("scored", 18)):
        rows = [list(Selection(tmp_path / name).rows(part)) for name in "vh"]
        assert len(rows[0]) == count
        for ours, oracle in zip(*rows, strict=True):
            assert (ours.key, ours.origin, ours.finish) == (oracle.key, oracle.origin, oracle.finish)
            np.testing.assert_array_equal(ours.response_ids, oracle.response_ids)
            np.testing.assert_allclose(ours.logprobs, oracle.logprobs, atol=1e-3)
            np.testing.assert_allclose(ours.lse, oracle.lse, atol=1e-3)
            np.testing.assert_allclose(
                ours.topk_logprobs.astype(np.float32), oracle.topk_logprobs.astype(np.float32), atol=1e-2
            )  # float16
            gaps = np.abs(np.diff(oracle.topk_logprobs.astype(np.float32), axis=1))
            tied = np.pad(gaps < 1e-2, ((0, 0), (1, 0))) | np.pad(gaps < 1e-2, ((0, 0), (0, 1)))
            tied[:, -1] = True  # its neighbour below is not in the row
            assert ((ours.topk_ids == oracle.topk_ids) | tied).all() and tied.mean() < 0.4


SPLIT = """
import os
import pickle
import signal
import sys
from pathlib import Path
from pipeline.engines import EngineDead, Loading, open_engine
from tests.engines.test_engines import DRAWN, GREEDY, by_key, make_asks

if __name__ == "__main__":
    engine = open_engine("vllm", Path(sys.argv[1]), Loading("float32", 40, tensor_parallel=2, vocabulary=38))
    assert engine.hooked
    found = by_key(engine.sample(make_asks(8), GREEDY, 5))
    drawn = by_key(engine.sample(make_asks(8), DRAWN, 5, support="sampled"))
    with open(sys.argv[2], "wb") as file:
        pickle.dump((found, drawn), file)
    answers = engine.sample(make_asks(32), DRAWN, 5)
    next(answers)
    for worker in engine.llm.llm_engine.engine_core.engine_core.model_executor.workers:
        os.kill(worker.proc.pid, signal.SIGKILL)
    try:
        list(answers)
        list(engine.sample(make_asks(2), GREEDY, 5))
    except EngineDead as error:
        print("dead:", error)
"""


def test_a_model_in_two_processes_gives_the_same_rows_and_its_death_is_an_exception(hf, teacher, tmp_path):
    said = run_python(SPLIT, tmp_path, teacher, tmp_path / "answers")
    found, drawn = pickle.loads((tmp_path / "answers").read_bytes())
    for key, answer in by_key(hf.sample(make_asks(8), GREEDY, 5)).items():
        np.testing.assert_array_equal(found[key].response_ids, answer.response_ids)
        np.testing.assert_array_equal(found[key].topk_ids, answer.topk_ids)
        for name in ("logprobs", "topk_logprobs", "lse", "tail"):
            np.testing.assert_allclose(getattr(found[key], name), getattr(answer, name), atol=1e-3)
    for ask in make_asks(8):
        logits = causal_logits(hf.model, ask, drawn[ask.key].response_ids)
        assert_support_is_that_of(drawn[ask.key], logits, 5, 38, 1e-3)
    assert "dead: vLLM stopped: " in said


TWICE = """
import sys
from pathlib import Path
import psutil
from pipeline.engines import Loading, open_engine
from tests.engines.test_engines import GREEDY, by_key, make_asks

rows, sizes = [], []
for _ in range(2):
    engine = open_engine("vllm", Path(sys.argv[1]), Loading("float32", 40))
    answers = by_key(engine.sample(make_asks(8), GREEDY, 5))
    rows.append({key: answer.response_ids.tolist() for key, answer in answers.items()})
    sizes.append(psutil.Process().memory_info().rss)
    engine.close()
    sizes.append(psutil.Process().memory_info().rss)
assert rows[0] == rows[1]
print("freed", *[opened - closed for opened, closed in zip(sizes[::2], sizes[1::2])])
"""


def test_a_closed_engine_frees_its_cache_and_the_process_can_open_another(teacher, tmp_path):
    freed = run_python(TWICE, tmp_path, teacher).split("freed")[1].split()
    assert len(freed) == 2 and all(int(each) > 256 * 2**20 for each in freed)  # of 512 MiB


def given_to_vllm(monkeypatch, folder, loading, installed) -> tuple[list[dict], object]:
    """The arguments of each `LLM(...)` that opening the engine makes, whose workers answer `installed`; the engine."""
    made = []

    def make(**arguments):
        made.append(arguments)
        return SimpleNamespace(collective_rpc=lambda name, args=(): installed)

    monkeypatch.setattr("vllm.LLM", make)
    monkeypatch.setattr("pipeline.engines.vllm.VllmEngine._hook_acts", lambda self: True)
    return made, open_engine("vllm", folder, loading)


@pytest.mark.parametrize("gpus, disabled", [(0, "1"), (1, None)])
def test_compilation_is_off_only_where_there_is_no_gpu(monkeypatch, gpus, disabled):
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("this starts CUDA before vLLM forks"))
    runpy.run_path(str(ROOT / "pipeline/engines/vllm.py"))
    assert environment.get("TORCH_COMPILE_DISABLE") == disabled


def test_sizes_and_quantization_reach_vllm(monkeypatch, teacher):
    (given,), _ = given_to_vllm(monkeypatch, teacher, Loading("bfloat16", 40, 4, 2, "fp8"), [None] * 4 + [True] * 4)
    assert (given["tensor_parallel_size"], given["pipeline_parallel_size"]) == (4, 2)
    assert (given["quantization"], given["dtype"], given["distributed_executor_backend"]) == ("fp8", "bfloat16", "mp")
    (given,), _ = given_to_vllm(monkeypatch, teacher, Loading("float32", 40), [True])
    assert given["quantization"] is None and "distributed_executor_backend" not in given


def test_engine_options_reach_vllm_and_no_identity(monkeypatch, teacher):
    params = make_params(
        teacher,
        "generate.engine=vllm",
        "generate.engine_options={max_num_seqs: 8}",
        "generate.engine_options.block_size=32",
    )
    found = Teacher.of(params.generate)
    (given,), _ = given_to_vllm(monkeypatch, teacher, replace(found.loading, context=40), [True])
    assert (given["max_num_seqs"], given["block_size"]) == (8, 32)
    plain = make_params(teacher, "generate.engine=vllm")
    assert found.description == Teacher.of(plain.generate).description
    assert sampling_request(params, found, 1.0, 1.0) == sampling_request(plain, found, 1.0, 1.0)


@pytest.mark.parametrize("vocabulary, tokens", [(1000, 8192), (151_936, 1766), (10**6, 1024)])
def test_a_step_on_a_gpu_scores_a_bounded_number_of_tokens(monkeypatch, teacher, vocabulary, tokens):
    """At most 1 GiB of float32 logits, but never fewer tokens than there are sequences."""
    monkeypatch.setattr("pipeline.engines.vllm._ON_GPU", True)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary))
    monkeypatch.setattr("pipeline.engines.vllm.load_config", lambda folder: config)
    (given,), _ = given_to_vllm(monkeypatch, teacher, Loading("bfloat16", 40), [True])
    assert given["max_num_batched_tokens"] == tokens and "enforce_eager" not in given


@pytest.mark.parametrize(
    "installed, hooked", [([True, True], True), ([None, True], True), ([True, False], False), ([None, False], False)]
)
def test_only_a_worker_that_samples_without_the_hook_makes_the_engine_do_without_it(
    monkeypatch, teacher, installed, hooked
):
    made, engine = given_to_vllm(monkeypatch, teacher, Loading("float32", 40, 2), installed)
    assert engine.hooked == hooked
    assert [given["logprobs_mode"] for given in made] == ["raw_logprobs"]


def test_whatever_stops_vllm_comes_out_with_its_reason_and_others_may_ask_again(vllm, monkeypatch):
    def stop():
        raise AssertionError("no block left") from MemoryError("the worker ran out of memory")

    asks = make_asks(4)
    with monkeypatch.context() as patched:
        patched.setattr(vllm.llm.llm_engine, "step", stop)
        with pytest.raises(EngineDead, match="MemoryError: the worker ran out of memory"):
            list(vllm.sample(asks, GREEDY, 5))
    assert next(vllm.sample(asks, GREEDY, 5)).key in {ask.key for ask in asks}  # not listened to until the end
    assert len(by_key(vllm.sample(asks, GREEDY, 5))) == 4

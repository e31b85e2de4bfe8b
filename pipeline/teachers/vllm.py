"""The vLLM engine: responses with top-k log-probabilities and the exact normaliser in one pass.

vLLM returns either raw logits or log-probabilities. An extension of its worker appends the log-sum-exp of the raw
logits to each row of raw logits, which gives both (`Capture`). It reaches into vLLM's sampler, so vLLM is pinned;
where a first question shows that the hook is not there or does not act, it is taken out: `lse` is null.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from pipeline import console, interrupts
from pipeline.errors import reason_of
from pipeline.models import load_config
from pipeline.shards.identity import Sampling
from pipeline.shards.schema import finish_of
from pipeline.teachers.base import Answer, Ask, EngineDead, Failure, Loading

# `torch.cuda.is_available` would start CUDA here, after which vLLM could not fork its workers; this asks the driver.
_ON_GPU = torch.cuda.device_count() > 0

# Before the first import of vllm: one process instead of three, and on a CPU no compilation at the first request.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
if not _ON_GPU:
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
# A scored sequence may fill the context; vLLM wants room for one token more, which is never run.
os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")

_CPU_CACHE_BYTES = 512 * 2**20  # the default asks for nearly all of the machine's memory
_BATCHED = 8192  # most tokens in one step on a GPU
_SCORE_BYTES = 2**30  # of float32 logits in one step
_LSE_ROWS = 256  # whose float32 copies are in memory at once
_IN_FLIGHT = 1024  # requests inside vLLM at once: enough to keep it busy, bounded for memory


class Capture:
    """Mixed into vLLM's worker: each row becomes logits of [sampled, top 1..k] and lse, a column more than asked for.

    The engine is loaded for log-probabilities, which it goes back to when the hook is taken out again.
    """

    def xkd_install(self) -> bool | None:
        """Patch the sampler of this worker. False where this vLLM has no such hook; None where it is never used.

        Of a pipeline only the last stage computes logits.
        """
        from vllm.distributed import get_pp_group

        if not get_pp_group().is_last_rank:
            return None
        patch = _patch_v2 if getattr(self, "use_v2_model_runner", False) else _patch_v1
        self.xkd_restore = patch(self.model_runner)
        return self.xkd_restore is not None

    def xkd_remove(self) -> None:
        """Undo `xkd_install`."""
        if getattr(self, "xkd_restore", None):
            self.xkd_restore()


def _patch_v1(model_runner) -> Callable[[], None] | None:
    """The hook for vLLM's first model runner; returns how to take it out, None where it does not fit."""
    sampler = getattr(model_runner, "sampler", None)
    if not hasattr(sampler, "gather_logprobs") or not hasattr(sampler, "compute_logprobs"):
        return None
    gather = sampler.gather_logprobs

    def gather_with_lse(logits, num_logprobs, token_ids):
        if num_logprobs < 2:  # vLLM's own warm-up requests
            return gather(logits, num_logprobs, token_ids)
        return _with_lse(gather(logits, num_logprobs - 1, token_ids), logits)

    # A copy, because vLLM changes the logits afterwards; its own log-probabilities are one too.
    sampler.compute_logprobs = lambda logits: logits.to(torch.float32, copy=True)
    sampler.gather_logprobs = gather_with_lse

    def restore() -> None:
        del sampler.compute_logprobs, sampler.gather_logprobs

    return restore


def _patch_v2(_model_runner) -> Callable[[], None] | None:
    """The same for vLLM's second model runner (GPUs only), whose sampler calls a module function."""
    try:
        from vllm.v1.worker.gpu.sample import prompt_logprob, sampler

        compute = sampler.compute_topk_scores
    except (ImportError, AttributeError):
        return None

    def compute_with_lse(logits, num_logprobs, *args, **options):
        if num_logprobs < 2:
            return compute(logits, num_logprobs, *args, **options)
        return _with_lse(compute(logits, num_logprobs - 1, *args, **{**options, "logits_mode": True}), logits)

    def restore() -> None:
        sampler.compute_topk_scores = prompt_logprob.compute_topk_scores = compute

    sampler.compute_topk_scores = prompt_logprob.compute_topk_scores = compute_with_lse
    return restore


def _with_lse(rows, logits: torch.Tensor):
    """vLLM's rows (ids and values [N, 1 + k]) with the log-sum-exp of `logits` as a last column; its id is top 1's."""
    lse = torch.cat([torch.logsumexp(some.float(), -1, keepdim=True) for some in logits.split(_LSE_ROWS)])
    ids = torch.cat([rows.logprob_token_ids, rows.logprob_token_ids[:, 1:2]], 1)
    return rows._replace(logprob_token_ids=ids, logprobs=torch.cat([rows.logprobs, lse], 1))


class VllmEngine:
    """One vLLM instance; requests go in as token ids and are never detokenised by vLLM."""

    def __init__(self, folder: Path, loading: Loading):
        self.folder, self.loading = folder, loading
        self.vocab_size = load_config(folder).get_text_config().vocab_size
        with console.muted():
            self.llm = self._load()
        self._hook()
        import vllm

        self.description = {"engine": "vllm", "vllm": vllm.__version__, "torch": torch.__version__}

    def _hook(self) -> None:
        """Have vLLM return lse as well, if it can be made to."""
        self.lse = False not in self.llm.collective_rpc("xkd_install") and self._hook_acts()
        if not self.lse:
            self.llm.collective_rpc("xkd_remove")
            console.warn("this vLLM cannot be made to return the logits' normaliser: rows are stored without lse")

    def _hook_acts(self) -> bool:
        """Ask for one token after a prompt of two: its rows and the prompt's must be [sampled, top 1, lse]."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=1, logprobs=2, prompt_logprobs=2, flat_logprobs=True, detokenize=False
        )
        ask = Ask("hook", np.zeros(2, np.int32))
        found = self._run([ask], lambda ask: ask.prompt_ids, lambda ask: params, lambda ask, output: output)
        output = next(found)
        for flat in (output.prompt_logprobs, output.outputs[0].logprobs):
            (_, first, second), (_, top, lse) = flat.token_ids[-3:], flat.logprobs[-3:]
            if first != second or not math.isfinite(lse) or lse < top:
                return False
        return True

    def _load(self):
        from vllm import LLM

        # Scores of prompt tokens take float32 logits over the vocabulary, which vLLM does not reckon with.
        batched = min(_BATCHED, max(_IN_FLIGHT, _SCORE_BYTES // (4 * self.vocab_size)))
        options = {"max_num_batched_tokens": batched} if _ON_GPU else {
            "enforce_eager": True,  # compiling takes longer than small runs do
            "kv_cache_memory_bytes": _CPU_CACHE_BYTES,
            # A prompt prefilled in pieces rewinds its random generator, which CPU generators cannot (vLLM 0.32).
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, self.loading.context),
        }  # fmt: skip
        if self.loading.devices > 1:
            # Not Ray's, which vLLM would choose inside of one of our replicas.
            options["distributed_executor_backend"] = "mp"
            if not _ON_GPU:  # binding wants a NUMA node a process
                os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        options |= self.loading.engine_options
        return LLM(
            model=str(self.folder),
            dtype=self.loading.dtype,
            quantization=self.loading.quantization or None,
            tensor_parallel_size=self.loading.tensor_parallel,
            pipeline_parallel_size=self.loading.pipeline_parallel,
            max_model_len=self.loading.context + 1,
            max_logprobs=self.vocab_size + 1,
            logprobs_mode="raw_logprobs",
            worker_extension_cls="pipeline.teachers.vllm.Capture",
            generation_config="vllm",
            seed=0,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )

    def sample(self, asks: Iterable[Ask], sampling: Sampling, k: int) -> Iterator[Answer | Failure]:
        from vllm import SamplingParams

        def params(ask: Ask):
            return SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                seed=ask.seed,
                logprobs=k + self.lse,
                flat_logprobs=True,
                detokenize=False,
            )

        def answer(ask: Ask, output) -> Answer:
            completion = output.outputs[0]
            response = np.asarray(completion.token_ids, np.int32)
            return self._answer(ask, response, completion.finish_reason, completion.logprobs, k)

        return self._run(asks, lambda ask: ask.prompt_ids, params, answer)

    def score(self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int]) -> Iterator[Answer | Failure]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=k + self.lse, flat_logprobs=True, detokenize=False
        )

        def answer(ask: Ask, output) -> Answer:
            finish = finish_of(ask.response_ids, stop_token_ids)
            return self._answer(ask, ask.response_ids, finish, output.prompt_logprobs, k)

        def tokens(ask: Ask) -> np.ndarray:
            return np.concatenate([ask.prompt_ids, ask.response_ids])

        return self._run(asks, tokens, lambda ask: params, answer)

    def _run(self, asks: Iterable[Ask], tokens, params, answer) -> Iterator[Answer | Failure]:
        """Keep vLLM full and hand out whatever finishes. Raises EngineDead with vLLM's reason where it stops."""
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import TokensPrompt

        engine, waiting, running = self.llm.llm_engine, iter(asks), {}
        try:
            while True:
                while len(running) < _IN_FLIGHT and (ask := next(waiting, None)) is not None:
                    try:
                        prompt = TokensPrompt(prompt_token_ids=tokens(ask).tolist())
                        engine.add_request(ask.key, prompt, params(ask))
                        running[ask.key] = ask
                    except (ValueError, VLLMValidationError) as error:
                        yield Failure(ask.key, reason_of(error))
                if not running:
                    return
                for output in self._step():
                    if output.finished:
                        yield answer(running.pop(output.request_id), output)
        finally:  # whoever stops listening leaves nothing behind for the next who asks
            with suppress(Exception):
                engine.abort_request(list(running))

    def _step(self) -> list:
        try:
            with interrupts.allowed():
                return self.llm.llm_engine.step()
        except Exception as error:
            raise EngineDead(f"vLLM stopped: {reason_of(error.__cause__ or error)}") from error

    def _answer(self, ask: Ask, response: np.ndarray, finish: str, flat, k: int) -> Answer:
        """`flat` holds rows of [sampled, top 1..k] and, with the capture, lse; only the response's rows are read."""
        width = k + 1 + self.lse
        values = np.fromiter(flat.logprobs, np.float32, len(flat.logprobs)).reshape(-1, width)
        ids = np.fromiter(flat.token_ids, np.int32, len(flat.token_ids)).reshape(-1, width)
        first = len(values) - len(response)  # not [-len(response) :], which is everything where the response is empty
        values, ids = values[first:], ids[first:]
        lse = values[:, -1].copy() if self.lse else None
        normaliser = lse[:, None] if self.lse else np.float32(0)
        logprobs = values[:, : k + 1] - normaliser
        return Answer(ask.key, response, finish, logprobs[:, 0], ids[:, 1 : k + 1], logprobs[:, 1:], lse)

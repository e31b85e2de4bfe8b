"""The vLLM engine: responses with a support of k tokens at every position and the exact normaliser in one pass.

vLLM returns the likeliest tokens alone. An extension of its worker makes each row out of the raw logits, where they
are: log-probabilities of the tokens that are kept, and what else there is to know of the position (`Capture`). It
reaches into vLLM's sampler, so vLLM is pinned; where a first question shows that the hook is not there or does not act,
it is taken out: a top k has no `lse` and no `tail` then, and there is no sampled support.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from pipeline import console, interrupts
from pipeline.engines.base import Answer, Answers, Ask, EngineDead, Failure, Loading
from pipeline.engines.kept import Kept, kept
from pipeline.errors import UserError, reason_of
from pipeline.models import load_config
from pipeline.store.identity import Sampling
from pipeline.store.schema import finish_of

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
_EXTRA = 3  # columns behind a row's tokens: lse, tau or tail, dropped; vLLM's own requests ask for fewer tokens
_UNHOOKED = "gives no access to its logits"
_IN_FLIGHT = 1024  # requests inside vLLM at once: enough to keep it busy, bounded for memory


class Capture:
    """Mixed into vLLM's worker: a row becomes [sampled, kept 1..k, lse, tau or tail, dropped], k + 3 behind the first.

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
        self.xkd_restore = patch(self)
        return self.xkd_restore is not None

    def xkd_remove(self) -> None:
        """Undo `xkd_install`."""
        if getattr(self, "xkd_restore", None):
            self.xkd_restore()

    def xkd_keep(self, support: str, vocabulary: int | None) -> None:
        """The support of all that is asked from now on, and how many ids are not padding."""
        self.xkd_support, self.xkd_vocabulary = support, vocabulary

    def xkd_columns(self, logits: torch.Tensor, number: int, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The ids and values [N, 1 + number] of vLLM's rows. The columns behind the tokens have the first one's id."""
        own = tokens[:, None].int()
        captured = kept(logits, tokens, number - _EXTRA, self.xkd_support, self.xkd_vocabulary)
        ids = torch.cat([own, captured.ids, own.expand(-1, _EXTRA)], 1)
        more = torch.stack([captured.lse, captured.rest, captured.dropped], 1)
        return {"logprob_token_ids": ids, "logprobs": torch.cat([captured.logprobs[:, None], captured.values, more], 1)}


def _patch_v1(worker: Capture) -> Callable[[], None] | None:
    """The hook for vLLM's first model runner; returns how to take it out, None where it does not fit."""
    from vllm.v1.outputs import LogprobsTensors

    sampler = getattr(worker.model_runner, "sampler", None)
    if not hasattr(sampler, "gather_logprobs") or not hasattr(sampler, "compute_logprobs"):
        return None
    compute, gather = sampler.compute_logprobs, sampler.gather_logprobs
    copied: list[torch.Tensor] = []

    def copy_logits(logits):
        """In the place of log-probabilities; a copy, because vLLM changes the logits afterwards."""
        copied[:] = [logits.to(torch.float32, copy=True)]
        return copied[0]

    def gather_kept(logprobs, num_logprobs, token_ids):
        raw = bool(copied) and logprobs is copied.pop()
        if num_logprobs < _EXTRA or not raw:
            return gather(compute(logprobs) if raw else logprobs, num_logprobs, token_ids)
        ranks = torch.zeros(len(token_ids), dtype=torch.int32, device=token_ids.device)  # nobody reads them
        return LogprobsTensors(**worker.xkd_columns(logprobs, num_logprobs, token_ids), selected_token_ranks=ranks)

    sampler.compute_logprobs, sampler.gather_logprobs = copy_logits, gather_kept

    def restore() -> None:
        del sampler.compute_logprobs, sampler.gather_logprobs

    return restore


def _patch_v2(worker: Capture) -> Callable[[], None] | None:
    """The same for vLLM's second model runner (GPUs only), whose sampler calls a module function with raw logits."""
    try:
        from vllm.v1.worker.gpu.sample import prompt_logprob, sampler

        compute = sampler.compute_topk_scores
    except (ImportError, AttributeError):
        return None

    def compute_kept(logits, num_logprobs, sampled_token_ids, *args, **options):
        if num_logprobs < _EXTRA:
            return compute(logits, num_logprobs, sampled_token_ids, *args, **options)
        rows = compute(logits, 0, sampled_token_ids, *args, **options)
        return rows._replace(**worker.xkd_columns(logits, num_logprobs, sampled_token_ids))

    def restore() -> None:
        sampler.compute_topk_scores = prompt_logprob.compute_topk_scores = compute

    sampler.compute_topk_scores = prompt_logprob.compute_topk_scores = compute_kept
    return restore


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
        """Have vLLM's workers make our rows, if they can be made to."""
        self.hooked = False not in self.llm.collective_rpc("xkd_install")
        if not self.hooked or not self._hook_acts():
            self.hooked = False
            self.llm.collective_rpc("xkd_remove")
            console.warn(f"this vLLM {_UNHOOKED}: rows of generate.support=topk are stored without lse and tail")

    def _hook_acts(self) -> bool:
        """Ask for a top 1, two drawn tokens and none, after a prompt of two: in the rows of both, weights sum to 1."""
        return all(
            _is_ours(np.asarray(flat.logprobs[-k - 1 - _EXTRA :]), flat.token_ids[-k - 1 - _EXTRA :], support)
            for support, k in (("topk", 1), ("sampled", 2), ("topk", 0))
            for flat in self._first_rows(support, k)
        )

    def _first_rows(self, support: str, k: int) -> tuple:
        """vLLM's rows of a prompt of two tokens, and of the likeliest one after it."""
        width = k + _EXTRA
        params = _params(temperature=0, max_tokens=1, logprobs=width, prompt_logprobs=width)
        ask = Ask("hook", np.zeros(2, np.int32))
        answers = self._run([ask], support, lambda ask: ask.prompt_ids, lambda ask: params, lambda ask, output: output)
        (output,) = answers
        return output.prompt_logprobs, output.outputs[0].logprobs

    def close(self) -> None:
        """End vLLM's engine and leave its process groups, so that this process can open another one."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        with console.muted(), suppress(Exception):  # of an engine that died there may be nothing left to end
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            cleanup_dist_env_and_memory()

    @property
    def extra(self) -> int:
        """Columns of vLLM's rows behind the tokens."""
        return _EXTRA if self.hooked else 0

    def _keep(self, support: str) -> None:
        """Have the workers keep this support of all that is asked next: orders are answered one after the other.

        Raises UserError where this vLLM cannot make it.
        """
        if self.hooked:
            with _vllm_works():
                self.llm.collective_rpc("xkd_keep", args=(support, self.loading.vocabulary))
        elif support == "sampled":
            raise UserError(f"this vLLM {_UNHOOKED}, so it draws no support: use generate.support=topk, or --engine hf")

    def _load(self):
        from vllm import LLM

        # Scores of prompt tokens take float32 logits over the vocabulary, which vLLM does not count.
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
            if not _ON_GPU:  # binding wants one NUMA node per process
                os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        options |= self.loading.engine_options
        return LLM(
            model=str(self.folder),
            dtype=self.loading.dtype,
            quantization=self.loading.quantization or None,
            tensor_parallel_size=self.loading.tensor_parallel,
            pipeline_parallel_size=self.loading.pipeline_parallel,
            max_model_len=self.loading.context + 1,
            max_logprobs=self.vocab_size + _EXTRA,
            logprobs_mode="raw_logprobs",
            worker_extension_cls="pipeline.engines.vllm.Capture",
            generation_config="vllm",
            seed=0,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )

    def sample(self, asks: Iterable[Ask], sampling: Sampling, k: int, support: str = "topk") -> Answers:
        k = min(k, self._ids(support))
        asked = asdict(sampling) | {"stop_token_ids": list(sampling.stop_token_ids), "logprobs": k + self.extra}

        def answer(ask: Ask, output) -> Answer:
            completion = output.outputs[0]
            response = np.asarray(completion.token_ids, np.int32)
            return self._answer(ask, response, completion.finish_reason, completion.logprobs, k, support)

        return self._run(asks, support, lambda ask: ask.prompt_ids, lambda ask: _params(**asked, seed=ask.seed), answer)

    def score(self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int], support: str = "topk") -> Answers:
        k = min(k, self._ids(support))
        params = _params(temperature=0, max_tokens=1, prompt_logprobs=k + self.extra)

        def answer(ask: Ask, output) -> Answer:
            finish = finish_of(ask.response_ids, stop_token_ids)
            return self._answer(ask, ask.response_ids, finish, output.prompt_logprobs, k, support)

        def tokens(ask: Ask) -> np.ndarray:
            return np.concatenate([ask.prompt_ids, ask.response_ids])

        return self._run(asks, support, tokens, lambda ask: params, answer)

    def _ids(self, support: str) -> int:
        """How many ids a support can have."""
        known = self.loading.vocabulary if support == "sampled" else None
        return min(self.vocab_size, known or self.vocab_size)

    def _run(self, asks: Iterable[Ask], support: str, tokens, params, answer) -> Answers:
        """Keep vLLM full and hand out whatever finishes. Raises EngineDead with vLLM's reason where it stops."""
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import TokensPrompt

        self._keep(support)
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
                with _vllm_works(), interrupts.allowed():
                    outputs = engine.step()
                for output in outputs:
                    if output.finished:
                        yield answer(running.pop(output.request_id), output)
        finally:  # whoever stops listening leaves nothing behind for the next who asks
            with suppress(Exception):
                engine.abort_request(list(running))

    def _answer(self, ask: Ask, response: np.ndarray, finish: str, flat, k: int, support: str) -> Answer:
        """`flat` holds vLLM's rows, which are those of `Capture` where it is hooked; only the response's are read."""
        width = k + 1 + self.extra
        values = torch.from_numpy(np.fromiter(flat.logprobs, np.float32, len(flat.logprobs)).reshape(-1, width))
        ids = torch.from_numpy(np.fromiter(flat.token_ids, np.int32, len(flat.token_ids)).reshape(-1, width))
        first = len(values) - len(response)  # not [-len(response) :], which is everything where the response is empty
        values, ids = values[first:], ids[first:]
        logprobs, ids, topk = values[:, 0], ids[:, 1 : k + 1], values[:, 1 : k + 1]
        if self.extra:
            return Kept(logprobs, ids, topk, *values[:, k + 1 :].unbind(1)).answer(ask.key, response, finish, support)
        return Answer(ask.key, response, finish, logprobs.numpy(), ids.numpy(), topk.numpy(), None)


def _params(**options):
    from vllm import SamplingParams

    return SamplingParams(flat_logprobs=True, detokenize=False, **options)


@contextmanager
def _vllm_works():
    """Raises EngineDead where vLLM raises anything."""
    try:
        yield
    except Exception as error:
        raise EngineDead(f"vLLM stopped: {reason_of(error.__cause__ or error)}") from error


def _is_ours(values: np.ndarray, ids: Sequence[int], support: str) -> bool:
    """Whether a row is one of `Capture`: the first id again behind the tokens, and weights that sum to 1, or are NaN.

    vLLM's own rows have no token twice behind the first.
    """
    rest, masses = values[-2], np.exp(values[1:-_EXTRA])
    total = np.maximum(masses, rest).sum() if support == "sampled" else masses.sum() + rest
    return ids[-_EXTRA:] == ids[:1] * _EXTRA and not abs(total - 1) > 1e-3

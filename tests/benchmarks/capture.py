"""What keeping log-probabilities costs: our vLLM engine against bare vLLM that draws the same tokens without any.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.capture MODEL FILE:COLUMN ... [--k 16] [--prompts 64] [--tokens 64]

Bare vLLM is an `LLM` that this project has not touched, in a process of its own; both sides have the same options,
prompts and seeds, and neither detokenises. They take turns, each time with an empty prefix cache, and must draw the
same tokens. `sampled` and `topk` are all that `VllmEngine.sample` does with either support, `shards` also decodes the
text and writes shards of sampled rows. Prints JSON; exit code 1 where the sampled answers come at less than 0.85 times
the speed of bare vLLM. About eight minutes for SmolLM2-135M on two cores. `--cpu-time` counts the seconds in which a
side has a core, for a machine without a GPU that others use as well.
"""

import json
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection

import numpy as np

from pipeline import console
from pipeline.engines import Ask, Engine
from pipeline.params import Generate
from pipeline.store.identity import Sampling
from pipeline.store.storage import Storage
from pipeline.teacher.orders import Order
from pipeline.teacher.session import Session
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.writing import make
from tests.benchmarks.texts import arguments, start, to_draw

BAR = 0.85
Drawn = dict[str, list[int]]  # key -> the response's token ids


def bare_vllm(
    connection: Connection, folder: str, dtype: str, context: int, asks: Sequence[Ask], sampling: Sampling, clock
):
    """In a process of its own: an `LLM` as its documentation makes one, which draws all asks for each message."""
    import torch

    from pipeline.engines import vllm as ours

    # isort: split
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    options = {} if torch.cuda.is_available() else {
        "enforce_eager": True,
        "kv_cache_memory_bytes": ours._CPU_CACHE_BYTES,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, context),
    }  # fmt: skip
    with console.muted():
        llm = LLM(model=folder, dtype=dtype, max_model_len=context + 1, generation_config="vllm", seed=0,
                  disable_log_stats=True, use_tqdm_on_load=False, **options)  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=ask.prompt_ids.tolist()) for ask in asks]
    params = [
        SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            seed=ask.seed,
            detokenize=False,
        )
        for ask in asks
    ]
    connection.send("ready")
    while connection.recv():
        llm.reset_prefix_cache()
        begun = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - begun
        connection.send((seconds, {a.key: list(o.outputs[0].token_ids) for a, o in zip(asks, outputs, strict=True)}))


def draw_answers(
    engine: Engine, asks: Sequence[Ask], sampling: Sampling, k: int, support: str, clock=time.perf_counter
) -> tuple[float, Drawn]:
    """Seconds and tokens of everything up to the answers."""
    begun = clock()
    answers = list(engine.sample(asks, sampling, k, support=support))
    seconds = clock() - begun
    return seconds, {answer.key: answer.response_ids.tolist() for answer in answers}


def write_shards(engine: Engine, teacher: Teacher, order: Order, clock=time.perf_counter) -> tuple[float, Drawn]:
    """The same up to shards in an empty store."""
    with tempfile.TemporaryDirectory() as root, Session(teacher, Storage(root), engine) as session:
        (plan,) = session.plan([order])
        begun = clock()
        make(plan, engine)
        seconds = clock() - begun
        (plan,) = session.plan([order])
        rows = plan.folder.read(plan.locations[item.key] for item in order.items)
    return seconds, {row.key: row.response_ids.tolist() for row in rows}


def take_turns(runs: dict[str, Callable[[], tuple[float, Drawn]]], repetitions: int) -> dict[str, list[float]]:
    """Tokens per second of each run in each repetition, after one that does not count.

    Raises ValueError where two runs drew different tokens: their work was not the same.
    """
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        results = {name: run() for name, run in runs.items()}
        (first, (_, expected)), *others = results.items()
        for name, (_, drawn) in others:
            if drawn != expected:
                different = sum(drawn.get(key) != tokens for key, tokens in expected.items())
                raise ValueError(f"{name} drew other tokens than {first} for {different} of {len(expected)} prompts")
        if repetition:
            for name, (seconds, drawn) in results.items():
                rates[name].append(sum(map(len, drawn.values())) / seconds)
    return rates


def summary(rates: dict[str, list[float]], against: str) -> dict:
    """Median and extremes of the rates, and of their ratios within each repetition."""

    def spread(values: np.ndarray) -> dict[str, float]:
        return {"median": float(np.median(values)), "least": float(values.min()), "most": float(values.max())}

    base = np.array(rates[against])
    return {
        "tokens_per_second": {name: spread(np.array(values)) for name, values in rates.items()},
        f"ratio_to_{against}": {name: spread(values / base) for name, values in rates.items() if name != against},
    }


def main() -> int:
    parser = arguments(__doc__.split("\n")[0], prompts=64, tokens=64)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    teacher = Teacher.of(Generate(teacher=options.model, engine="vllm", k=options.k))
    order = to_draw(options, teacher)
    asks, sampling = [item.ask() for item in order.items], order.request.sampling
    context = max(len(ask.prompt_ids) for ask in asks) + sampling.max_tokens

    here, there = multiprocessing.Pipe()
    dtype = teacher.description["dtype"]
    process = multiprocessing.get_context("spawn").Process(
        target=bare_vllm, args=(there, str(teacher.source), dtype, context, asks, sampling, clock), daemon=True
    )
    process.start()
    there.close()  # so that a process that dies is an EOFError here
    here.recv()
    engine = start(teacher, order)

    def bare() -> tuple[float, Drawn]:
        here.send(True)
        return here.recv()

    def answers(support: str) -> tuple[float, Drawn]:
        engine.llm.reset_prefix_cache()
        return draw_answers(engine, asks, sampling, options.k, support, clock)

    def shards() -> tuple[float, Drawn]:
        engine.llm.reset_prefix_cache()
        return write_shards(engine, teacher, order, clock)

    try:
        ours = {support: partial(answers, support) for support in ("sampled", "topk")}
        rates = take_turns({"bare": bare, **ours, "shards": shards}, options.repetitions)
    finally:
        here.send(False)
        process.join()
    import torch

    spreads = summary(rates, "bare")
    setting = {
        "k": options.k, "prompts": len(asks), "prompt_tokens": sum(len(ask.prompt_ids) for ask in asks),
        "max_tokens": options.tokens, "vocab_size": teacher.description["vocab_size"], "dtype": dtype,
        "repetitions": options.repetitions, "clock": clock.__name__, "threads": torch.get_num_threads(),
        "machine": platform.machine(), **engine.description,
    }  # fmt: skip
    met = spreads["ratio_to_bare"]["sampled"]["median"] >= BAR
    print(json.dumps({"setting": setting, **spreads, "bar": BAR, "met": met}, indent=2))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

"""Small real models and files that the tests share. Every test has an empty store of its own."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from pipeline.console import quiet_libraries
from pipeline.params import Params
from pipeline.params.file import load_params
from pipeline.prompts import Prompt, prompt_id, write_prompts

quiet_libraries()
ROOT = Path(__file__).parents[1]
WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XKD_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def one_thread():
    """What is promised bit by bit is promised on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def at_once(seconds: int = 60):
    """Ends what waits for something that never comes."""

    def stop(*_):
        raise TimeoutError("it waited for a pipe")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make_model(
    folder: Path, seed: int, words=WORDS, width=64, layers=2, context=64, sharpen=2.0, chat_template: str | None = None
) -> Path:
    """A tiny causal model whose weights are scaled up, so that its distributions are not uniform."""
    import torch

    from pipeline.models import build_causal_lm, save_model, word_tokenizer
    from pipeline.params import Model

    tokenizer = word_tokenizer(list(words))
    tokenizer.chat_template = chat_template
    size = Model(width=width, layers=layers, heads=width // 32, intermediate=2 * width)
    model = build_causal_lm(size, tokenizer, context, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(sharpen)
    save_model(folder, model, tokenizer, "---\nlicense: apache-2.0\n---\n# a test model\n")
    return folder


def make_seq2seq_model(folder: Path, seed: int, width: int = 32, tied: bool = True) -> Path:
    """A tiny T5; with tied embeddings it scales its last states, as the first T5 models do."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from pipeline.models import save_model, word_tokenizer

    tokenizer = word_tokenizer(WORDS)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "lm_head" not in name:  # an untied head is large as it is
                parameter.mul_(2.0)
    save_model(folder, model, tokenizer, "---\nlicense: apache-2.0\n---\n# a test model\n")
    return folder


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_chat_model(folder: Path, seed: int, layers: int = 2) -> Path:
    """`make_model` with a chat template whose marks are words of the tokenizer."""
    words = [*WORDS, "<user>", "<system>", "<assistant>"]
    return make_model(folder, seed, words, width=32, layers=layers, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher") / "model", seed=0)


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("student") / "model", seed=1, width=32, layers=1, sharpen=1.0)


def make_prompts(path: Path, train: int, validation: int = 0, test: int = 0) -> Path:
    """Distinct prompts of three words, each with one reference of four."""

    def prompt(number: int, split: str) -> Prompt:
        text = " ".join(WORDS[(number // 40**power) % 40] for power in range(3))
        reference = " ".join(WORDS[(number * 7 + step * 3) % 40] for step in range(4))
        return Prompt(prompt_id(text), text, (reference,), split)

    splits = ["train"] * train + ["validation"] * validation + ["test"] * test
    write_prompts(path, [prompt(number, split) for number, split in enumerate(splits)])
    return path


def make_params(teacher: Path, *overrides: str) -> Params:
    """Defaults at test size, for the models and prompts above."""
    given = [
        f"generate.teacher={teacher}", "generate.engine=hf", "generate.k=8", "generate.rows_per_shard=8",
        "max_tokens=6",
        "template={prompt}", "generate.max_skipped=0", "reward.optimisation.steps=10", "reward.evaluate_every=5",
        "reward.phi_kl=[0.1]", "reward.bootstrap=20", 
        "score.validation_samples=6", "distill.optimisation.steps=10", "distill.log_every=5",
        "distill.evaluate_every=5", "distill.save_every=5", "evaluate.samples=2", "evaluate.bootstrap=20",
    ]  # fmt: skip
    return load_params(None, [*given, *overrides])


@pytest.fixture(scope="session")
def cache(teacher, student, tmp_path_factory):
    """A folder with prompts, the cached teacher, and what it was given to score."""
    from stages.generate import generate
    from stages.score import score

    folder = tmp_path_factory.mktemp("cache")
    prompts = make_prompts(folder / "prompts.parquet", train=40, validation=8, test=12)
    generate(make_params(teacher), prompts, folder / "selection", folder / "store", answers=folder / "answers")
    score(make_params(teacher), prompts, student, folder / "scored", folder / "store")
    return folder


@pytest.fixture
def rewritten(cache, teacher, student, tmp_path, monkeypatch):
    """`rewritten(name)`: a folder with copies of `cache`'s selections, replaced by others when `name` is called.

    The others hold the same rows with fewer tokens per position, so no teacher is asked.
    """
    from stages.generate import generate
    from stages.score import score

    for name in ("selection", "scored"):
        shutil.copytree(cache / name, tmp_path / "copies" / name)

    def at_call(name: str) -> Path:
        module, _, function = name.rpartition(".")
        called = getattr(import_module(module), function)

        def rewrite_and_call(*arguments, **options):
            params = make_params(teacher, "generate.k=4")
            generate(params, cache / "prompts.parquet", tmp_path / "copies" / "selection", cache / "store")
            score(params, cache / "prompts.parquet", student, tmp_path / "copies" / "scored", cache / "store")
            return called(*arguments, **options)

        monkeypatch.setattr(name, rewrite_and_call)
        return tmp_path / "copies"

    return at_call


@pytest.fixture(scope="session")
def fitted(cache, teacher, student):
    """The folder of the reward fitted on it; its audit lies beside it."""
    from stages.reward import reward

    paths = cache / "selection", student, cache / "reward", cache / "audit", cache / "runs"
    params = make_params(teacher, "prepare.task=translation")  # its metric tells random answers apart
    reward(params, *paths, scored_path=cache / "scored", prompts_path=cache / "prompts.parquet")
    return cache / "reward"


def run_cli(
    *arguments: object, cwd: Path = ROOT, env: dict[str, str] | None = None, fresh: bool = False
) -> subprocess.CompletedProcess:
    """`xkd-pipeline ARGUMENTS` as a process of its own, forked with all libraries unless it is to be a fresh one."""
    from tests.processes import finished

    environment = {"COLUMNS": "200"} | (env or {})
    if not fresh:
        return finished(*arguments, cwd=cwd, **environment)
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)

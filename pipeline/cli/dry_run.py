"""What `generate` would find in the store and what the rest would take, without running a model.

A teacher whose weights are not on this machine cannot be looked up, since they decide which teacher it is: for the
rest a configuration and, if there is one, a tokenizer are enough.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import console
from pipeline.cli.listing import Column, Form, Listing
from pipeline.engines import Loading
from pipeline.errors import UserError
from pipeline.models import Context, has_weights, load_config, load_tokenizer, local_folder, number_type, stop_token_ids
from pipeline.params import Generate, Params
from pipeline.prompts import PromptFormat
from pipeline.store.requests import open_store
from pipeline.teacher.cost import SEQUENCES, Held, ModelMemory, Need, bytes_per_token
from pipeline.teacher.items import Item, read_as_models_do
from pipeline.teacher.orders import Order, Plan
from pipeline.teacher.session import Session
from pipeline.teacher.summary import Summary
from pipeline.teacher.teacher import Teacher
from stages.generate import answers_of, orders_of, prompts_to_ask

CHARACTERS = 4  # per token of English text, where there is no tokenizer
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
_UNKNOWN = "unknown"  # identity of a teacher without weights


@dataclass(frozen=True)
class Assumptions:
    """What is assumed where the store and the prompts do not say."""

    tokens: float | None = None  # response tokens to plan for, instead of a file of prompts
    rate: float | None = None  # response tokens per second and GPU
    gpus: int | None = None  # None: as few as hold one copy
    memory: float = 80  # GiB per GPU


@dataclass(frozen=True)
class Estimate:
    """What the missing rows of one request take, with responses of the greatest and of the expected length."""

    plan: Plan
    held: Held
    most: Need
    expected: Need


@dataclass(frozen=True)
class Gpus:
    """What one copy of the teacher takes, and how many GPUs are used."""

    model: ModelMemory
    longest: int  # tokens of the longest sequence
    copy: int  # GPUs
    used: int


def dry_run(
    params: Params,
    prompts_path: Path,
    store: str | Path | None = None,
    retry_skipped: bool = False,
    assumed: Assumptions = Assumptions(),
    form: Form = Form.TEXT,
    answers: bool = False,
) -> Summary:
    """Say what is cached, what is missing and what that takes; writes nothing but a URL's mirror.

    answers: with the teacher's answers to the test prompts.
    """
    if assumed.tokens and params.generate.responses:
        raise UserError("--tokens plans responses of the teacher, but generate.responses gives them: leave one out")
    prompts = [] if assumed.tokens else prompts_to_ask(params, prompts_path)
    teacher = _teacher(params.generate)
    read, _ = read_as_models_do(prompts, PromptFormat.of(params), teacher.tokenizer)
    orders = [*orders_of(params, read, teacher), *(answers_of(params, read, teacher) if answers else ())]
    plans = Session(teacher, open_store(store)).plan(orders, retry_skipped, set_aside=False)
    missing = sum(len(plan.to_make) for plan in plans)
    takes = bool(missing or assumed.tokens)
    estimates = _estimates(params, plans, assumed) if takes or form is not Form.TEXT else []
    gpus = _gpus(params, teacher, plans, assumed) if takes and teacher.engine != "text" else None
    if form is Form.TEXT:
        if not assumed.tokens:
            Listing(_REQUEST_COLUMNS, plans).show("dry run: nothing was generated")
        if takes:
            _show_cost(params, teacher, estimates, gpus, assumed)
        _show_store(teacher, plans)
    else:
        columns = [*_of_plans(_REQUEST_COLUMNS, counted=not assumed.tokens), *_cost_columns(gpus, assumed)]
        Listing(columns, estimates).write(form, "requests", _described(params, teacher, estimates, gpus, assumed))
    return Summary(sum(len(plan.cached) for plan in plans), 0, sum(len(plan.skipped) for plan in plans), missing)


_REQUEST_COLUMNS = [
    Column("request", lambda plan: plan.order.request.kind),
    Column("cached", lambda plan: len(plan.cached)),
    Column("missing", lambda plan: len(plan.missing)),
    Column("to_rescore", lambda plan: len(plan.rescore)),
    Column("left_out", lambda plan: len(plan.skipped)),
]


def _of_plans(columns: Sequence[Column], counted: bool) -> Iterator[Column]:
    """The columns for estimates. counted: false without prompts, when only the request's name is known."""
    for number, column in enumerate(columns):
        known = counted or number == 0
        yield replace(column, read=lambda row, read=column.read, known=known: read(row.plan) if known else None)


def _quantities(gpus: Gpus | None, assumed: Assumptions) -> Iterator[tuple[str, str, Callable, Callable]]:
    """Of every quantity its key, its name, how it is read from a `Need` (None: unknown), and how it is shown."""
    rate, count = assumed.rate if gpus else None, "{:,.0f}".format
    yield "responses", "responses", lambda need: need.responses, count
    yield "prompt_tokens", "prompt tokens", lambda need: None if assumed.tokens else need.prompt_tokens, count
    yield "response_tokens", "response tokens", lambda need: need.response_tokens, count
    yield "bytes", "bytes in the store", lambda need: need.store, console.size
    yield "gpu_hours", "GPU-hours", lambda need: rate and need.gpu_hours(rate), _hours
    on_these = f"hours on {_count(gpus.used)}" if gpus else ""
    yield "hours", on_these, lambda need: rate and need.gpu_hours(rate) / gpus.used, _hours


def _cost_columns(gpus: Gpus | None, assumed: Assumptions) -> Iterator[Column]:
    """For JSON and CSV: every quantity at `max_tokens` and as expected."""
    for name, _, quantity, _ in _quantities(gpus, assumed):
        for length, key in (("most", "at_max_tokens"), ("expected", "expected")):
            yield Column(f"{name}_{key}", lambda row, of=length, quantity=quantity: quantity(getattr(row, of)))


def _described(
    params: Params, teacher: Teacher, estimates: Sequence[Estimate], gpus: Gpus | None, assumed: Assumptions
) -> dict[str, object]:
    """For JSON: what stands beside the requests."""
    identity, mean = teacher.description["identity"], estimates[0].held.mean
    return {
        "teacher": {
            "source": str(teacher.source),
            "identity": None if identity == _UNKNOWN else identity,
            "dtype": teacher.description.get("dtype"),
            "parameters": gpus and gpus.model.parameters,
            "weights_bytes": gpus and gpus.model.weights,
            "cache_bytes_per_token": gpus and gpus.model.cache,
        },
        "expected_length": mean or params.max_tokens,
        "stored_responses": len(estimates[0].held.lengths),
        "rate": assumed.rate,
        "gpu_memory_gib": assumed.memory,
        "gpus_per_copy": gpus and gpus.copy,
        "gpus": gpus and gpus.used,
    }


class _Characters:
    """Instead of a tokenizer that is not on this machine: every CHARACTERS characters are a token."""

    chat_template, eos_token_id = "unknown", 0

    def __call__(self, texts: str | Sequence[str], add_special_tokens: bool = True) -> dict[str, list]:
        ids = [
            [zlib.crc32(text[i : i + CHARACTERS].encode()) >> 1 for i in range(0, len(text), CHARACTERS)]
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    def apply_chat_template(self, messages: Sequence[dict], **_) -> str:
        return "\n".join(message["content"] for message in messages)


def _teacher(settings: Generate) -> Teacher:
    """The teacher, or without its weights what its configuration and, if it has one, its tokenizer say."""
    folder = local_folder(settings.teacher, weights=False)
    if settings.engine == "text" or has_weights(folder):
        source = settings.teacher if Path(settings.teacher).is_dir() else str(folder)
        return Teacher.of(settings.model_copy(update={"teacher": source}))
    config = load_config(folder)
    dtype = number_type(config, settings.dtype)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = load_tokenizer(folder) if has_tokenizer else _Characters()
    description = {"identity": _UNKNOWN, "dtype": dtype}
    k, stops = min(settings.k, config.get_text_config().vocab_size), stop_token_ids(folder, tokenizer)
    context, loading = Context.of(config), Loading(dtype, 0)
    return Teacher(folder, settings.engine, tokenizer, description, k, stops, context, settings.support, loading)


def _need(plan: Plan, held: Held, length: float) -> Need:
    """What the missing rows of a plan take, where every response that is to be drawn has `length` tokens."""

    def tokens(item: Item) -> float:
        return held.lengths.get(item.key, length) if item.response_ids is None else len(item.response_ids)

    items = plan.to_make
    prompt_tokens = sum(len(item.prompt_ids) for item in items)
    return _stored_as(plan.order, held, len(items), prompt_tokens, sum(map(tokens, items)))


def _stored_as(order: Order, held: Held, responses: float, prompt_tokens: float, tokens: float) -> Need:
    each = held.bytes_per_token or bytes_per_token(order.k, order.support)
    return Need(responses, prompt_tokens, tokens, tokens * each)


def _estimates(params: Params, plans: Sequence[Plan], assumed: Assumptions) -> list[Estimate]:
    """One per request; with --tokens only of the first request, which the tokens are planned for."""
    held = [Held.of(plan.index, plan.order.k, plan.order.support) for plan in plans]
    lengths = params.max_tokens, held[0].mean or params.max_tokens
    if not assumed.tokens:
        return [Estimate(p, h, *(_need(p, h, length) for length in lengths)) for p, h in zip(plans, held, strict=True)]
    first = plans[0]
    needs = (_stored_as(first.order, held[0], assumed.tokens / length, 0, assumed.tokens) for length in lengths)
    return [Estimate(first, held[0], *needs)]


def _gpus(params: Params, teacher: Teacher, plans: Sequence[Plan], assumed: Assumptions) -> Gpus:
    """Raises UserError where one copy of the teacher does not fit."""
    lengths = (plan.order.length(item) for plan in plans for item in plan.to_make)
    longest = max(lengths, default=2 * params.max_tokens)
    settings = params.generate
    model = ModelMemory.of(load_config(teacher.source), teacher.description["dtype"])
    copy = max(model.fewest_gpus(longest, assumed.memory), settings.tensor_parallel * settings.pipeline_parallel)
    gpus = Gpus(model, longest, copy, (assumed.gpus or copy) // copy * copy)
    if not gpus.used:
        raise UserError(
            f"--gpus {assumed.gpus}: one copy of the teacher needs {copy} GPUs of {assumed.memory:g} GiB, for "
            f"{_takes(gpus)}. Give more of them, or say with --gpu-memory that they are larger"
        )
    return gpus


def _show_cost(
    params: Params, teacher: Teacher, estimates: Sequence[Estimate], gpus: Gpus | None, assumed: Assumptions
) -> None:
    nothing = Need(0, 0, 0, 0)
    needs = [sum((getattr(each, length) for each in estimates), nothing) for length in ("most", "expected")]
    rows = [
        (name, *(show(quantity(need)) for need in needs))
        for _, name, quantity, show in _quantities(gpus, assumed)
        if quantity(nothing) is not None
    ]
    measured = any(each.held.bytes_per_token for each in estimates)
    by = "the store's shards" if measured else f"the line for {teacher.support or 'text'}, k = {teacher.k}"
    held = estimates[0].held
    facts = [
        ("expected length", f"{held.mean:,.1f} tokens, the mean of {len(held.lengths):,} stored responses" if held.mean
         else f"max_tokens ({params.max_tokens:,}): the store has no response to this request"),
        ("bytes per token", f"{needs[1].store / needs[1].response_tokens:,.0f}, from {by}"),
    ]  # fmt: skip
    if isinstance(teacher.tokenizer, _Characters) and not assumed.tokens:
        facts.append(("prompt tokens", f"{CHARACTERS} characters each: {teacher.source} has no tokenizer"))
    if gpus:
        facts += _of_gpus(params.generate, teacher.description["dtype"], gpus, assumed)
    console.table("what is missing takes", ("", "at max_tokens", "expected"), rows)
    console.facts("where the numbers come from", facts)


def _of_gpus(settings: Generate, dtype: str, gpus: Gpus, assumed: Assumptions) -> Iterator[tuple[str, str]]:
    model = gpus.model
    yield "teacher", f"{model.parameters:,} parameters in {dtype}, {console.size(model.cache)} of cache per token"
    sequences = f"{SEQUENCES} sequences of {gpus.longest:,} tokens"
    yield "one copy", f"{_count(gpus.copy)} of {assumed.memory:g} GiB: {_takes(gpus)} ({sequences})"
    if settings.quantization:
        yield "weights", f"counted in {dtype}: {settings.quantization} takes less, and may need fewer GPUs"
    unknown = "unknown: add --rate TOKENS_PER_SECOND_AND_GPU, which a run on a few prompts prints, for GPU-hours"
    yield "rate", unknown if assumed.rate is None else f"{assumed.rate:,g} response tokens per second and GPU (--rate)"


def _takes(gpus: Gpus) -> str:
    cache = console.size(SEQUENCES * gpus.longest * gpus.model.cache)
    return f"{console.size(gpus.model.weights)} of weights and {cache} of cache"


def _hours(count: float) -> str:
    return f"{count:,.1f}" if count >= 1 else f"{count:.2g}"


def _count(gpus: int) -> str:
    return f"{gpus} GPU{'s' if gpus > 1 else ''}"


def _show_store(teacher: Teacher, plans: Sequence[Plan]) -> None:
    identity = teacher.description["identity"]
    if identity == _UNKNOWN:
        why = f"not looked up: {teacher.source} has no weights, which identify the teacher; everything is missing"
        console.facts("store", [("teacher", why)])
    else:
        console.facts("store", [("teacher", identity), *((plan.order.request.kind, plan.folder) for plan in plans)])

"""What `generate` would find in the store and what the rest would take, without a model being run or even here.

A teacher whose weights are not here cannot be looked up, for they decide which teacher it is: a configuration and, if
there is one, a tokenizer are then enough.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import console
from pipeline.cli.listing import Column, Form, Listing
from pipeline.errors import UserError
from pipeline.models import (
    Context,
    has_weights,
    load_config,
    load_tokenizer,
    local_folder,
    number_type,
    stop_token_ids,
)
from pipeline.params import Generate, Params
from pipeline.prompts import PromptFormat
from pipeline.store.requests import open_store
from pipeline.teacher import session as asking
from pipeline.teacher.cost import SEQUENCES, Held, ModelMemory, Need, bytes_per_token
from pipeline.teacher.orders import Order, Wanted
from pipeline.teacher.session import Summary, Teacher
from stages.generate import answers_of, orders_of, prompts_to_ask

CHARACTERS = 4  # a token of English text, where there is no tokenizer
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
_UNKNOWN = "unknown"  # identity of a teacher without weights


@dataclass(frozen=True)
class Plan:
    """What is assumed."""

    tokens: float | None = None  # response tokens to plan for, in place of a file of prompts, which is then not read
    rate: float | None = None  # response tokens a second and GPU
    gpus: int | None = None  # None: as few as hold one copy
    memory: float = 80  # GiB a GPU


@dataclass(frozen=True)
class Estimate:
    """What is missing of one request takes, with responses as long as they may be, and as long as they are expected."""

    order: Order
    held: Held
    most: Need
    expected: Need


@dataclass(frozen=True)
class Gpus:
    """What one copy of the teacher takes, and how many GPUs are used."""

    model: ModelMemory
    longest: int  # tokens of a sequence
    copy: int  # GPUs
    used: int


def dry_run(
    params: Params,
    prompts_path: Path,
    store: str | Path | None = None,
    retry_skipped: bool = False,
    plan: Plan = Plan(),
    form: Form = Form.TEXT,
    answers: bool = False,
) -> Summary:
    """Say what is cached, what is missing and what that takes; nothing is written but a URL's mirror.

    answers: with the teacher's answers to the test prompts.
    """
    if plan.tokens and params.generate.responses:
        raise UserError("--tokens plans what a teacher is to say, and generate.responses gives it: leave one out")
    prompts = [] if plan.tokens else prompts_to_ask(params, prompts_path)
    teacher = _teacher(params.generate)
    asked, _ = asking.rendered(prompts, PromptFormat.of(params), teacher.tokenizer)
    storage = open_store(store)
    orders = [
        *orders_of(params, asked, teacher, storage),
        *(answers_of(params, asked, teacher, storage) if answers else ()),
    ]
    cached, missing = asking.look_up(orders, retry_skipped, set_aside=False)
    takes = bool(missing or plan.tokens)
    estimates = _estimates(params, orders, plan) if takes or form is not Form.TEXT else []
    gpus = _gpus(params, teacher, orders, plan) if takes and teacher.engine != "text" else None
    if form is Form.TEXT:
        if not plan.tokens:
            Listing(_REQUEST_COLUMNS, orders).show("dry run: nothing was generated")
        if takes:
            _show_cost(params, teacher, estimates, gpus, plan)
        _show_store(teacher, orders)
    else:
        columns = [*_of_orders(_REQUEST_COLUMNS, counted=not plan.tokens), *_cost_columns(gpus, plan)]
        Listing(columns, estimates).write(form, "requests", _described(params, teacher, estimates, gpus, plan))
    return Summary(cached, 0, sum(len(order.skipped) for order in orders), missing)


_REQUEST_COLUMNS = [
    Column("request", lambda order: order.request.kind),
    Column("cached", lambda order: len(order.cached)),
    Column("missing", lambda order: len(order.missing)),
    Column("to_rescore", lambda order: len(order.widen), "to rescore"),
    Column("left_out", lambda order: len(order.skipped)),
]


def _of_orders(columns: Sequence[Column], counted: bool) -> Iterator[Column]:
    """The columns, of estimates. counted: without prompts nothing but the request's name is known."""
    for number, column in enumerate(columns):
        known = counted or number == 0
        yield replace(column, read=lambda row, read=column.read, known=known: read(row.order) if known else None)


def _cost_columns(gpus: Gpus | None, plan: Plan) -> Iterator[Column]:
    """What programs get: every quantity at `max_tokens` and as expected."""
    quantities: dict[str, Callable[[Need], float | None]] = {
        "responses": lambda need: need.responses,
        "prompt_tokens": lambda need: None if plan.tokens else need.prompt_tokens,
        "response_tokens": lambda need: need.response_tokens,
        "bytes": lambda need: need.store,
        "gpu_hours": lambda need: need.gpu_hours(plan.rate) if gpus and plan.rate else None,
        "hours": lambda need: need.gpu_hours(plan.rate) / gpus.used if gpus and plan.rate else None,
    }
    for name, quantity in quantities.items():
        for length, key in (("most", "at_max_tokens"), ("expected", "expected")):
            yield Column(f"{name}_{key}", lambda row, of=length, quantity=quantity: quantity(getattr(row, of)))


def _described(
    params: Params, teacher: Teacher, estimates: Sequence[Estimate], gpus: Gpus | None, plan: Plan
) -> dict[str, object]:
    """What programs get beside the requests."""
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
        "rate": plan.rate,
        "gpu_memory_gib": plan.memory,
        "gpus_per_copy": gpus and gpus.copy,
        "gpus": gpus and gpus.used,
    }


class _Characters:
    """In the place of a tokenizer that is not here: every CHARACTERS characters are a token."""

    chat_template, eos_token_id = "unknown", 0

    def __call__(self, texts: str | Sequence[str], add_special_tokens: bool = True) -> dict[str, list]:
        if isinstance(texts, str):
            return {"input_ids": self([texts])["input_ids"][0]}
        starts = [range(0, len(text), CHARACTERS) for text in texts]
        return {
            "input_ids": [
                [zlib.crc32(text[i : i + CHARACTERS].encode()) >> 1 for i in places]
                for text, places in zip(texts, starts, strict=True)
            ]
        }

    def apply_chat_template(self, messages: Sequence[dict], **_) -> str:
        return "\n".join(message["content"] for message in messages)


def _teacher(settings: Generate) -> Teacher:
    """The teacher where its weights are here, else what its configuration and, if it has one, its tokenizer say."""
    folder = local_folder(settings.teacher, weights=False)
    if settings.engine == "text" or has_weights(folder):
        found = settings.teacher if Path(settings.teacher).is_dir() else str(folder)
        return Teacher.of(settings.model_copy(update={"teacher": found}))
    config = load_config(folder)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = load_tokenizer(folder) if has_tokenizer else _Characters()
    return Teacher(
        folder,
        settings.engine,
        settings.engine,
        tokenizer,
        {"identity": _UNKNOWN, "dtype": number_type(config, settings.dtype)},
        min(settings.k, config.get_text_config().vocab_size),
        stop_token_ids(folder, tokenizer),
        Context.of(config),
        settings.support,
    )


def _need(order: Order, held: Held, length: float) -> Need:
    """What is missing of an order, where every response that is to be drawn has `length` tokens."""

    def tokens(wanted: Wanted) -> float:
        return held.lengths.get(wanted.key, length) if wanted.response_ids is None else len(wanted.response_ids)

    asked = [*order.missing, *order.widen]
    return _stored_as(order, held, len(asked), sum(len(wanted.prompt_ids) for wanted in asked), sum(map(tokens, asked)))


def _stored_as(order: Order, held: Held, responses: float, prompt_tokens: float, tokens: float) -> Need:
    each = held.bytes_per_token or bytes_per_token(order.k, order.support)
    return Need(responses, prompt_tokens, tokens, tokens * each)


def _estimates(params: Params, orders: Sequence[Order], plan: Plan) -> list[Estimate]:
    """Of every request; tokens to plan for are the first one's."""
    held = [Held.of(order.index, order.k, order.support) for order in orders]
    lengths = params.max_tokens, held[0].mean or params.max_tokens
    if not plan.tokens:
        return [Estimate(o, h, *(_need(o, h, length) for length in lengths)) for o, h in zip(orders, held, strict=True)]
    needs = (_stored_as(orders[0], held[0], plan.tokens / length, 0, plan.tokens) for length in lengths)
    return [Estimate(orders[0], held[0], *needs)]


def _gpus(params: Params, teacher: Teacher, orders: Sequence[Order], plan: Plan) -> Gpus:
    """Raises UserError where one copy of the teacher does not fit."""
    asked = [(order, wanted) for order in orders for wanted in [*order.missing, *order.widen]]
    longest = max((order.length(wanted) for order, wanted in asked), default=2 * params.max_tokens)
    settings = params.generate
    model = ModelMemory.of(load_config(teacher.source), teacher.description["dtype"])
    copy = max(model.fewest_gpus(longest, plan.memory), settings.tensor_parallel * settings.pipeline_parallel)
    gpus = Gpus(model, longest, copy, (plan.gpus or copy) // copy * copy)
    if not gpus.used:
        raise UserError(
            f"--gpus {plan.gpus}: one copy of the teacher has {_takes(gpus)}, which needs {copy} GPUs of "
            f"{plan.memory:g} GiB. Give more of them, or say with --gpu-memory that they are larger"
        )
    return gpus


def _show_cost(params: Params, teacher: Teacher, estimates: Sequence[Estimate], gpus: Gpus | None, plan: Plan) -> None:
    nothing = Need(0, 0, 0, 0)
    needs = [sum((each.most for each in estimates), nothing), sum((each.expected for each in estimates), nothing)]
    rows = [("responses", *(f"{need.responses:,.0f}" for need in needs))]
    if not plan.tokens:  # else there are no prompts to count
        rows.append(("prompt tokens", *(f"{need.prompt_tokens:,.0f}" for need in needs)))
    rows.append(("response tokens", *(f"{need.response_tokens:,.0f}" for need in needs)))
    rows.append(("bytes in the store", *(console.size(need.store) for need in needs)))
    measured = any(each.held.bytes_per_token for each in estimates)
    by = "the store's shards" if measured else f"the line for {teacher.support or 'text'}, k = {teacher.k}"
    held = estimates[0].held
    facts = [
        ("expected length", f"{held.mean:,.1f} tokens, the mean of {len(held.lengths):,} stored responses" if held.mean
         else f"max_tokens ({params.max_tokens:,}): the store has no response to this request"),
        ("bytes a token", f"{needs[1].store / needs[1].response_tokens:,.0f}, from {by}"),
    ]  # fmt: skip
    if isinstance(teacher.tokenizer, _Characters) and not plan.tokens:
        facts.append(("prompt tokens", f"{CHARACTERS} characters each: {teacher.source} has no tokenizer"))
    if gpus:
        if plan.rate is not None:
            hours = [need.gpu_hours(plan.rate) for need in needs]
            rows.append(("GPU-hours", *map(_hours, hours)))
            rows.append((f"hours on {_count(gpus.used)}", *(_hours(each / gpus.used) for each in hours)))
        facts += _of_gpus(params.generate, teacher.description["dtype"], gpus, plan)
    console.table("what is missing takes", ("", "at max_tokens", "expected"), rows)
    console.facts("where the numbers come from", facts)


def _of_gpus(settings: Generate, dtype: str, gpus: Gpus, plan: Plan) -> Iterator[tuple[str, str]]:
    model = gpus.model
    yield "teacher", f"{model.parameters:,} parameters in {dtype}, {console.size(model.cache)} of cache a token"
    sequences = f"{SEQUENCES} sequences of {gpus.longest:,} tokens"
    yield "one copy", f"{_count(gpus.copy)} of {plan.memory:g} GiB: {_takes(gpus)} ({sequences})"
    if settings.quantization:
        yield "weights", f"counted in {dtype}: {settings.quantization} takes less, and may need fewer GPUs"
    without = "not given: with --rate TOKENS_A_SECOND_AND_GPU, which a run on a few prompts prints, there are hours"
    yield "rate", without if plan.rate is None else f"{plan.rate:,g} response tokens a second and GPU, as given"


def _takes(gpus: Gpus) -> str:
    cache = console.size(SEQUENCES * gpus.longest * gpus.model.cache)
    return f"{console.size(gpus.model.weights)} of weights and {cache} of cache"


def _hours(count: float) -> str:
    return f"{count:,.1f}" if count >= 1 else f"{count:.2g}"


def _count(gpus: int) -> str:
    return f"{gpus} GPU" + "s" * (gpus > 1)


def _show_store(teacher: Teacher, orders: Sequence[Order]) -> None:
    identity = teacher.description["identity"]
    if identity == _UNKNOWN:
        why = f"not looked up: {teacher.source} has no weights, which say what teacher it is; everything is missing"
        console.facts("store", [("teacher", why)])
    else:
        console.facts("store", [("teacher", identity), *((order.request.kind, order.folder) for order in orders)])

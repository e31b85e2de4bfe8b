"""What `generate` would find in the store and what the rest would take, without a model being run or even here.

A teacher whose weights are not here cannot be looked up, for they decide which teacher it is: a configuration and, if
there is one, a tokenizer are then enough.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import console
from pipeline.cost import SEQUENCES, Held, ModelMemory, Need, bytes_per_token
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
from pipeline.shards.store import open_store
from pipeline.teachers.orders import Order, Wanted
from stages import asking
from stages.asking import Summary, Teacher
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


def dry_run(
    params: Params,
    prompts_path: Path,
    store: str | Path | None = None,
    retry_skipped: bool = False,
    plan: Plan = Plan(),
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
    if not plan.tokens:
        console.table(
            "dry run: nothing was generated",
            ("request", "cached", "missing", "to rescore for k", "left out"),
            [
                (order.request.kind, *map(len, (order.cached, order.missing, order.widen, order.skipped)))
                for order in orders
            ],
        )
    if missing or plan.tokens:
        _report_cost(params, teacher, orders, plan)
    _report_store(teacher, orders)
    return Summary(cached, 0, sum(len(order.skipped) for order in orders), missing)


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
    )


def _need(order: Order, held: Held, length: float) -> Need:
    """What is missing of an order, where every response that is to be drawn has `length` tokens."""

    def tokens(wanted: Wanted) -> float:
        return held.lengths.get(wanted.key, length) if wanted.response_ids is None else len(wanted.response_ids)

    asked = [*order.missing, *order.widen]
    return _stored_as(order, held, len(asked), sum(len(wanted.prompt_ids) for wanted in asked), sum(map(tokens, asked)))


def _stored_as(order: Order, held: Held, responses: float, prompt_tokens: float, tokens: float) -> Need:
    return Need(responses, prompt_tokens, tokens, tokens * (held.bytes_per_token or bytes_per_token(order.k)))


def _report_cost(params: Params, teacher: Teacher, orders: Sequence[Order], plan: Plan) -> None:
    held = [Held.of(order.index, order.k) for order in orders]
    drawn, mean = orders[0], held[0].mean
    needs = []  # with responses as long as they may be, and as long as they are expected
    for length in (params.max_tokens, mean or params.max_tokens):
        if plan.tokens:
            needs.append(_stored_as(drawn, held[0], plan.tokens / length, 0, plan.tokens))
        else:
            needs.append(sum(map(_need, orders, held, [length] * len(orders)), Need(0, 0, 0, 0)))
    rows = [("responses", *(f"{need.responses:,.0f}" for need in needs))]
    if not plan.tokens:  # else there are no prompts to count
        rows.append(("prompt tokens", *(f"{need.prompt_tokens:,.0f}" for need in needs)))
    rows.append(("response tokens", *(f"{need.response_tokens:,.0f}" for need in needs)))
    rows.append(("bytes in the store", *(console.size(need.store) for need in needs)))
    measured = "the store's shards" if any(each.bytes_per_token for each in held) else f"the line for k = {teacher.k}"
    facts = [
        ("expected length", f"{mean:,.1f} tokens, the mean of {len(held[0].lengths):,} stored responses" if mean
         else f"max_tokens ({params.max_tokens:,}): the store has no response to this request"),
        ("bytes a token", f"{needs[1].store / needs[1].response_tokens:,.0f}, from {measured}"),
    ]  # fmt: skip
    if isinstance(teacher.tokenizer, _Characters) and not plan.tokens:
        facts.append(("prompt tokens", f"{CHARACTERS} characters each: {teacher.source} has no tokenizer"))
    if teacher.engine != "text":
        asked = [(order, wanted) for order in orders for wanted in [*order.missing, *order.widen]]
        longest = max((order.length(wanted) for order, wanted in asked), default=2 * params.max_tokens)
        hours, found = _on_gpus(teacher, params.generate, longest, needs, plan)
        rows, facts = rows + hours, facts + found
    console.table("what is missing takes", ("", "at max_tokens", "expected"), rows)
    console.facts("where the numbers come from", facts)


def _on_gpus(
    teacher: Teacher, settings: Generate, longest: int, needs: Sequence[Need], plan: Plan
) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """Hours where a rate is given, and what one copy of the teacher takes. Raises UserError where it does not fit."""
    dtype, memory = teacher.description["dtype"], plan.memory
    model = ModelMemory.of(load_config(teacher.source), dtype)
    copy = max(model.fewest_gpus(longest, memory), settings.tensor_parallel * settings.pipeline_parallel)
    takes = f"{console.size(model.weights)} of weights and {console.size(SEQUENCES * longest * model.cache)} of cache"
    if plan.gpus is not None and plan.gpus < copy:
        raise UserError(
            f"--gpus {plan.gpus}: one copy of the teacher has {takes}, which needs {copy} GPUs of {memory:g} GiB. "
            "Give more of them, or say with --gpu-memory that they are larger"
        )
    gpus = (plan.gpus or copy) // copy * copy
    facts = [
        ("teacher", f"{model.parameters:,} parameters in {dtype}, {console.size(model.cache)} of cache a token"),
        ("one copy", f"{_gpus(copy)} of {memory:g} GiB: {takes} ({SEQUENCES} sequences of {longest:,} tokens)"),
    ]
    if settings.quantization:
        facts.append(("weights", f"counted in {dtype}: {settings.quantization} takes less, and may need fewer GPUs"))
    if plan.rate is None:
        why = "not given: with --rate TOKENS_A_SECOND_AND_GPU, which a run on a few prompts prints, there are hours"
        return [], [*facts, ("rate", why)]
    hours = [need.gpu_hours(plan.rate) for need in needs]
    rows = [
        ("GPU-hours", *map(_hours, hours)),
        (f"hours on {_gpus(gpus)}", *(_hours(each / gpus) for each in hours)),
    ]
    return rows, [*facts, ("rate", f"{plan.rate:,g} response tokens a second and GPU, as given")]


def _hours(count: float) -> str:
    return f"{count:,.1f}" if count >= 1 else f"{count:.2g}"


def _gpus(count: int) -> str:
    return f"{count} GPU" + "s" * (count > 1)


def _report_store(teacher: Teacher, orders: Sequence[Order]) -> None:
    identity = teacher.description["identity"]
    if identity == _UNKNOWN:
        why = f"not looked up: {teacher.source} has no weights, which say what teacher it is; everything is missing"
        console.facts("store", [("teacher", why)])
    else:
        console.facts("store", [("teacher", identity), *((order.request.kind, order.folder) for order in orders)])

"""Run the teacher once: ask for what the store does not hold, keep it, and write the selection of this experiment."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import console
from pipeline.errors import UserError
from pipeline.models import (
    context_length,
    describe_model,
    load_config,
    load_tokenizer,
    local_folder,
    stop_token_ids,
    tokenizer_identity,
)
from pipeline.params import Params
from pipeline.prompts import TEMPLATE_VERSION, Prompt, PromptFormat, encode_response, read_prompts, read_responses
from pipeline.provenance import git_commit, seconds_since_start, versions
from pipeline.shards.files import digest, write_json_atomically
from pipeline.shards.identity import Request, Sampling, sample_key, score_key
from pipeline.shards.schema import count_tokens
from pipeline.shards.selection import Part, write_selection
from pipeline.shards.store import RequestFolder, store_root
from pipeline.tasks import get_task
from pipeline.tasks.corruption import corruptions
from pipeline.teachers import Engine, choose_engine, open_engine
from pipeline.teachers.orders import Order, Wanted


@dataclass(frozen=True)
class Summary:
    """What a run found and did, in rows."""

    cached: int
    made: int
    skipped: int
    missing: int = 0  # not made because the run was dry


def generate(
    params: Params,
    prompts_path: Path,
    out: Path,
    store: Path | None = None,
    dry_run: bool = False,
    retry_skipped: bool = False,
    engine: Engine | None = None,
    results: Path | None = None,
) -> Summary:
    """Answer the train and validation prompts of a file, score held-out references, and write the selection `out`.

    results: file for what the run found, made and took; apart from `out`, whose bytes do not depend on that.
    `engine` replaces the one that the parameters name. Raises UserError on bad input; what was stored stays.
    """
    settings, root = params.generate, store_root(store)
    prompts = read_prompts(prompts_path, ("train", "validation"))
    if not prompts:
        raise UserError(f"{prompts_path} has no prompts in the splits train and validation")
    source = local_folder(settings.teacher)
    seq2seq = settings.engine != "text" and load_config(source).is_encoder_decoder
    engine_name = choose_engine(settings.engine, seq2seq)
    tokenizer = load_tokenizer(source)
    teacher = _teacher(settings.teacher, settings.dtype, engine_name, tokenizer)
    task = get_task(params.prepare.task)
    if settings.accept == "correct" and not task.checked:
        raise UserError(f"generate.accept: correct needs a task whose answers are right or wrong; {task.name} has none")

    orders = _orders(params, prompts, source, tokenizer, root, teacher)
    for order in orders:
        order.look_up(retry_skipped, set_aside=not dry_run)
        for damaged in order.folder.damaged:
            console.warn(f"damaged shard, its rows are made again: {damaged}")
    cached = sum(len(order.cached) for order in orders)
    to_make = sum(len(order.missing) + len(order.widen) for order in orders)
    if dry_run:
        summary = Summary(cached, 0, sum(len(order.skipped) for order in orders), to_make)
        _report_dry_run(summary, orders, teacher)
        return summary

    if to_make and engine is None:
        longest = max(order.length(wanted) for order in orders for wanted in [*order.missing, *order.widen])
        if engine_name != "text":
            console.say(f"loading the teacher from {source} with engine {engine_name}")
        try:
            engine = open_engine(engine_name, source, teacher["dtype"], longest)
        except (RuntimeError, ValueError, ImportError) as error:
            raise UserError(f"engine {engine_name} cannot start with {source}: {error}. Try --engine hf") from error
    asked = time.monotonic()
    tokens = sum(order.fulfil(engine, tokenizer, teacher, settings.rows_per_shard) for order in orders)
    for order in orders:
        order.look_up()
    rejected = sum(order.reject("train", task.accepts) for order in orders if settings.accept == "correct")
    if rejected:
        console.say(f"{rejected:,} training responses are wrong by the task's checker and were not selected")
    parts = {name: part for order in orders for name, part in order.parts().items()}
    made = sum(len(order.cached) for order in orders) - cached
    lost = sum(len(order.missing) + len(order.widen) for order in orders)
    if lost:
        console.warn(f"the engine gave no answer for {lost} rows; run the same command to ask again")
    summary = Summary(cached, made, sum(len(order.skipped) for order in orders) + lost)
    if not parts:
        reason = "no training response was accepted" if rejected else "see the warnings above"
        raise UserError(f"nothing could be made of any prompt: {reason}")
    manifest = write_selection(out, parts, teacher, orders[0].k, summary.skipped, settings.materialize)
    cost = _cost(summary, manifest, orders, tokens, time.monotonic() - asked, seconds_since_start())
    if results is not None:
        provenance = {"engine": engine_name, "teacher": teacher, "k": orders[0].k, "versions": versions()}
        write_json_atomically(results, {"cost": cost, "provenance": provenance | {"git_commit": git_commit()}})
    _report(summary, parts, orders, out, cost)
    return summary


def _teacher(source: str, dtype: str, engine: str, tokenizer) -> dict:
    if engine == "text":  # no weights are needed: what counts is how text becomes tokens
        found = tokenizer_identity(tokenizer)[:16]
        return {
            "identity": digest({"text": found})[:16], "tokenizer": found, "vocab_size": len(tokenizer), "dtype": None,
            "licence": None, "name": "text only", "commit": None,
        }  # fmt: skip
    teacher = describe_model(source, dtype)
    if engine == "stub":  # fake answers must never be found under a real teacher's identity
        teacher |= {"identity": digest({"stub": teacher["identity"]})[:16], "name": "stub"}
    return teacher


def _orders(
    params: Params, prompts: list[Prompt], source: Path, tokenizer, root: Path, teacher: dict
) -> tuple[Order, Order]:
    """What is to be drawn from the teacher, and what is to be scored by it."""
    settings, stops = params.generate, stop_token_ids(source, tokenizer)
    sampling = Sampling(settings.temperature, settings.top_p, params.max_tokens, stops)
    form = PromptFormat.of(params)
    chat = form.chat_identity(tokenizer)
    drawn = Request("sample", params.template, TEMPLATE_VERSION, params.seed, sampling, chat)
    given = Request("score", params.template, TEMPLATE_VERSION, chat=chat)
    asked = _asked(prompts, form, tokenizer)
    text_only = settings.engine == "text"
    counts = {"train": settings.samples, "validation": settings.validation_samples}
    if settings.responses:
        counts = dict.fromkeys(counts, 0)
    to_draw = [
        Wanted(prompt.split, prompt, text, ids, sample, sample_key(drawn, ids, sample))
        for prompt, text, ids in asked
        for sample in range(counts[prompt.split])
    ]
    to_score = [] if text_only else list(_references(asked, params, tokenizer))
    if settings.responses:
        to_score = [*_given(asked, Path(settings.responses), tokenizer), *to_score]
    k = 0 if text_only else min(settings.k, teacher["vocab_size"])
    context = None if text_only else context_length(load_config(source))

    def order(request: Request, wanted: list[Wanted]) -> Order:
        return Order(request, RequestFolder(root, teacher["identity"], request.identity), wanted, k, stops, context)

    return order(drawn, to_draw), order(given, to_score)


def _asked(prompts: list[Prompt], form: PromptFormat, tokenizer) -> list[tuple[Prompt, str, np.ndarray]]:
    """Prompts with the text and the token ids that the teacher reads."""
    texts = [form.text(tokenizer, prompt.prompt) for prompt in prompts]
    return list(zip(prompts, texts, form.encode_texts(tokenizer, texts), strict=True))


def _given(asked: list[tuple[Prompt, str, np.ndarray]], path: Path, tokenizer) -> Iterator[Wanted]:
    """The responses that another tool gave to these prompts."""
    given = read_responses(path)
    unasked = len(given.keys() - {prompt.prompt for prompt, _, _ in asked})
    unanswered = sum(prompt.prompt not in given for prompt, _, _ in asked)
    if unasked or unanswered:
        console.warn(
            f"{path}: {unasked:,} of its prompts are not in the prompt file; {unanswered:,} prompts have no response"
        )
    for prompt, text, ids in asked:
        for number, each in enumerate(given.get(prompt.prompt, ())):
            response = encode_response(tokenizer, each.response, each.ends)
            yield Wanted(prompt.split, prompt, text, ids, number, score_key(ids, response), "teacher", response)


def _references(asked: list[tuple[Prompt, str, np.ndarray]], params: Params, tokenizer) -> Iterator[Wanted]:
    """References of the held-out prompts, and corrupted copies of the first of each."""
    for prompt, text, ids in asked:
        if prompt.split != "validation" or not prompt.references:
            continue
        references = [encode_response(tokenizer, reference) for reference in prompt.references]
        wrong = corruptions(references, params.generate.corrupted, [params.seed, *ids.tolist()])
        for origin, given in (("reference", references), ("corrupted", wrong)):
            for number, response in enumerate(given):
                yield Wanted("scored", prompt, text, ids, number, score_key(ids, response), origin, response)


def _report_dry_run(summary: Summary, orders: tuple[Order, Order], teacher: dict) -> None:
    console.table(
        "dry run: nothing was generated",
        ("request", "cached", "missing", "to rescore for k", "left out"),
        [
            (order.request.kind, len(order.cached), len(order.missing), len(order.widen), len(order.skipped))
            for order in orders
        ],
    )
    console.facts(
        "store",
        [("teacher", teacher["identity"]), *((order.request.kind, order.folder.path) for order in orders)],
    )


def _cost(
    summary: Summary, manifest: dict, orders: tuple[Order, Order], tokens: int, asking: float, seconds: float
) -> dict:
    """Rows, tokens, bytes and seconds of this run; bytes a token are of the rows' shards, text and ids included."""
    shards = {location.shard for order in orders for found in order.index.values() for location in found}
    stored = sum(shard.stat().st_size for shard in shards)
    held = sum(count_tokens(shard) for shard in shards)
    return {
        "rows_found": summary.cached,
        "rows_made": summary.made,
        "rows_left_out": summary.skipped,
        "tokens_selected": sum(part["tokens"] for part in manifest["parts"].values()),
        "tokens_made": tokens,
        "seconds_asking": asking if summary.made else 0.0,
        "seconds": seconds,
        "tokens_per_second": tokens / asking if summary.made else None,
        "store_bytes": stored,
        "bytes_per_token": stored / held if held else None,
    }


def _report(summary: Summary, parts: dict[str, Part], orders: tuple[Order, Order], out: Path, cost: dict) -> None:
    rate = f", {cost['tokens_per_second']:,.0f} tokens/s without loading" if cost["tokens_per_second"] else ""
    size = f"{cost['store_bytes'] / 2**20:,.1f} MiB, {cost['bytes_per_token'] or 0:,.0f} bytes a token"
    console.facts(
        "teacher cached",
        [
            ("found in the store", f"{summary.cached:,} rows"),
            ("made now", f"{summary.made:,} rows, {cost['tokens_made']:,} tokens in {cost['seconds']:.0f} s{rate}"),
            ("left out", f"{summary.skipped:,} rows"),
            ("selected", ", ".join(f"{part.rows:,} {name}" for name, part in parts.items())),
            ("store", f"{orders[0].folder.path.parent} ({size})"),
            ("selection", out),
        ],
    )

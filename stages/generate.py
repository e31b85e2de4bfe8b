"""Run the teacher once: ask for what the store does not hold, keep it, and write the selection of this experiment."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import console
from pipeline.errors import UserError
from pipeline.models import context_length, describe_model, load_config, load_tokenizer, local_folder, stop_token_ids
from pipeline.params import Params
from pipeline.prompts import TEMPLATE_VERSION, Prompt, encode_prompts, encode_response, read_prompts, render
from pipeline.shards.files import digest
from pipeline.shards.identity import Request, Sampling, sample_key, score_key
from pipeline.shards.selection import Part, write_selection
from pipeline.shards.store import RequestFolder, store_root
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
) -> Summary:
    """Answer the train and validation prompts of a file, score held-out references, and write the selection `out`.

    `engine` replaces the one that the parameters name. Raises UserError on bad input; what was stored stays.
    """
    started, settings, root = time.monotonic(), params.generate, store_root(store)
    prompts = read_prompts(prompts_path, ("train", "validation"))
    if not prompts:
        raise UserError(f"{prompts_path} has no prompts in the splits train and validation")
    engine_name = choose_engine(settings.engine)
    source = local_folder(settings.teacher)
    teacher = _teacher(settings.teacher, settings.dtype, engine_name)
    tokenizer = load_tokenizer(source)

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
        console.say(f"loading the teacher from {source} with engine {engine_name}")
        try:
            engine = open_engine(engine_name, source, teacher["dtype"], longest)
        except (RuntimeError, ValueError, ImportError) as error:
            raise UserError(f"engine {engine_name} cannot start with {source}: {error}. Try --engine hf") from error
    tokens = sum(order.fulfil(engine, tokenizer, teacher, settings.rows_per_shard) for order in orders)
    for order in orders:
        order.look_up()
    parts = {name: part for order in orders for name, part in order.parts().items()}
    made = sum(len(order.cached) for order in orders) - cached
    lost = sum(len(order.missing) + len(order.widen) for order in orders)
    if lost:
        console.warn(f"the engine gave no answer for {lost} rows; run the same command to ask again")
    summary = Summary(cached, made, sum(len(order.skipped) for order in orders) + lost)
    if not parts:
        raise UserError("nothing could be made of any prompt; see the warnings above")
    write_selection(out, parts, teacher, orders[0].k, summary.skipped, settings.materialize)
    _report(summary, parts, orders, out, tokens, time.monotonic() - started)
    return summary


def _teacher(source: str, dtype: str, engine: str) -> dict:
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
    drawn = Request("sample", params.template, TEMPLATE_VERSION, params.seed, sampling)
    given = Request("score", params.template, TEMPLATE_VERSION)
    encoded = list(zip(prompts, encode_prompts(tokenizer, params.template, prompts), strict=True))
    counts = {"train": settings.samples, "validation": settings.validation_samples}
    to_draw = [
        Wanted(
            prompt.split, prompt, render(params.template, prompt.prompt), ids, sample, sample_key(drawn, ids, sample)
        )
        for prompt, ids in encoded
        for sample in range(counts[prompt.split])
    ]
    to_score = list(_references(encoded, params, tokenizer))
    k, context = min(settings.k, teacher["vocab_size"]), context_length(load_config(source))

    def order(request: Request, wanted: list[Wanted]) -> Order:
        return Order(request, RequestFolder(root, teacher["identity"], request.identity), wanted, k, stops, context)

    return order(drawn, to_draw), order(given, to_score)


def _references(encoded: list[tuple[Prompt, np.ndarray]], params: Params, tokenizer) -> Iterator[Wanted]:
    """References of the held-out prompts, and corrupted copies of the first of each."""
    held_out = [(prompt, ids) for prompt, ids in encoded if prompt.split == "validation" and prompt.references]
    responses = [[encode_response(tokenizer, text) for text in prompt.references] for prompt, _ in held_out]
    for (prompt, ids), references in zip(held_out, responses, strict=True):
        wrong = corruptions(references, params.generate.corrupted, [params.seed, *ids.tolist()])
        for origin, given in (("reference", references), ("corrupted", wrong)):
            for number, response in enumerate(given):
                text, key = render(params.template, prompt.prompt), score_key(ids, response)
                yield Wanted("scored", prompt, text, ids, number, key, origin, response)


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


def _report(
    summary: Summary, parts: dict[str, Part], orders: tuple[Order, Order], out: Path, tokens: int, seconds: float
) -> None:
    size = sum(shard.stat().st_size for order in orders for shard in order.folder.path.glob("part-*.parquet"))
    console.facts(
        "teacher cached",
        [
            ("found in the store", f"{summary.cached:,} rows"),
            ("made now", f"{summary.made:,} rows, {tokens:,} tokens in {seconds:.0f} s"),
            ("left out", f"{summary.skipped:,} rows"),
            ("selected", ", ".join(f"{part.rows:,} {name}" for name, part in parts.items())),
            ("store", f"{orders[0].folder.path.parent} ({size / 2**20:,.1f} MiB)"),
            ("selection", out),
        ],
    )

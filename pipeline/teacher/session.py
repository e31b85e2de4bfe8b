"""Ask a teacher for what the store does not hold: shared by the stages that draw responses and that score them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import console, interrupts
from pipeline.engines import Engine, Loading, choose_engine, open_engine, replica_engine, require_supported
from pipeline.errors import UserError, in_one_line
from pipeline.files import digest, require_writable
from pipeline.models import (
    Context,
    describe_model,
    load_config,
    load_tokenizer,
    local_folder,
    require_loadable,
    stop_token_ids,
    tokenizer_identity,
)
from pipeline.params import Generate, Params
from pipeline.prompts import TEMPLATE_VERSION, Prompt, PromptFormat, encode_response
from pipeline.provenance import seconds_since_start
from pipeline.store.identity import Request, Sampling, score_key
from pipeline.store.requests import SKIPPED, RequestFolder
from pipeline.store.schema import count_tokens
from pipeline.store.selection import Part, write_selection
from pipeline.store.storage import Storage
from pipeline.store.users import Reference
from pipeline.teacher.corruption import corruptions
from pipeline.teacher.orders import Order, Wanted

Asked = Sequence[tuple[Prompt, str, np.ndarray]]  # prompt, what models read, its token ids


@dataclass(frozen=True)
class Summary:
    """What a run found and did, in rows."""

    cached: int
    made: int
    skipped: int
    missing: int = 0  # not made because the run was dry


@dataclass(frozen=True)
class Teacher:
    """A teacher before anything is asked of it: no weights are loaded."""

    source: Path
    engine: str
    model_engine: str  # what computes its answers: with ray the engine of the replicas (or auto), else the engine
    tokenizer: object
    description: dict
    k: int  # tokens a position; 0 where no teacher is run
    stops: tuple[int, ...]
    context: Context
    support: str | None  # which tokens: sampled or topk; None where no teacher is run

    @classmethod
    def of(cls, settings: Generate) -> "Teacher":
        """The one that the parameters name. Raises UserError where it or its tokenizer cannot be found."""
        source, text_only = local_folder(settings.teacher), settings.engine == "text"
        seq2seq = not text_only and load_config(source).is_encoder_decoder
        engine = model_engine = choose_engine(settings.engine, seq2seq)
        if engine == "ray":
            model_engine = replica_engine(settings, seq2seq)
        require_supported(model_engine, settings)
        tokenizer = load_tokenizer(source)
        description = _describe(settings, model_engine, tokenizer)
        return cls(
            source,
            engine,
            model_engine,
            tokenizer,
            description,
            0 if text_only else min(settings.k, _ids(settings, description["vocab_size"], tokenizer)),
            stop_token_ids(source, tokenizer),
            Context(None) if text_only else Context.of(load_config(source)),
            None if text_only else settings.support,
        )

    def reads(self, wanted: Wanted) -> bool:
        """Whether a prompt with its given response is within the teacher's context."""
        return self.context.holds(len(wanted.prompt_ids), len(wanted.response_ids))

    def loading(self, settings: Generate, longest: int) -> Loading:
        """How it is to be loaded to read and write up to `longest` tokens."""
        return Loading(
            self.description["dtype"],
            longest,
            settings.tensor_parallel,
            settings.pipeline_parallel,
            settings.quantization,
            settings.replicas,
            self.model_engine,
            dict(settings.engine_options),
            settings.rows_per_shard,
            None if self.engine == "text" else vocabulary(self.tokenizer),
        )

    def order(
        self, request: Request, wanted: list[Wanted], store: Storage, k: int | None = None, support: str | None = None
    ) -> Order:
        """What is wanted of one request, and what `store` has; k and support are by default the teacher's."""
        folder = RequestFolder(store, self.description["identity"], request.identity)
        k, support = self.k if k is None else k, support or self.support
        return Order(request, folder, wanted, k, self.stops, self.context, support)

    def select(
        self, out: Path, parts: dict[str, Part], skipped: int, materialize: bool, student: str | None = None
    ) -> dict:
        """Write the selection `out` of what was ordered with the teacher's k and support; returns the manifest."""
        return write_selection(out, parts, self.description, self.k, skipped, materialize, student, self.support)


def vocabulary(tokenizer) -> int:
    """How many ids a tokenizer has, one more than its highest: a model's embedding may be padded to more."""
    return max(tokenizer.get_vocab().values()) + 1


def _ids(settings: Generate, embeddings: int, tokenizer) -> int:
    """How many ids a position can keep."""
    return min(embeddings, vocabulary(tokenizer)) if settings.support == "sampled" else embeddings


def _describe(settings: Generate, engine: str, tokenizer) -> dict:
    if engine == "text":  # no weights are needed: what counts is how text becomes tokens
        found = tokenizer_identity(tokenizer)[:16]
        return {
            "identity": digest({"text": found})[:16], "tokenizer": found, "vocab_size": len(tokenizer), "dtype": None,
            "licence": None, "name": "text only", "commit": None,
        }  # fmt: skip
    teacher = describe_model(settings.teacher, settings.dtype, settings.quantization)
    if engine == "stub":  # fake answers must never be found under a real teacher's identity
        teacher |= {"identity": digest({"stub": teacher["identity"]})[:16], "name": "stub"}
    return teacher


def sampling_request(params: Params, teacher: Teacher, temperature: float, top_p: float) -> Request:
    """The request that responses are drawn with."""
    chat = PromptFormat.of(params).chat_identity(teacher.tokenizer)
    sampling = Sampling(temperature, top_p, params.max_tokens, teacher.stops)
    return Request("sample", params.template, TEMPLATE_VERSION, params.seed, sampling, chat)


def scoring_request(params: Params, teacher: Teacher) -> Request:
    """The request that given responses are scored with."""
    chat = PromptFormat.of(params).chat_identity(teacher.tokenizer)
    return Request("score", params.template, TEMPLATE_VERSION, chat=chat)


def rendered(prompts: Sequence[Prompt], form: PromptFormat, tokenizer) -> tuple[Asked, int]:
    """Prompts with the text and the token ids that the teacher reads.

    A training prompt whose token ids are those of a held-out one (of validation or test: unknown words, spaces) is left
    out, since their samples would be the same ones; second: how many were.
    """
    texts = form.texts(tokenizer, prompts)
    read = list(zip(prompts, texts, form.encode_texts(tokenizer, texts), strict=True))
    held_out = {ids.tobytes() for prompt, _, ids in read if prompt.split in ("validation", "test")}
    kept = [each for each in read if each[0].split != "train" or each[2].tobytes() not in held_out]
    if left_out := len(read) - len(kept):
        console.warn(
            f"{left_out:,} training prompts have the token ids of held-out prompts and are left out: the teacher could "
            "not tell them apart"
        )
    return kept, left_out


def to_score(
    part: str, prompt: Prompt, text: str, ids: np.ndarray, number: int, origin: str, response: np.ndarray
) -> Wanted:
    """A given response, as one that the teacher is to score."""
    return Wanted(part, prompt, text, ids, number, score_key(ids, response), origin, response)


def references(part: str, asked: Asked, tokenizer) -> Iterator[Wanted]:
    """The prompts' references."""
    for prompt, text, ids in asked:
        for number, reference in enumerate(prompt.references):
            yield to_score(part, prompt, text, ids, number, "reference", encode_response(tokenizer, reference))


def corrupted(part: str, asked: Asked, tokenizer, count: int, seed: int) -> Iterator[Wanted]:
    """Corrupted copies of each prompt's first reference, which depend on the prompt and the seed alone."""
    for prompt, text, ids in asked:
        right = [encode_response(tokenizer, reference) for reference in prompt.references]
        for number, wrong in enumerate(corruptions(right, count, [seed, *ids.tolist()]) if right else ()):
            yield to_score(part, prompt, text, ids, number, "corrupted", wrong)


def look_up(orders: Sequence[Order], retry_skipped: bool = False, set_aside: bool = True) -> tuple[int, int]:
    """Find what is cached of all orders; returns how many rows are, and how many must be made."""
    for order in orders:
        order.look_up(retry_skipped, set_aside)
        for shard, what in order.folder.damaged.items():
            console.warn(f"damaged shard, rows that no other one has are made again: {order.folder}/{shard}: {what}")
    plain = [widest for order in orders for widest in order.plain_only()]
    if plain:
        console.warn(
            f"{len(plain):,} stored rows have the teacher's top k and are to be scored anew for "
            f"generate.support=sampled; generate.support=topk with generate.k={min(plain)} keeps what is there"
        )
    return sum(len(order.cached) for order in orders), sum(len(order.missing) + len(order.widen) for order in orders)


def fulfil(
    selections: Mapping[Path, Sequence[Order]],
    teacher: Teacher,
    settings: Generate,
    cached: int,
    engine: Engine | None = None,
) -> tuple[Summary, dict]:
    """Have made what `look_up` did not find, and look again; returns the counts, and tokens and seconds it took.

    selections: folder -> the orders that it is to hold. engine: in place of the teacher's own, which is opened only
    where something must be made. Raises UserError, before that, where nothing can be written.
    """
    orders = [order for each in selections.values() for order in each]
    lacking = [(order, wanted) for order in orders for wanted in [*order.missing, *order.widen]]
    for out, each in selections.items():
        require_writable(out)
        leave_word(each, out, complete=False)
    for order in orders:
        order.describe(teacher.description)
    if lacking and engine is None:
        engine = _opened(teacher, settings, max(order.length(wanted) for order, wanted in lacking))
    interrupts.keeps("What was made so far is kept; run the same command to go on")
    asked = time.monotonic()
    tokens = sum(
        order.fulfil(engine, teacher.tokenizer, teacher.description, settings.rows_per_shard) for order in orders
    )
    asking = time.monotonic() - asked
    for order in orders:
        order.look_up()
    made = sum(len(order.cached) for order in orders) - cached
    lost = sum(len(order.missing) + len(order.widen) for order in orders)
    if lost:
        console.warn(f"the engine gave no answer for {lost} rows; run the same command to ask again")
    failed = {order.folder: order.skipped for order in orders if order.skipped}
    if failed and not any(order.cached for order in orders):
        (folder, reasons), count = next(iter(failed.items())), sum(map(len, failed.values()))
        raise UserError(
            f"none of {count:,} rows could be made; the first: {next(iter(reasons.values()))}. All reasons are in "
            f"{folder.path / SKIPPED}; once that is mended, add --retry-skipped"
        )
    summary = Summary(cached, made, sum(len(order.skipped) for order in orders) + lost)
    return summary, {"tokens": tokens, "seconds": asking}


def _opened(teacher: Teacher, settings: Generate, longest: int) -> Engine:
    """The teacher's engine. Raises UserError where it cannot start, or the weights are not those of the teacher."""
    if teacher.engine != "text":
        console.say(f"loading the teacher from {teacher.source} with engine {teacher.engine}")
    if teacher.engine in ("vllm", "ray"):  # which would fill what is absent with random values
        require_loadable(teacher.source)
    what = f"engine {teacher.engine} cannot start with {teacher.source}"
    with in_one_line(what, "Nothing was lost; try --engine hf"):
        return open_engine(teacher.engine, teacher.source, teacher.loading(settings, longest))


def leave_word(orders: Sequence[Order], out: Path, complete: bool) -> None:
    """Tell the store that the selection `out` is made of these orders, or is about to be."""
    folder, requests = orders[0].folder, [order.request.identity for order in orders if order.wanted]
    known = Reference.of(out, folder.teacher, requests, complete).record(folder.storage)
    if complete and not known:
        console.warn(f"{folder.storage.name} can only be read: `cache gc` there will not know that {out} uses it")


def cost_of(summary: Summary, manifest: dict, orders: Sequence[Order], asked: dict) -> dict:
    """Rows, tokens, bytes and seconds of this run; bytes a token are of the rows' shards, text and ids included."""
    shards = {location.shard for order in orders for found in order.index.values() for location in found}
    stored = sum(shard.stat().st_size for shard in shards)
    held = sum(count_tokens(shard) for shard in shards)
    return {
        "rows_found": summary.cached,
        "rows_made": summary.made,
        "rows_left_out": summary.skipped,
        "tokens_selected": sum(part["tokens"] for part in manifest["parts"].values()),
        "tokens_made": asked["tokens"],
        "seconds_asking": asked["seconds"] if summary.made else 0.0,
        "seconds": seconds_since_start(),
        "tokens_per_second": asked["tokens"] / asked["seconds"] if summary.made else None,
        "store_bytes": stored,
        "bytes_per_token": stored / held if held else None,
    }


def report(
    what: str,
    summary: Summary,
    parts: dict[str, Part],
    orders: Sequence[Order],
    out: Path,
    cost: dict,
    more: Sequence[tuple[str, object]] = (),
) -> None:
    rate = f", {cost['tokens_per_second']:,.0f} tokens/s without loading" if cost["tokens_per_second"] else ""
    size = f"{cost['store_bytes'] / 2**20:,.1f} MiB, {cost['bytes_per_token'] or 0:,.0f} bytes a token"
    console.facts(
        what,
        [
            ("found in the store", f"{summary.cached:,} rows"),
            ("made now", f"{summary.made:,} rows, {cost['tokens_made']:,} tokens in {cost['seconds']:.0f} s{rate}"),
            ("left out", _left_out(summary, orders)),
            ("selected", ", ".join(f"{part.rows:,} {name}" for name, part in parts.items())),
            *more,
            ("store", f"{orders[0].folder.storage.name}/{orders[0].folder.teacher} ({size})"),
            ("selection", out),
        ],
    )


def _left_out(summary: Summary, orders: Sequence[Order]) -> str:
    """How many rows, and where their reasons are."""
    where = ", ".join(str(order.folder.path / SKIPPED) for order in orders if order.skipped)
    return f"{summary.skipped:,} rows" + (f" ({where})" if where else "")

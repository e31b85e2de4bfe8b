"""Ask a teacher for what the store does not hold, and keep every answer as it comes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline import console, interrupts
from pipeline.engines.base import Answer, Ask, Engine, Failure, too_long
from pipeline.errors import UserError, reason_of
from pipeline.files import require_writable
from pipeline.models import Context
from pipeline.prompts import Prompt
from pipeline.store.identity import Request, sample_seed
from pipeline.store.narrowing import holds_top
from pipeline.store.requests import SKIPPED, Location, RequestFolder, pick, pick_unsure
from pipeline.store.schema import Row, footer, value_fault
from pipeline.store.selection import Part

_DROPPED = 1e-6  # mass at a position on ids that no token has, above which it is said
_WARNINGS = 5  # rows left out that are named on the terminal; skipped.jsonl has them all


@dataclass(frozen=True, slots=True)
class Wanted:
    """One row that an experiment needs."""

    part: str  # of the selection: train, validation, scored
    prompt: Prompt
    text: str  # the rendered prompt
    prompt_ids: np.ndarray
    sample: int
    key: str
    origin: str = "teacher"
    response_ids: np.ndarray | None = None  # given where it is to be scored

    def ask(self) -> Ask:
        return Ask(self.key, self.prompt_ids, sample_seed(self.key), self.response_ids)


@dataclass
class Order:
    """All rows that are wanted of one request, and, after `look_up`, what the store says about them."""

    request: Request
    folder: RequestFolder
    wanted: list[Wanted]
    k: int
    stop_token_ids: tuple[int, ...]
    context: Context
    support: str | None = "topk"  # or sampled; None where no teacher is run
    cached: list[Wanted] = field(default_factory=list)
    missing: list[Wanted] = field(default_factory=list)
    widen: list[Wanted] = field(default_factory=list)  # stored with fewer than k tokens a position, or others
    skipped: dict[str, str] = field(default_factory=dict)  # key -> reason
    rejected: set[str] = field(default_factory=set)  # keys that are cached and not selected
    warned: int = 0  # rows left out that were named on the terminal

    def look_up(self, retry_skipped: bool = False, set_aside: bool = True) -> None:
        """Sort the wanted rows into cached, missing, widen and skipped. Damaged shards count as absent."""
        self.index = self.folder.index(set_aside)
        self.locations = self._locations()
        known = {} if retry_skipped else self.folder.skipped()
        self.cached, self.missing, self.widen, self.skipped = [], [], [], {}
        for wanted in {wanted.key: wanted for wanted in self.wanted}.values():
            locations = self.index.get(wanted.key, [])
            if wanted.key in self.locations:
                self.cached.append(wanted)
            elif reason := known.get(wanted.key, {}).get("reason"):
                self.skipped[wanted.key] = reason
            elif locations:
                self.widen.append(wanted)
            elif reason := self._too_long(wanted):
                self.skipped[wanted.key] = reason
            else:
                self.missing.append(wanted)

    def _locations(self) -> dict[str, Location]:
        """Where the wanted rows are that need no teacher, by key. Sampled rows are read to see if they have a top k."""
        found: dict[str, Location] = {}
        unsure: dict[str, Location] = {}
        for key in {wanted.key: None for wanted in self.wanted}:
            stored = self.index.get(key, ()), self.k, self.support
            if location := pick(*stored):
                found[key] = location
            elif location := pick_unsure(*stored):
                unsure[key] = location
        rows = self.folder.read_each(unsure.values())
        return found | {key: unsure[key] for key, row in zip(unsure, rows, strict=True) if holds_top(row, self.k)}

    def stored(self, key: str) -> Location | None:
        """Where a row is stored, also with too few tokens: the widest of the support, else the widest."""
        locations = self.index.get(key, ())
        return max(locations, key=lambda each: (each.support == self.support, each.k), default=None)

    def plain_only(self) -> list[int]:
        """Tokens a position of rows whose top k is stored, and which are to be scored anew to have a sample."""
        stored = [self.stored(wanted.key) for wanted in self.widen if self.support == "sampled"]
        return [location.k for location in stored if location.support == "topk" and location.k]

    def describe(self, teacher: dict) -> None:
        """Make the order's folder self-describing. Raises UserError where rows are lacking and cannot be written."""
        if self.missing or self.widen:
            self.folder.describe(teacher, self.request.describe())
            require_writable(self.folder.storage.outbox(self.folder.name))
        elif self.wanted:
            with suppress(UserError):  # a store that can only be read serves what it has
                self.folder.describe(teacher, self.request.describe())

    def length(self, wanted: Wanted) -> int:
        """Most tokens that prompt and response can have together."""
        given = wanted.response_ids
        return len(wanted.prompt_ids) + (self.request.sampling.max_tokens if given is None else len(given))

    def _too_long(self, wanted: Wanted) -> str | None:
        prompt = len(wanted.prompt_ids)
        return too_long(prompt, self.length(wanted) - prompt, self.context)

    def fulfil(self, engine: Engine, tokenizer, teacher: dict, rows_per_shard: int) -> int:
        """Have everything made that is missing or stored with too few tokens; returns the number of tokens.

        Every `rows_per_shard` answers become a shard at once, and so does the rest when the run is interrupted.
        """
        if not self.missing and not self.widen:
            with suppress(UserError):  # as above
                self._record_skips()
            return 0
        self._record_skips()
        writer = _Writer(self, engine, tokenizer, teacher, rows_per_shard)
        rows = {wanted.key: wanted for wanted in self.missing}
        asks = (wanted.ask() for wanted in self.missing)
        if self.request.sampling is not None:
            sampled = engine.sample(asks, self.request.sampling, self.k, support=self.support)
            writer.write("sampling", sampled, rows)
        else:
            writer.write("scoring", engine.score(asks, self.k, self.stop_token_ids, support=self.support), rows)
        rows = {wanted.key: wanted for wanted in self.widen}
        stored = self.folder.read_each(self.stored(wanted.key) for wanted in self.widen)
        asks = (Ask(row.key, row.prompt_ids, response_ids=row.response_ids) for row in stored)
        scored = engine.score(asks, self.k, self.stop_token_ids, support=self.support)
        writer.write(f"scoring for k = {self.k}", scored, rows)
        if writer.dropped > _DROPPED:
            largest = f"{writer.dropped:.0e}".replace("e-0", "e-")
            console.warn(
                f"up to {largest} of the teacher's probability at a position is on ids that its tokenizer does not "
                "have; it is left out and the rest renormalised"
            )
        return writer.tokens

    def _record_skips(self) -> None:
        recorded = self.folder.skipped()
        new = {wanted.key: wanted for wanted in self.wanted if wanted.key in self.skipped.keys() - recorded.keys()}
        self.skip({key: (wanted, self.skipped[key]) for key, wanted in new.items()})

    def skip(self, rows: dict[str, tuple[Wanted, str]]) -> None:
        """Record rows that cannot be made: key -> what was wanted, and the reason."""
        for key, (wanted, reason) in rows.items():
            self.skipped[key] = reason
            self.warned += 1
            if self.warned <= _WARNINGS:
                console.warn(f"prompt '{wanted.prompt.id}' left out: {reason}")
            elif self.warned == _WARNINGS + 1:
                console.warn(f"more rows are left out: {self.folder.path / SKIPPED} has them all, with the reasons")
        entries = [
            {"key": key, "prompt_id": wanted.prompt.id, "reason": reason} for key, (wanted, reason) in rows.items()
        ]
        with interrupts.deferred():
            self.folder.skip(entries)

    def parts(self) -> dict[str, Part]:
        """The cached rows by part, in the order they were wanted; call after a last `look_up`."""
        parts: dict[str, Part] = {}
        for wanted in self.wanted:
            location = self.locations.get(wanted.key)
            if location and wanted.key not in self.rejected:
                stops = self.stop_token_ids if self.request.sampling is None else None
                part = parts.setdefault(wanted.part, Part(self.folder, self.request, stops))
                part.add(wanted.prompt.id, wanted.key, wanted.origin, location, wanted.text)
        return parts

    def reject(self, part: str, accepts: Callable[[str, Sequence[str]], bool]) -> int:
        """Leave cached rows of a part out of the selection that `accepts(response, references)` does not; how many."""
        wanted = [wanted for wanted in self.cached if wanted.part == part]
        rows = self.folder.read_each(self.locations[each.key] for each in wanted)
        self.rejected = {
            each.key
            for each, row in zip(wanted, rows, strict=True)
            if not accepts(row.response, each.prompt.references)
        }
        return len(self.rejected)


class _Writer:
    """Turns answers into shards."""

    def __init__(self, order: Order, engine: Engine, tokenizer, teacher: dict, rows_per_shard: int):
        self.order, self.tokenizer, self.rows_per_shard = order, tokenizer, rows_per_shard
        described = order.request.describe()
        self.footer = footer(teacher, described, order.k, order.support, engine=engine.description)
        self.tokens = 0
        self.dropped = 0.0  # largest mass at a position on ids that no token has

    def write(self, what: str, answers: Iterator[Answer | Failure], wanted: dict[str, Wanted]) -> None:
        """Have every row of `wanted` (by key) made and stored, or recorded as left out."""
        if not wanted:
            return
        waiting: list[Answer] = []
        failed: dict[str, tuple[Wanted, str]] = {}
        # A signal interrupts only the engine at its work: what it has finished is handed over, and flushed, first.
        with console.progress(what, len(wanted)) as advance, closing(answers), interrupts.deferred():
            try:
                for answer in _from_engine(answers):
                    if reason := answer.reason if isinstance(answer, Failure) else value_fault(answer):
                        failed[answer.key] = wanted[answer.key], reason
                    else:
                        waiting.append(answer)
                        self.tokens += len(answer.response_ids)
                        self.dropped = max(self.dropped, answer.dropped)
                    advance(note=f"{self.tokens:,} tokens")
                    if len(waiting) + len(failed) >= self.rows_per_shard:
                        self._flush(waiting, failed, wanted)
            finally:  # also when the engine fails or somebody interrupts: what was made is kept
                self._flush(waiting, failed, wanted)

    def _flush(self, waiting: list[Answer], failed: dict[str, tuple[Wanted, str]], wanted: dict[str, Wanted]) -> None:
        if waiting:
            self.order.folder.add(list(self._rows(list(self._widened(waiting)), wanted)), self.footer)
            waiting.clear()
        if failed:
            self.order.skip(failed)
            failed.clear()

    def _widened(self, answers: Sequence[Answer]) -> Iterator[Answer]:
        """Answers to rows that are stored otherwise keep what is stored: see `widened`."""
        stored = [self.order.stored(answer.key) for answer in answers]
        rows = iter(self.order.folder.read(location for location in stored if location))
        for answer, location in zip(answers, stored, strict=True):
            yield widened(next(rows), answer) if location else answer

    def _rows(self, answers: Sequence[Answer], wanted: dict[str, Wanted]) -> Iterable[Row]:
        texts = self.tokenizer.batch_decode([a.response_ids for a in answers], skip_special_tokens=True)
        for answer, text in zip(answers, texts, strict=True):
            row = wanted[answer.key]
            yield Row(
                key=answer.key, origin=row.origin, prompt_id=row.prompt.id, sample=row.sample,
                prompt=row.text, response=text, prompt_ids=row.prompt_ids, response_ids=answer.response_ids,
                finish=answer.finish, logprobs=answer.logprobs, topk_ids=answer.topk_ids,
                topk_logprobs=answer.topk_logprobs.astype(np.float16), lse=answer.lse,
                tau=answer.tau, tail=answer.tail,
            )  # fmt: skip


def widened(row: Row, answer: Answer) -> Answer:
    """A second answer [T, K] to a stored row [T, k], k < K: the row's own values, and what the answer adds behind them.

    A second reading differs in its last bits. Values that are stored once stay, so that a selection of k tokens a
    position is the same before and after; what is added is not above them. A sample of K tokens is a draw of its own,
    so where either is sampled only the row's end stays. A row of no tokens has nothing to keep, nor a k to read it by
    (where it is read without other rows, it has k = 0).
    """
    if not len(row.response_ids) or row.tau is not None or answer.tau is not None:
        return replace(answer, finish=row.finish)
    known = (answer.topk_ids[:, :, None] == row.topk_ids[:, None, :]).any(-1)  # [T, K]
    added = np.argsort(known, axis=1, kind="stable")[:, : answer.topk_ids.shape[1] - row.k]
    values, lowest = np.take_along_axis(answer.topk_logprobs, added, 1), row.topk_logprobs[:, -1:]
    return replace(
        answer,
        finish=row.finish,
        logprobs=row.logprobs,
        topk_ids=np.concatenate([row.topk_ids, np.take_along_axis(answer.topk_ids, added, 1)], 1),
        topk_logprobs=np.concatenate([row.topk_logprobs, np.minimum(values, lowest) if row.k else values], 1),
        lse=answer.lse if row.lse is None else row.lse,
    )


def _from_engine(answers: Iterator[Answer | Failure]) -> Iterator[Answer | Failure]:
    """The answers; whatever an engine dies of becomes a UserError."""
    try:
        yield from answers
    except UserError:
        raise
    except Exception as error:
        if interrupts.noted():  # processes of the engine's got the signal too
            raise interrupts.interrupted() from error
        raise UserError(
            f"the teacher's engine failed: {reason_of(error)}. What was made is kept; run the same command to go on"
        ) from error

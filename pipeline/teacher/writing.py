"""What an engine answers becomes rows of the store as it comes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace

import numpy as np

from pipeline import console, interrupts
from pipeline.engines.base import Answer, Answers, Ask, Engine, Failure
from pipeline.errors import UserError, reason_of
from pipeline.store.requests import SKIPPED
from pipeline.store.schema import Row, footer, value_fault
from pipeline.teacher.items import Item
from pipeline.teacher.orders import Plan

_DROPPED = 1e-6  # mass at a position on ids that no token has, above which there is a warning
_WARNINGS = 5  # rows left out that are named on the terminal; skipped.jsonl has them all


def make(plan: Plan, engine: Engine | None) -> int:
    """Make everything that is missing or stored with too few tokens; returns the number of tokens made.

    Every `loading.rows` answers become a shard at once, and so does the rest when the run is interrupted.
    """
    writer = _Writer(plan, engine)
    if not plan.to_make:
        with suppress(UserError):  # a store that can only be read serves what it has
            writer.record_planned()
        return 0
    writer.record_planned()
    asks, order, stops = (item.ask() for item in plan.missing), plan.order, plan.teacher.stops
    if order.request.sampling is not None:
        sampled = engine.sample(asks, order.request.sampling, order.k, support=order.support)
        writer.write("sampling", sampled, plan.missing)
    else:
        writer.write("scoring", engine.score(asks, order.k, stops, support=order.support), plan.missing)
    stored = plan.folder.read_each(plan.stored(item.key) for item in plan.rescore)
    asks = (Ask(row.key, row.prompt_ids, response_ids=row.response_ids) for row in stored)
    scored = engine.score(asks, order.k, stops, support=order.support)
    writer.write(f"scoring for k = {order.k}", scored, plan.rescore)
    if writer.dropped > _DROPPED:
        largest = f"{writer.dropped:.0e}".replace("e-0", "e-")
        console.warn(
            f"up to {largest} of the teacher's probability at a position is on ids that its tokenizer does not "
            "have; it is left out and the rest renormalised"
        )
    return writer.tokens


class _Writer:
    """Turns answers into shards; rows that are left out are recorded, and the first ones named on the terminal."""

    def __init__(self, plan: Plan, engine: Engine | None):
        """engine: None where there is nothing to write."""
        self.plan, self.teacher, self.engine = plan, plan.teacher, engine
        self.tokens, self.warned = 0, 0
        self.dropped = 0.0  # largest mass at a position on ids that no token has

    def record_planned(self) -> None:
        """Record what the plan leaves out and the store does not know of yet."""
        known = self.plan.folder.skipped()
        reasons = {key: reason for key, reason in self.plan.skipped.items() if key not in known}
        self._record({item.key: (item, reasons[item.key]) for item in self.plan.order.items if item.key in reasons})

    def _record(self, rows: Mapping[str, tuple[Item, str]]) -> None:
        """rows: key -> what was wanted, and why it cannot be made."""
        by = "" if self.teacher.role == "teacher" else f" by the {self.teacher.role}"
        for item, reason in rows.values():
            self.warned += 1
            if self.warned <= _WARNINGS:
                console.warn(f"prompt '{item.prompt.id}' left out{by}: {reason}")
            elif self.warned == _WARNINGS + 1:
                console.warn(f"more rows are left out: {self.plan.folder.path / SKIPPED} has all, with the reasons")
        entries = [{"key": key, "prompt_id": item.prompt.id, "reason": reason} for key, (item, reason) in rows.items()]
        with interrupts.deferred():
            self.plan.folder.skip(entries)

    def write(self, what: str, answers: Answers, items: Sequence[Item]) -> None:
        """Have every one of `items` made and stored, or recorded as left out."""
        if not items:
            return
        by_key = {item.key: item for item in items}
        waiting: list[Answer] = []
        failed: dict[str, tuple[Item, str]] = {}
        # A signal interrupts only the engine at its work: what it has finished is handed over, and flushed, first.
        with console.progress(what, len(items)) as advance, closing(answers), interrupts.deferred():
            try:
                for answer in _from_engine(answers, self.teacher.role):
                    if reason := answer.reason if isinstance(answer, Failure) else value_fault(answer):
                        failed[answer.key] = by_key[answer.key], reason
                    else:
                        waiting.append(answer)
                        self.tokens += len(answer.response_ids)
                        self.dropped = max(self.dropped, answer.dropped)
                    advance(note=f"{self.tokens:,} tokens")
                    if len(waiting) + len(failed) >= self.teacher.loading.rows:
                        self._flush(waiting, failed, by_key)
            finally:  # also when the engine fails or somebody interrupts: what was made is kept
                self._flush(waiting, failed, by_key)

    def _flush(self, waiting: list[Answer], failed: dict[str, tuple[Item, str]], items: Mapping[str, Item]) -> None:
        if waiting:
            order, engine = self.plan.order, self.engine.description
            about = footer(self.teacher.description, order.request.describe(), order.k, order.support, engine=engine)
            self.plan.folder.add(list(self._rows(list(self._widened(waiting)), items)), about)
            waiting.clear()
        if failed:
            self._record(failed)
            failed.clear()

    def _widened(self, answers: Sequence[Answer]) -> Iterator[Answer]:
        """Answers to rows that are stored otherwise keep what is stored: see `widened`."""
        stored = [self.plan.stored(answer.key) for answer in answers]
        rows = iter(self.plan.folder.read(location for location in stored if location))
        for answer, location in zip(answers, stored, strict=True):
            yield widened(next(rows), answer) if location else answer

    def _rows(self, answers: Sequence[Answer], items: Mapping[str, Item]) -> Iterable[Row]:
        texts = self.teacher.tokenizer.batch_decode([a.response_ids for a in answers], skip_special_tokens=True)
        for answer, text in zip(answers, texts, strict=True):
            yield row_of(items[answer.key], answer, text)


def row_of(item: Item, answer: Answer, response: str | None = None) -> Row:
    """An answer as the row that a shard has of it. response: its text."""
    return Row(
        key=answer.key, origin=item.origin, prompt_id=item.prompt.id, sample=item.sample,
        prompt=item.text, response=response, prompt_ids=item.prompt_ids, response_ids=answer.response_ids,
        finish=answer.finish, logprobs=answer.logprobs, topk_ids=answer.topk_ids,
        topk_logprobs=answer.topk_logprobs.astype(np.float16), lse=answer.lse, tau=answer.tau, tail=answer.tail,
    )  # fmt: skip


def widened(row: Row, answer: Answer) -> Answer:
    """A second answer [T, K] to a stored row [T, k], k < K: the row's own values, and what the answer adds behind them.

    A second reading differs in its last bits. Values that are stored once stay, so that a selection of k tokens per
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


def _from_engine(answers: Answers, role: str) -> Answers:
    """The answers; whatever an engine dies of becomes a UserError."""
    try:
        yield from answers
    except UserError:
        raise
    except Exception as error:
        if interrupts.noted():  # processes of the engine's got the signal too
            raise interrupts.interrupted() from error
        raise UserError(
            f"the {role}'s engine failed: {reason_of(error)}. What was made is kept; run the same command to go on"
        ) from error

"""A teacher as a service: what the store holds is read, and the rest is asked of one engine that stays open."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import console, interrupts
from pipeline.engines import Engine, open_engine
from pipeline.errors import UserError, in_one_line
from pipeline.files import require_writable
from pipeline.models import require_loadable
from pipeline.store.requests import SKIPPED, RequestFolder
from pipeline.store.storage import Storage
from pipeline.store.users import User
from pipeline.teacher.orders import Order, Plan
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.writing import make


@dataclass(frozen=True)
class Answered:
    """What orders got: the plans after asking, and what the run found and did, in rows, tokens and seconds."""

    plans: Sequence[Plan]
    found: int  # rows that the store held
    made: int
    left_out: int
    tokens: int  # of the responses that were made
    seconds: float  # of the asking, without loading


class Session:
    """`with Session(teacher, store) as session: session.answer([order])`, for as many orders as one wants.

    The teacher's engine is opened when something must be made, stays open for later orders, and is closed at the end of
    the block, which frees its memory. It is opened anew where a later order needs a longer context.
    """

    def __init__(self, teacher: Teacher, storage: Storage, engine: Engine | None = None):
        """engine: in place of the teacher's own; it is not closed."""
        self.teacher, self.storage = teacher, storage
        self._borrowed, self._engine, self._longest = engine, None, 0

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the engine that this session opened, if it did."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def plan(self, orders: Sequence[Order], retry_skipped: bool = False, set_aside: bool = True) -> list[Plan]:
        """What the store has of each order, and what must be made; nothing is asked.

        set_aside: move damaged shards aside, which only a run that asks may do.
        """
        plans = []
        for order in orders:
            folder = RequestFolder(self.storage, self.teacher.identity, order.request.identity)
            plans.append(Plan.of(order, self.teacher, folder, retry_skipped, set_aside))
            for shard, what in folder.damaged.items():
                console.warn(f"damaged shard, rows that no other one has are made again: {folder}/{shard}: {what}")
        if plain := [k for plan in plans for k in plan.plain_only()]:
            console.warn(
                f"{len(plain):,} stored rows have the teacher's top k and are to be scored anew for "
                f"generate.support=sampled; generate.support=topk with generate.k={min(plain)} keeps what is there"
            )
        return plans

    def answer(self, orders: Sequence[Order], retry_skipped: bool = False) -> Answered:
        """Have the teacher make what the store does not hold of the orders.

        Before anything is asked the store is told which selections will use the rows. Raises UserError, before that,
        where something is to be made and cannot be written, and at the end where no row at all could be made.
        """
        plans = self.plan(orders, retry_skipped)
        held = sum(len(plan.cached) for plan in plans)
        for selection, requests in _by_selection(orders).items():
            require_writable(selection)
            self._record_use(selection, requests, complete=False)
        for plan in plans:
            self._describe(plan)
        lengths = [plan.order.length(item) for plan in plans for item in plan.to_make]
        engine = self._opened(max(lengths)) if lengths else None
        interrupts.keeps("What was made so far is kept; run the same command to go on")
        begun = time.monotonic()
        tokens = sum(make(plan, engine) for plan in plans)
        seconds = time.monotonic() - begun
        plans = [Plan.of(plan.order, self.teacher, plan.folder) for plan in plans]
        unanswered = sum(len(plan.to_make) for plan in plans)
        if unanswered:
            console.warn(f"the engine gave no answer for {unanswered} rows; run the same command to ask again")
        self._require_some(plans)
        cached = sum(len(plan.cached) for plan in plans)
        left_out = sum(len(plan.skipped) for plan in plans) + unanswered
        return Answered(plans, held, cached - held, left_out, tokens, seconds)

    def record_use(self, orders: Sequence[Order]) -> None:
        """Tell the store that the orders' selections are written: `cache gc` removes no row that they hold."""
        for selection, requests in _by_selection(orders).items():
            self.record_user(selection, requests)

    def record_user(self, selection: Path, requests: list[str]) -> None:
        """Tell the store that a selection of rows of these requests (identities) is written."""
        if not self._record_use(selection, requests, complete=True):
            console.warn(
                f"{self.storage.name} can only be read: `cache gc` there will not know that {selection} uses it"
            )

    def forget_use(self, orders: Sequence[Order]) -> None:
        """Tell the store that the orders' selections will not be written: `cache gc` may remove what was made."""
        for selection, requests in _by_selection(orders).items():
            with suppress(OSError, UserError):  # a store that can only be read was not told of them
                self.storage.remove(User.of(selection, self.teacher.identity, requests, complete=False).name)

    def _record_use(self, selection: Path, requests: list[str], complete: bool) -> bool:
        """Whether the store could be told; a selection of no rows uses nothing."""
        return not requests or User.of(selection, self.teacher.identity, requests, complete).record(self.storage)

    def _describe(self, plan: Plan) -> None:
        """Make the plan's folder self-describing. Raises UserError where rows are lacking and cannot be written."""
        described = self.teacher.description, plan.order.request.describe()
        if plan.to_make:
            plan.folder.describe(*described)
            require_writable(self.storage.outbox(plan.folder.name))
        elif plan.order.items:
            with suppress(UserError):  # a store that can only be read serves what it has
                plan.folder.describe(*described)

    def _opened(self, longest: int) -> Engine:
        """The engine, with room for `longest` tokens of prompt and response together.

        Raises UserError where it cannot start, or the weights are not those of the teacher.
        """
        if self._borrowed is not None:
            return self._borrowed
        teacher = self.teacher
        if self._engine is not None and longest <= self._longest:
            return self._engine
        self.close()
        if teacher.engine != "text":
            console.say(f"loading the {teacher.role} from {teacher.source} with engine {teacher.engine}")
        if teacher.engine in ("vllm", "ray"):  # which would fill what is absent with random values
            require_loadable(teacher.source)
        what = f"engine {teacher.engine} cannot start with {teacher.source}"
        with in_one_line(what, "Nothing was lost; try --engine hf"):
            self._engine = open_engine(teacher.engine, teacher.source, replace(teacher.loading, context=longest))
        self._longest = longest
        return self._engine

    def _require_some(self, plans: Sequence[Plan]) -> None:
        """Raises UserError where rows were left out and none is there."""
        failed: Mapping[RequestFolder, Mapping[str, str]] = {p.folder: p.skipped for p in plans if p.skipped}
        if failed and not any(plan.cached for plan in plans):
            (folder, reasons), count = next(iter(failed.items())), sum(map(len, failed.values()))
            raise UserError(
                f"none of {count:,} rows could be made by the {self.teacher.role}; the first: "
                f"{next(iter(reasons.values()))}. All reasons are in {folder.path / SKIPPED}; once that is mended, add "
                "--retry-skipped"
            )


def _by_selection(orders: Iterable[Order]) -> dict[Path, list[str]]:
    """Selection -> identities of the requests that it holds rows of."""
    requests: dict[Path, list[str]] = {}
    for order in orders:
        if order.selection is not None:
            requests.setdefault(order.selection, [])
            if order.items:
                requests[order.selection].append(order.request.identity)
    return requests

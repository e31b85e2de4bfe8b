"""Rows wanted of a teacher (an order), and which of them the store has and which must be made (a plan)."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.engines.base import too_long
from pipeline.store.identity import Request
from pipeline.store.narrowing import holds_top
from pipeline.store.requests import Location, RequestFolder, pick, pick_unsure
from pipeline.store.schema import Row
from pipeline.store.selection_files import Part
from pipeline.teacher.items import Item
from pipeline.teacher.teacher import Teacher


@dataclass(frozen=True)
class Order:
    """Rows that are wanted of one request, and the selection that is to hold them."""

    request: Request
    items: Sequence[Item]
    k: int  # tokens per position
    support: str | None  # sampled or topk; None where no teacher is run
    selection: Path | None = None  # the store is told of it, so that `cache gc` keeps what was made for it

    def length(self, item: Item) -> int:
        """Most tokens that prompt and response can have together."""
        response = self.request.sampling.max_tokens if item.response_ids is None else len(item.response_ids)
        return len(item.prompt_ids) + response


@dataclass(frozen=True)
class Plan:
    """What the store has of an order, and what must be made. Each row stands in one of the four lists, once."""

    order: Order
    teacher: Teacher
    folder: RequestFolder
    index: Mapping[str, list[Location]]  # all rows of the request
    locations: Mapping[str, Location]  # the wanted rows that need no teacher
    cached: Sequence[Item]
    missing: Sequence[Item]
    rescore: Sequence[Item]  # stored with fewer than k tokens per position, or with others
    skipped: Mapping[str, str]  # key -> reason

    @classmethod
    def of(
        cls, order: Order, teacher: Teacher, folder: RequestFolder, retry_skipped: bool = False, set_aside: bool = True
    ) -> "Plan":
        """Look up what the store has. Damaged shards count as absent, and are moved aside with `set_aside`.

        retry_skipped: rows that could not be made before are missing again.
        """
        index = folder.index(set_aside)
        items = {item.key: item for item in order.items}
        locations = _locations(order, items, folder, index)
        known = {} if retry_skipped else folder.skipped()
        cached, missing, rescore, skipped = [], [], [], {}
        for key, item in items.items():
            if key in locations:
                cached.append(item)
            elif reason := known.get(key, {}).get("reason"):
                skipped[key] = reason
            elif index.get(key):
                rescore.append(item)
            elif reason := too_long(prompt := len(item.prompt_ids), order.length(item) - prompt, teacher.context):
                skipped[key] = reason
            else:
                missing.append(item)
        return cls(order, teacher, folder, index, locations, cached, missing, rescore, skipped)

    @cached_property
    def to_make(self) -> Sequence[Item]:
        """What a teacher has to answer or to score."""
        return [*self.missing, *self.rescore]

    def stored(self, key: str) -> Location | None:
        """Where a row is stored, also with too few tokens: the widest of the support, else the widest."""
        locations = self.index.get(key, ())
        return max(locations, key=lambda each: (each.support == self.order.support, each.k), default=None)

    def plain_only(self) -> list[int]:
        """Tokens per position of rows whose top k is stored, and which are to be scored anew to have a sample."""
        stored = [self.stored(item.key) for item in self.rescore if self.order.support == "sampled"]
        return [location.k for location in stored if location.support == "topk" and location.k]

    def parts(self, without: Collection[str] = ()) -> dict[str, Part]:
        """The cached rows by part, in the order they were wanted, but for the keys `without`."""
        parts: dict[str, Part] = {}
        for item in self.order.items:
            location = self.locations.get(item.key)
            if location and item.key not in without:
                stops = self.teacher.stops if self.order.request.sampling is None else None
                part = parts.setdefault(item.part, Part(self.folder, self.order.request, stops))
                part.add(item.prompt.id, item.key, item.origin, location, item.text)
        return parts

    def rows(self) -> Iterator[tuple[Item, Row]]:
        """The cached rows and what they answer, in the order in which they were wanted."""
        items = [item for item in self.order.items if item.key in self.locations]
        return zip(items, self.folder.read_each(self.locations[item.key] for item in items), strict=True)

    def rejected(self, part: str, accepts: Callable[[str, Sequence[str]], bool]) -> set[str]:
        """Keys of a part's cached rows for which `accepts(response, references)` is false."""
        items = [item for item in self.cached if item.part == part]
        rows = self.folder.read_each(self.locations[item.key] for item in items)
        pairs = zip(items, rows, strict=True)
        return {item.key for item, row in pairs if not accepts(row.response, item.prompt.references)}


def _locations(
    order: Order, keys: Collection[str], folder: RequestFolder, index: Mapping[str, list[Location]]
) -> dict[str, Location]:
    """Where the wanted rows are that need no teacher, by key. Sampled rows are read to see if they have a top k."""
    sure: dict[str, Location] = {}
    unsure: dict[str, Location] = {}
    for key in keys:
        stored = index.get(key, ()), order.k, order.support
        if location := pick(*stored):
            sure[key] = location
        elif location := pick_unsure(*stored):
            unsure[key] = location
    rows = folder.read_each(unsure.values())
    return sure | {key: unsure[key] for key, row in zip(unsure, rows, strict=True) if holds_top(row, order.k)}

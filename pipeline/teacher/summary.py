"""What a run that asked a teacher found, made and took: for the terminal and for results.json."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import console
from pipeline.provenance import seconds_since_start
from pipeline.store.requests import SKIPPED
from pipeline.store.schema import read_metadata
from pipeline.store.selection_files import Part
from pipeline.teacher.orders import Plan
from pipeline.teacher.session import Answered


@dataclass(frozen=True)
class Summary:
    """What a run found and did, in rows."""

    cached: int
    made: int
    skipped: int
    missing: int = 0  # not made because the run was dry

    @classmethod
    def of(cls, answered: Answered) -> "Summary":
        return cls(answered.found, answered.made, answered.left_out)


def parts_of(plans: Sequence[Plan], without: Collection[str] = ()) -> dict[str, Part]:
    """The parts of a selection of all plans, but for the keys `without`."""
    return {name: part for plan in plans for name, part in plan.parts(without).items()}


def cost_of(answered: Answered, manifest: Mapping) -> dict:
    """Rows, tokens, bytes and seconds of this run; bytes per token are of the rows' shards, text and ids included."""
    shards = {location.shard for plan in answered.plans for locations in plan.index.values() for location in locations}
    stored = sum(shard.stat().st_size for shard in shards)
    held = sum(read_metadata(shard)["tokens"] for shard in shards)
    return {
        "rows_found": answered.found, "rows_made": answered.made, "rows_left_out": answered.left_out,
        "tokens_selected": sum(part["tokens"] for part in manifest["parts"].values()),
        "tokens_made": answered.tokens,
        "seconds_asking": answered.seconds if answered.made else 0.0, "seconds": seconds_since_start(),
        "tokens_per_second": answered.tokens / answered.seconds if answered.made else None,
        "store_bytes": stored, "bytes_per_token": stored / held if held else None,
    }  # fmt: skip


def report(
    title: str,
    answered: Answered,
    parts: Mapping[str, Part],
    out: Path,
    cost: Mapping,
    more: Sequence[tuple[str, object]] = (),
) -> None:
    """Show it on the terminal. more: further lines (name, value) before the places."""
    rate = f", {cost['tokens_per_second']:,.0f} tokens/s without loading" if cost["tokens_per_second"] else ""
    size = f"{cost['store_bytes'] / 2**20:,.1f} MiB, {cost['bytes_per_token'] or 0:,.0f} bytes per token"
    folder = answered.plans[0].folder
    reasons = ", ".join(str(plan.folder.path / SKIPPED) for plan in answered.plans if plan.skipped)
    console.facts(
        title,
        [
            ("found in the store", f"{answered.found:,} rows"),
            ("made now", f"{answered.made:,} rows, {cost['tokens_made']:,} tokens in {cost['seconds']:.0f} s{rate}"),
            ("left out", f"{answered.left_out:,} rows" + (f" ({reasons})" if reasons else "")),
            ("selected", ", ".join(f"{part.rows:,} {name}" for name, part in parts.items())),
            *more,
            ("store", f"{folder.storage.name}/{folder.teacher} ({size})"),
            ("selection", out),
        ],
    )

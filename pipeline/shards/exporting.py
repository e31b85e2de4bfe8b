"""A plain folder for a hub or a colleague: Parquet files that `datasets.load_dataset` reads, and a card."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.outputs import entries, require_can_write
from pipeline.shards.catalogue import describe_request
from pipeline.shards.files import require_writable, write_atomically
from pipeline.shards.schema import SCHEMA, Row, footer, row_groups, write_row_groups
from pipeline.shards.selection import ROWS_PER_FILE, Counted, Selection
from pipeline.shards.storage import Storage
from pipeline.shards.store import RequestFolder

_MEANING = {
    "key": "content key of the row",
    "origin": "teacher (sampled), or reference, student, corrupted (scored by the teacher)",
    "prompt_id": "which prompt",
    "sample": "which of the prompt's rows of this origin",
    "prompt": "the prompt as the teacher read it, for people",
    "response": "the response, for people",
    "prompt_ids": "the prompt's token ids",
    "response_ids": "the response's token ids",
    "finish": "stop, or length where it was cut off; of scored rows by the stop tokens that the teacher had when the "
    "selection was made, or when they were scored where all rows of a request are exported",
    "logprobs": "log-probability of each response token: full vocabulary, temperature 1",
    "topk_ids": "the k likeliest tokens at each response position, row-major, in rank order",
    "topk_logprobs": "their log-probabilities",
    "lse": "log-sum-exp of the raw logits at each position: logit = log-probability + lse",
}


@dataclass(frozen=True)
class Split:
    """Rows that are exported together, with what their files say of themselves."""

    name: str
    rows: Iterable[Row]
    request: dict
    k: int


def splits_of_selection(selection: Selection) -> tuple[dict, list[Split]]:
    """The teacher, and a selection's parts."""
    k = selection.manifest["k"]
    parts = selection.parts.items()
    return selection.teacher, [Split(name, selection.rows(name), part["request"], k) for name, part in parts]


def splits_of_request(storage: Storage, name: str) -> tuple[dict, list[Split]]:
    """The teacher, and all rows of a request: one split for each k, since a file has one."""
    folder = RequestFolder(storage, *name.split("/"))
    index = folder.index(set_aside=False)
    headers = folder.headers()
    if folder.damaged:
        damaged = "; ".join(f"{shard}: {what}" for shard, what in sorted(folder.damaged.items()))
        raise UserError(
            f"{folder} has damaged shards, whose rows would be missing ({damaged}): run `xkd-pipeline cache verify`, "
            "and generate, which makes them again"
        )
    if not headers:
        raise UserError(f"{folder} holds no readable shards")
    widest: dict[int, list] = {}
    for locations in index.values():
        widest.setdefault(locations[-1].k, []).append(locations[-1])
    several = len(widest) > 1
    request = headers[0]["request"]
    splits = [
        Split(f"train_k{k}" if several else "train", folder.read_each(locations), request, k)
        for k, locations in sorted(widest.items())
    ]
    return headers[0]["teacher"], splits


def require_new(out: Path) -> None:
    """Raises UserError unless `out` is missing or empty, and can be written."""
    if entries(out, "folder", besides=()):
        raise UserError(f"{out} is not empty: export to a new folder")
    require_can_write(out)


def export(teacher: dict, splits: Iterable[Split], out: Path) -> dict[str, int]:
    """Write `out/data/<split>-00000.parquet` and `out/README.md`; returns the rows of each split.

    Raises UserError where `out` already holds something.
    """
    require_new(out)
    require_writable(out)
    staged = out / f".tmp-{uuid.uuid4().hex}"
    try:
        counts = _write(teacher, splits, staged)
        for path in sorted(staged.iterdir()):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return counts


def _write(teacher: dict, splits: Iterable[Split], out: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    tokens, requests, ks = 0, {}, set()
    for split in splits:
        counted = Counted()
        rows = counted.through(split.rows)
        footing = footer(teacher, split.request, split.k)
        for number, groups in enumerate(_files(rows)):
            write_atomically(
                out / "data",
                lambda temporary, groups=groups, footing=footing: write_row_groups(temporary, groups, footing),
                f"{split.name}-{number:05d}.parquet",
            )
        counts[split.name], requests[split.name] = counted.rows, split.request
        tokens += counted.tokens
        ks.add(split.k)
    card = _card(teacher, counts, tokens, requests, sorted(ks))
    write_atomically(out, lambda temporary: temporary.write_text(card, encoding="utf-8"), "README.md")
    return counts


def _files(rows: Iterator[Row]) -> Iterator[Iterator[list[Row]]]:
    """The row groups of each file; one file must be written before the next is asked for."""
    waiting = iter(rows)
    for first in waiting:
        yield row_groups(_some(first, waiting))


def _some(first: Row, more: Iterator[Row]) -> Iterator[Row]:
    yield first
    for _, row in zip(range(ROWS_PER_FILE - 1), more, strict=False):
        yield row


def _card(teacher: dict, counts: dict[str, int], tokens: int, requests: dict[str, dict], ks: list[int]) -> str:
    """The README: front matter that the hub and `datasets` read, then what the rows are."""
    files = [{"split": name, "path": f"data/{name}-*.parquet"} for name, rows in counts.items() if rows]
    configs = json.dumps([{"config_name": "default", "data_files": files}])
    name = teacher["name"] or "a local model"
    return "\n".join(
        [
            "---",
            f"license: {json.dumps(teacher['licence'] or 'unknown')}",
            'tags: ["knowledge-distillation", "teacher-logprobs"]',
            f"configs: {configs}",
            "---",
            "# What a teacher said",
            "",
            f"Responses with the top {', '.join(map(str, ks))} log-probabilities of {_plain(name)} at every position:",
            f"{sum(counts.values()):,} rows, {tokens:,} response tokens. Made with xkd-pipeline.",
            "",
            "| split | rows | request |",
            "|---|---|---|",
            *(f"| {split} | {rows:,} | {describe_request(requests[split])} |" for split, rows in counts.items()),
            "",
            "| teacher | |",
            "|---|---|",
            *(f"| {key} | {_plain(value)} |" for key, value in teacher.items() if value is not None),
            "",
            "| column | type | meaning |",
            "|---|---|---|",
            *(f"| `{field.name}` | {_type(field.type)} | {_MEANING[field.name]} |" for field in SCHEMA),
            "",
            "Each file's footer (key `xkd`) holds teacher, request, k and vocabulary size as JSON.",
            "The prompts come from their own source, whose licence applies to them.",
            "",
            "```python",
            "import datasets",
            "",
            'rows = datasets.load_dataset("FOLDER_OR_HUB_NAME")',
            "```",
            "",
        ]
    )


def _plain(value: object) -> str:
    """Text in a Markdown table that nothing in it can leave or mark up."""
    return "`" + str(value).replace("`", "'").replace("|", "/").replace("\n", " ") + "`"


def _type(type_) -> str:
    return f"list of {type_.value_type}" if hasattr(type_, "value_type") else str(type_)

"""Export to a plain folder for a hub or a colleague: Parquet files that `datasets.load_dataset` reads, and a card."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.files import require_writable, write_atomically
from pipeline.outputs import entries, require_can_write
from pipeline.store.requests import Location, RequestFolder
from pipeline.store.schema import SCHEMA, Row, footer, row_groups, write_row_groups
from pipeline.store.selection import Counted, Selection
from pipeline.store.selection_files import ROWS_PER_FILE
from pipeline.store.storage import Storage
from pipeline.upkeep.catalogue import describe_request

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
    "topk_ids": "the k tokens that were kept at each response position, row-major, the likeliest first",
    "topk_logprobs": "their log-probabilities: full vocabulary, temperature 1",
    "lse": "log-sum-exp of the raw logits at each position: logit = log-probability + lse",
    "tau": "threshold of the sampling at each position: tokens of a larger probability are all kept, and of the others "
    "one for every tau of probability; null where the likeliest tokens were kept",
    "tail": "probability of all tokens that were not kept, at each position; null where unknown or tau is given",
    "weights": "what each of `topk_ids` stands for, max(probability, tau): sums to 1 at each position, and is the "
    "teacher's distribution in the mean over draws",
}
_WEIGHTS = pa.field("weights", pa.list_(pa.float32()))
_SAMPLED = """
The kept tokens of rows with `weights` are not a top k. All tokens above the threshold `tau` are kept, and of the
others a few at random that stand for the rest, so that rare tokens have their share. Use `weights` as the target
distribution: they sum to 1 over the kept tokens, and in the mean over many positions they are the teacher's whole
distribution. Renormalising `topk_logprobs` over the kept tokens, as one does with a top k, is biased: the few rare
tokens that were drawn would count with their own small probabilities, and not for all those that they stand for.
The cross-entropy of a student at a position is `-(weights * log_softmax(student_logits)[topk_ids]).sum()`.
"""


@dataclass(frozen=True)
class Split:
    """Rows that are exported together, and what goes into their files' footers."""

    name: str
    rows: Iterable[Row]
    request: dict
    k: int
    support: str | None


@dataclass(frozen=True, slots=True)
class WeightedRow(Row):
    """A sampled row with what its kept tokens stand for."""

    weights: np.ndarray | None = None  # float32 [T, k]

    @classmethod
    def of(cls, row: Row) -> "WeightedRow":
        import torch

        from pipeline.objectives.supports import weighted

        logprobs, tau = (torch.from_numpy(values.astype(np.float64)) for values in (row.topk_logprobs, row.tau))
        values = {field.name: getattr(row, field.name) for field in fields(Row)}
        return cls(**values, weights=weighted(logprobs, tau)[1].numpy())


def splits_of_selection(selection: Selection) -> tuple[dict, list[Split]]:
    """The teacher, and a selection's parts."""
    said, parts = (selection.k, selection.support), selection.parts.items()
    return selection.teacher, [Split(name, selection.rows(name), part["request"], *said) for name, part in parts]


def splits_of_request(storage: Storage, name: str) -> tuple[dict, list[Split]]:
    """The teacher, and all rows of a request: one split per k and support, since a file has one of each."""
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
    alike: dict[tuple[str, int], list[Location]] = {}
    for locations in index.values():
        widest = {each.support: each for each in locations}  # the last of each support; the others add nothing
        for each in widest.values():
            if each.k or each is locations[-1]:
                alike.setdefault((each.support or "", each.k), []).append(each)
    several, supports = len(alike) > 1, {support for support, _ in alike}
    request = headers[0]["request"]
    splits = []
    for (support, k), locations in sorted(alike.items()):
        name = f"train_{support}_k{k}" if len(supports) > 1 else f"train_k{k}" if several else "train"
        splits.append(Split(name, folder.read_each(locations), request, k, support or None))
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
    splits = list(splits)
    more = [_WEIGHTS] if any(split.support == "sampled" for split in splits) else []
    counts: dict[str, int] = {}
    tokens = 0
    for split in splits:
        counted = Counted()
        rows = counted.through(split.rows)
        if split.support == "sampled":
            rows = map(WeightedRow.of, rows)
        footing = footer(teacher, split.request, split.k, split.support)
        for number, groups in enumerate(_files(rows)):
            write_atomically(
                out / "data",
                lambda path, groups=groups, footing=footing: write_row_groups(path, groups, footing, more),
                f"{split.name}-{number:05d}.parquet",
            )
        counts[split.name] = counted.rows
        tokens += counted.tokens
    card = _card(teacher, splits, counts, tokens, more)
    write_atomically(out, lambda temporary: temporary.write_text(card, encoding="utf-8"), "README.md")
    return counts


def _files(rows: Iterator[Row]) -> Iterator[Iterator[list[Row]]]:
    """The row groups of each file; write one file before asking for the next."""
    waiting = iter(rows)
    for first in waiting:
        yield row_groups(chain([first], islice(waiting, ROWS_PER_FILE - 1)))


def _card(teacher: dict, splits: list[Split], counts: dict[str, int], tokens: int, more: list[pa.Field]) -> str:
    """The README: front matter that the hub and `datasets` read, then what the rows are."""
    files = [{"split": name, "path": f"data/{name}-*.parquet"} for name, rows in counts.items() if rows]
    configs = json.dumps([{"config_name": "default", "data_files": files}])
    requests = [f"| {split.name} | {counts[split.name]:,} | {describe_request(split.request)} |" for split in splits]
    about = [f"| {key} | {_plain(value)} |" for key, value in teacher.items() if value is not None]
    columns = [f"| `{field.name}` | {_type(field.type)} | {_MEANING[field.name]} |" for field in [*SCHEMA, *more]]
    table, licence = "\n".join, teacher["licence"] or "unknown"
    return f"""---
license: {json.dumps(licence)}
tags: ["knowledge-distillation", "teacher-logprobs"]
configs: {configs}
---
# What a teacher said

{_kept(splits, _plain(teacher["name"] or "a local model"))}:
{sum(counts.values()):,} rows, {tokens:,} response tokens. Made with xkd-pipeline.

| split | rows | request |
|---|---|---|
{table(requests)}

| teacher | |
|---|---|
{table(about)}

| column | type | meaning |
|---|---|---|
{table(columns)}
{_SAMPLED if more else ""}
Each file's footer (key `xkd`) holds teacher, request, k, support and vocabulary size as JSON.
The prompts come from their own source, whose licence applies to them.

```python
import datasets

rows = datasets.load_dataset("FOLDER_OR_HUB_NAME")
```
"""


def _kept(splits: list[Split], teacher: str) -> str:
    """What the rows are, and which of the teacher's tokens they keep."""
    if all(split.support is None for split in splits):
        return "Responses, as text alone"
    kinds = {"sampled": "a sample of {} tokens that stands for all (see below)", "topk": "the {} likeliest tokens"}
    kept = dict.fromkeys(kinds[split.support].format(split.k) if split.k else "its own token" for split in splits)
    return f"Responses with log-probabilities of {teacher} at every position, of {' or '.join(kept)}"


def _plain(value: object) -> str:
    """A value as code in a Markdown table, with nothing in it that would end the cell or the code."""
    return "`" + str(value).replace("`", "'").replace("|", "/").replace("\n", " ") + "`"


def _type(type_) -> str:
    return f"list of {type_.value_type}" if hasattr(type_, "value_type") else str(type_)

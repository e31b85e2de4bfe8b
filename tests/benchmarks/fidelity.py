"""How much of a teacher its top k keeps, and at what size: bytes per token against what is lost, for k and value types.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.fidelity MODEL FILE:COLUMN ... --out OUT [--plot docs/fidelity.svg]

The engine draws responses with the top 128; transformers' forward pass in float32 is the truth, over the whole
vocabulary. Each k and type is written by `write_shard` and read back, with the tail as training reads it: what is
missing to 1, not below float32's precision, is one more outcome, and all are divided by their sum. Prints JSON; every
value is a mean over tokens, `largest_error` the maximum. OUT keeps responses and truth: a second run measures only.
"""

import base64
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.engines import Failure
from pipeline.models import load_lm
from pipeline.params import Generate, Params
from pipeline.store import schema
from pipeline.store.narrowing import narrowed
from pipeline.store.schema import Row, footer, from_table
from pipeline.teacher.orders import Order
from pipeline.teacher.teacher import Teacher
from tests.benchmarks.texts import arguments, start, to_draw

WIDEST, TYPES = 128, {"float16": pa.float16(), "float32": pa.float32()}
SIZES = (8, 10, 16, 20, 32, 40, 50, 64, 80, 128)


@dataclass(frozen=True)
class Truth:
    """The model's own distribution at N response tokens, in rows' order."""

    logprobs: np.ndarray  # float64 [N, WIDEST], at the ids that are stored
    negentropy: np.ndarray  # float64 [N], sum of p log p over the vocabulary
    vocabulary: int


@contextmanager
def values_of(name: str) -> Iterator[None]:
    """`write_shard` with top-k log-probabilities of another type; float32 is byte-split, as in the other columns."""
    place = schema.SCHEMA.get_field_index("topk_logprobs")
    changed = schema.SCHEMA.set(place, pa.field("topk_logprobs", pa.list_(TYPES[name])))
    split = (*schema._BYTE_SPLIT, "topk_logprobs") if name == "float32" else schema._BYTE_SPLIT
    with mock.patch.multiple(schema, SCHEMA=changed, _BYTE_SPLIT=split):
        yield


def write(path: Path, rows: Sequence[Row], name: str, metadata: dict) -> None:
    """A shard of `rows` with float16 or float32 values."""
    typed = [replace(row, topk_logprobs=row.topk_logprobs.astype(name)) for row in rows]
    with values_of(name):
        schema.write_shard(path, typed, metadata | {"k": rows[0].k})


def read(path: Path, name: str) -> list[Row]:
    with values_of(name):
        return from_table(pq.read_table(path))


def draw(teacher: Teacher, engine, order: Order) -> list[Row]:
    """The engine's answers as rows, in the order's own order, with float32 values."""
    asks = [item.ask() for item in order.items]
    answers = {answer.key: answer for answer in engine.sample(asks, order.request.sampling, teacher.k)}
    rows = []
    for each in order.items:
        answer = answers[each.key]
        if isinstance(answer, Failure):
            raise RuntimeError(f"no response to '{each.prompt.prompt[:60]}': {answer.reason}")
        rows.append(Row(
            key=each.key, origin=each.origin, prompt_id=each.prompt.id, sample=each.sample, prompt=each.text,
            response=teacher.tokenizer.decode(answer.response_ids, skip_special_tokens=True),
            prompt_ids=each.prompt_ids, response_ids=answer.response_ids, finish=answer.finish,
            logprobs=answer.logprobs, topk_ids=answer.topk_ids, topk_logprobs=answer.topk_logprobs, lse=answer.lse,
        ))  # fmt: skip
    return rows


@torch.inference_mode()
def true_distribution(model, rows: Sequence[Row]) -> Truth:
    """One forward pass of `model` (float32) per row; its softmax in float64."""
    logprobs, negentropy = [], []
    for row in rows:
        ids, steps = (
            torch.tensor(np.concatenate([row.prompt_ids, row.response_ids]))[None].long(),
            len(row.response_ids),
        )
        logits = model(input_ids=ids, logits_to_keep=steps + 1).logits[0, :-1]
        whole = torch.log_softmax(logits.double(), -1)
        logprobs.append(whole.gather(-1, torch.tensor(row.topk_ids).long()).numpy())
        negentropy.append((whole.exp() * whole).sum(-1).numpy())
    return Truth(np.concatenate(logprobs), np.concatenate(negentropy), logits.shape[-1])


def loss(truth: Truth, stored: np.ndarray) -> dict[str, float]:
    """What [N, k] stored log-probabilities lose; KL in nats per token.

    rounding: KL(true || stored) over the k + 1 outcomes. truncation: KL(true || q) over the vocabulary, where q keeps
    the stored top k and spreads the rest evenly over the other tokens. tail: the true mass outside the top k.
    """
    k = stored.shape[1]
    log_p = truth.logprobs[:, :k]
    p = np.exp(log_p)
    tail = np.maximum(1 - p.sum(-1), 0)
    q = np.exp(stored.astype(np.float64))
    rest = np.maximum(1 - q.sum(-1), np.finfo(np.float32).eps)
    total = q.sum(-1) + rest
    log_q, log_rest = stored - np.log(total)[:, None], np.log(rest / total)
    log_tail = np.log(np.maximum(tail, np.finfo(np.float64).tiny))  # 0 log 0 = 0
    rounding = (p * (log_p - log_q)).sum(-1) + tail * (log_tail - log_rest)
    others = truth.vocabulary - k
    spread = log_rest - np.log(others) if others else log_rest
    truncation = truth.negentropy - (p * log_q).sum(-1) - tail * spread
    return {
        "rounding_kl": float(rounding.mean()),
        "truncation_kl": float(truncation.mean()),
        "tail_mass": float(tail.mean()),
        "largest_error": float(np.abs(q - p).max()),
    }


def size(path: Path, tokens: int) -> dict[str, float]:
    """Bytes per token of the file, and of its top-k columns alone."""
    groups = (pq.ParquetFile(path).metadata.row_group(i) for i in range(pq.ParquetFile(path).num_row_groups))
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    topk = sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema.startswith("topk_"))
    return {"bytes": path.stat().st_size / tokens, "topk_bytes": topk / tokens}


def measure(folder: Path, rows: Sequence[Row], truth: Truth, metadata: dict, sizes: Sequence[int]) -> list[dict]:
    """One point for each type and k, with whether it is on the frontier: no point is both smaller and more faithful."""
    points = []
    for name in TYPES:
        for k in sizes:
            path = folder / f"{name}-{k}.parquet"
            write(path, [narrowed(row, k, "topk") for row in rows], name, metadata)
            stored = np.concatenate([row.topk_logprobs for row in read(path, name)])
            points.append({"type": name, "k": k, **size(path, len(stored)), **loss(truth, stored)})
    for point in points:
        point["on_frontier"] = not any(
            other["bytes"] < point["bytes"] and other["truncation_kl"] < point["truncation_kl"] for other in points
        )
    return points


def plot(points: Sequence[dict], k: int) -> bytes:
    """SVG of bytes against what truncation loses; the default is float16 with `generate.k`."""
    from stages.report import figures

    def curve(name: str, chosen: Sequence[dict]) -> dict:
        return {name: ([point["bytes"] for point in chosen], [point["truncation_kl"] for point in chosen])}

    curves = {}
    for name in TYPES:
        curves |= curve(name, [point for point in points if point["type"] == name])
    curves |= curve(f"default: float16, k = {k}", [p for p in points if (p["type"], p["k"]) == ("float16", k)])
    uri = figures.lines(curves, "bytes per token, whole shard", "KL(true || kept), nats per token")
    return base64.b64decode(uri.partition(",")[2])


def read_truth(out: Path) -> Truth:
    stored = np.load(out / "truth.npz")
    return Truth(stored["logprobs"], stored["negentropy"], int(stored["vocabulary"]))


def collect(out: Path, options) -> tuple[list[Row], Truth, dict]:
    """The responses, their truth and the shards' footer, from OUT where they are there."""
    answers, truth_file = out / "answers.parquet", out / "truth.npz"
    if not truth_file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        teacher = Teacher.of(Generate(teacher=options.model, engine=options.engine, k=WIDEST, dtype="float32"))
        order = to_draw(options, teacher)
        engine = start(teacher, order)
        rows, request = draw(teacher, engine, order), order.request
        write(
            answers, rows, "float32", footer(teacher.description, request.describe(), WIDEST, engine=engine.description)
        )
        truth = true_distribution(load_lm(teacher.source, "float32"), rows)
        np.savez(truth_file, **vars(truth))
    return read(answers, "float32"), read_truth(out), schema.read_metadata(answers)


def main() -> None:
    parser = arguments(__doc__.split("\n")[0], prompts=64, tokens=128)
    parser.add_argument("--out", type=Path, required=True, help="folder for responses, truth and shards")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows, truth, metadata = collect(options.out, options)
    points = measure(options.out, rows, truth, metadata, SIZES)
    default = Params().generate.k
    if options.plot:
        options.plot.write_bytes(plot(points, default))
    setting = {
        "rows": len(rows), "tokens": len(truth.negentropy), "vocabulary": truth.vocabulary,
        "entropy": float(-truth.negentropy.mean()), "default_k": default, **metadata["engine"],
    }  # fmt: skip
    print(json.dumps({"setting": setting, "points": points}, indent=2))


if __name__ == "__main__":
    sys.exit(main())

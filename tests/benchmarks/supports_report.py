"""What `tests.benchmarks.supports` has measured so far: Markdown tables, whether the bars are met, and the figure."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.models import load_tokenizer
from pipeline.store.schema import Row, footer, write_shard
from tests.benchmarks.supports import PARTS, REWARDS, SUPPORTS, Cell, Taught, kept_by, read_cells, rows_of

NAMES = {"topk": "top k, `bucket`", "drawn": "draws with replacement (RS-KD)", "sampled": "**sampled**"}
CURVES = {
    "topk": ("#3366aa", "top k, bucket"),
    "drawn": ("#dd7733", "draws with replacement, counts alone"),
    "sampled": ("#338855", "sampled"),
}
# objective fkl of `text`: (support, k), at most so many times the support beside it
BARS = [
    (("sampled", 32), 1.3, ("dense", 0)),
    (("sampled", 16), 1.6, ("dense", 0)),
    (("sampled", 16), 1.0, ("topk", 128)),
]
ROWS = 400  # of a shard whose bytes are counted


def bytes_per_token(folder: Path, support: str, k: int, objective: str = "fkl") -> float:
    """Bytes per response token of a shard of these rows, with text and prompts. `dense`: without top k, and float16.

    Draws with replacement: the different ids of a position and their counts, for `fkl`; else their probabilities too.
    """
    taught, tokenizer = Taught(folder / "train"), load_tokenizer(folder / "student")
    kept = None if support == "dense" else kept_by(support, k, 0, taught, folder)
    rows = rows_of(taught, kept, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))[:ROWS]
    tokens = sum(len(row.response_ids) for row in rows)
    more = 2 * taught.logprobs.shape[1] if support == "dense" else 0
    if support == "drawn":
        rows = [_different(row, objective == "fkl") for row in rows]
        more = 1 if objective == "fkl" else 2  # how many ids a position has; how often each was drawn, mostly once
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.parquet"
        write_shard(path, rows, footer({"vocab_size": taught.logprobs.shape[1]}, {}, k))
        return path.stat().st_size / tokens + more


def _different(row: Row, counted: bool) -> Row:
    """A row of draws as it would be stored: the different ids of a position, one after the other, with one value."""
    values = []
    for ids, logprobs in zip(row.topk_ids, row.topk_logprobs, strict=True):
        kept, first, counts = np.unique(ids, return_index=True, return_counts=True)
        values.append((kept, np.log(counts / row.k) if counted else logprobs[first]))
    ids, logprobs = (np.concatenate(each)[:, None] for each in zip(*values, strict=True))
    return replace(row, topk_ids=ids, topk_logprobs=logprobs)


def _values(cells: Mapping[Cell, dict], measure: str, part: str, objective: str, support, reward="none") -> list[float]:
    """Of every seed that is finished, in order."""
    chosen = [Cell(part, objective, *support, seed, reward) for seed in range(PARTS[part].seeds)]
    return [cells[cell][measure] for cell in chosen if cell in cells]


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _table(cells, sizes: Mapping, part: str, objective: str) -> list[str]:
    lines = [
        "| what the loss sees | slots | bytes per token | KL(T‖S), each seed | of dense | KL(S‖T) | top 32 + rest |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = _values(cells, "kl", part, objective, ("dense", 0))
    for support in sorted(SUPPORTS[part]):
        kl, reverse, bound = (_values(cells, name, part, objective, support) for name in ("kl", "reverse_kl", "bound"))
        if not kl:
            continue
        seeds = min(len(kl), len(dense))
        share = f"{np.mean(kl[:seeds]) / np.mean(dense[:seeds]):.2f}" if seeds else ""
        name, size = NAMES.get(support[0], "the whole distribution"), sizes[part, objective][support]
        slots = support[1] or "all"
        values = f"{_shown(kl)} | {share} | {np.mean(reverse):.4f} | {np.mean(bound):.4f}"
        lines.append(f"| {name} | {slots} | {size:,.0f} | {values} |")
    return lines if len(lines) > 2 else []


def _rewards(cells) -> list[str]:
    lines = ["| reward of the X term | KL(T‖S), each seed | KL(S‖T) |", "|---|---|---|"]
    for reward in ("none", *REWARDS):
        kl, reverse = (_values(cells, m, "text", "fkl", ("sampled", 16), reward) for m in ("kl", "reverse_kl"))
        if kl:
            lines.append(f"| {reward} | {_shown(kl)} | {_shown(reverse)} |")
    return lines if len(lines) > 3 else []


def _bars(cells) -> list[str]:
    lines = []
    for support, most, other in BARS:
        mine, others = (_values(cells, "kl", "text", "fkl", each) for each in (support, other))
        seeds = min(len(mine), len(others))
        if not seeds:
            continue
        ratio = np.mean(mine[:seeds]) / np.mean(others[:seeds])
        names = [" ".join(str(word) for word in each if word) for each in (support, other)]
        met = "met" if ratio <= most else "missed"
        lines.append(f"- {names[0]} at most {most:g} times {names[1]}: {ratio:.3f} over {seeds} seeds, **{met}**")
    return lines


def plot(cells, sizes: Mapping, path: Path) -> None:
    """KL(T‖S) of `fkl` against bytes per token, one panel per part."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    parts = [part for part in PARTS if len(sizes.get((part, "fkl"), ())) > 1]
    figure = Figure(figsize=(4.4 * max(len(parts), 1), 3.6), layout="constrained")
    for axes, part in zip(figure.subplots(1, max(len(parts), 1), squeeze=False)[0], parts, strict=False):
        size = sizes[part, "fkl"]
        for kind, (colour, label) in CURVES.items():
            points = [
                (size[s], np.mean(_values(cells, "kl", part, "fkl", s)), s[1]) for s in sorted(size) if s[0] == kind
            ]
            if not points:
                continue
            x, y, slots = zip(*points, strict=True)
            axes.plot(x, y, "o-", color=colour, label=label, markersize=4)
            for place in zip(x, y, slots, strict=True):
                axes.annotate(str(place[2]), place[:2], xytext=(4, 4), textcoords="offset points", fontsize=8)
        if dense := _values(cells, "kl", part, "fkl", ("dense", 0)):
            label = f"whole distribution ({size['dense', 0]:,.0f} bytes)"
            axes.axhline(np.mean(dense), color="#777777", linestyle="--", label=label)
        axes.set(xscale="log", yscale="log", xlabel="bytes per token", ylabel="KL(T‖S), nats per token", title=part)
        for axis, form in ((axes.xaxis, "{x:.0f}"), (axes.yaxis, "{x:g}")):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if form == "{x:.0f}" else (1, 1.5, 2, 3, 5, 7)))
            axis.set_major_formatter(StrMethodFormatter(form))
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(framealpha=1, edgecolor="none", fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "xkd", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def report(out: Path, picture: Path | None = None) -> str:
    """All tables as Markdown; `picture`: where the figure goes."""
    cells, lines, sizes = read_cells(out), [], {}
    for part in PARTS:
        if not (out / part / "setting.json").is_file():
            continue
        for objective in ("fkl", "jsd"):
            finished = {(each.support, each.k) for each in cells if (each.part, each.objective) == (part, objective)}
            finished.discard(("start", 0))
            sizes[part, objective] = {each: bytes_per_token(out / part, *each, objective) for each in finished}
        setting = json.loads((out / part / "setting.json").read_text())
        lines += [f"## {part}", "", f"`{json.dumps(setting)}`", ""]
        start = cells.get(Cell(part, "fkl", "start"))
        lines += [f"KL(T‖S) before: {start['kl']:.4f}", ""] if start else []
        for objective in ("fkl", "jsd"):
            table = _table(cells, sizes, part, objective)
            lines += [f"### {part}, `{objective}`", "", *table, ""] if table else []
    rewards, bars = _rewards(cells), _bars(cells)
    lines += ["### The X term on sampled rows of 16", "", *rewards, ""] if rewards else []
    lines += ["### Bars", "", *bars] if bars else []
    if picture:
        plot(cells, sizes, picture)
    seconds = sum(row["seconds"] for row in cells.values())
    return "\n".join([*lines, "", json.dumps({"cells": len(cells), "seconds": round(seconds)})])

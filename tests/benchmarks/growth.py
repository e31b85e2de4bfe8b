"""Ten times the prompts: what time, bytes and memory do. Whole processes of `xkd-pipeline generate` into empty stores.

    python -m tests.benchmarks.growth MODEL OUT [--plot FILE.svg] [--prompts N ...]

MODEL is a folder with a word-level or any other tokenizer that reads the words w0 to w39 (any causal model will do).
Prints as JSON, for each number of prompts, the seconds of asking and in all, bytes in the store and the highest memory
of the process, and the ratios of the largest to the smallest number. Engine: hf, one thread.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

WORDS, LENGTH = 40, 4


def prompts_file(path: Path, count: int) -> Path:
    """Distinct prompts of four words."""
    lines = (" ".join(f"w{(number // WORDS**power) % WORDS}" for power in range(LENGTH)) for number in range(count))
    path.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def generate(model: str, out: Path, count: int) -> dict:
    """One process; what it measured of itself, and the memory that the system saw."""
    folder = out / f"{count}"
    folder.mkdir(parents=True)
    command = [
        sys.executable, "-m", "pipeline.cli", "generate", "--params", os.devnull, "--teacher", model, "--engine", "hf",
        "--prompts", str(prompts_file(folder / "prompts.jsonl", count)), "--template", "{prompt}", "--max-tokens", "32",
        "--samples", "2", "--out", str(folder / "selection"), "--store", str(folder / "store"),
        "--results", str(folder / "results.json"),
    ]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"generate ended with status {status}: run it by hand to see why: {' '.join(command)}")
    cost = json.loads((folder / "results.json").read_text())["cost"]
    shards = list((folder / "store").glob("*/*/part-*.parquet"))
    unit = 1024 if sys.platform == "linux" else 1
    return {
        "prompts": count, "rows": cost["rows_made"], "tokens": cost["tokens_made"],
        "seconds_asking": cost["seconds_asking"], "seconds": cost["seconds"],
        "bytes": sum(shard.stat().st_size for shard in shards), "peak_memory": usage.ru_maxrss * unit,
    }  # fmt: skip


def plot(points: list[dict], path: Path) -> None:
    """Time, bytes and memory against prompts, each as a multiple of the smallest run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    named = {"seconds_asking": "seconds of asking", "bytes": "bytes in the store", "peak_memory": "highest memory"}
    for key, name in named.items():
        axes.plot([p["prompts"] for p in points], [p[key] / points[0][key] for p in points], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="prompts", ylabel=f"multiple of {points[0]['prompts']:,} prompts")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 3000, 10000])
    options = parser.parse_args()
    points = [generate(options.model, options.out, count) for count in options.prompts]
    if options.plot:
        plot(points, options.plot)
    first, last = points[0], points[-1]
    measured = ("rows", "tokens", "seconds_asking", "seconds", "bytes", "peak_memory")
    print(json.dumps({"points": points, "ratios": {name: last[name] / first[name] for name in measured}}, indent=2))


if __name__ == "__main__":
    main()

"""Does a sampled support lose anything on a teacher that is nearly certain? The arithmetic task, three seeds.

    python -m tests.benchmarks.peaked OUT [SEED ...]     # after `dvc repro` of the default task, in the same folder

The default teacher's samples are kept as a sampled support of 16 tokens per position and as a top 16 and a top 32; from
each a student is distilled (`fkl` without the X term) with seeds 0, 1 and 2, and all are evaluated beside each other.
Prints, as JSON, the accuracy and the exact KL of each; the seeds' means; and each student's accuracy less that of the
sampled support with the same seed. What is in OUT already is not trained again.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

KEPT = {"sampled 16": ("sampled", 16), "top 16": ("topk", 16), "top 32": ("topk", 32)}


def run(stage: str, *options: str | Path) -> None:
    """One command of the pipeline."""
    subprocess.run([sys.executable, "-m", "pipeline.cli", stage, *map(str, options)], check=True, stdout=sys.stderr)


def main(out: Path, seeds: Sequence[int] = (0, 1, 2)) -> dict:
    models = {}
    for name, (support, k) in KEPT.items():
        cache = out / f"{support}-{k}"
        run("generate", "--set", f"generate.support={support}", "-k", k, "--out", cache / "cache",
            "--results", cache / "generate.json")  # fmt: skip
        for seed in seeds:
            student = models[f"{name}, seed {seed}"] = cache / f"student-{seed}"
            if not student.exists():
                places = {
                    "--selection": "cache",
                    "--out": student.name,
                    "--metrics": f"metrics-{seed}",
                    "--runs": "runs",
                }
                folders = [part for option, place in places.items() for part in (option, cache / place)]
                run("distill", "--set", f"distill.seed={seed}", "--set", "distill.reward=none", *folders)
    named = [option for name, path in models.items() for option in ("--model", f"{name}={path}")]
    run("evaluate", *named, "--out", out / "evaluation")
    metrics = json.loads((out / "evaluation" / "results.json").read_text())["metrics"]
    scores = {
        name: {"accuracy": metrics[name]["greedy"]["accuracy"]["value"], "kl": metrics[name]["heldout"]["kl"]["value"]}
        for name in models
    }
    return {
        "students": scores,
        "means": {
            name: {of: mean(scores[f"{name}, seed {seed}"][of] for seed in seeds) for of in ("accuracy", "kl")}
            for name in KEPT
        },
        "less_sampled": {
            name: [
                scores[f"{name}, seed {seed}"]["accuracy"] - scores[f"sampled 16, seed {seed}"]["accuracy"]
                for seed in seeds
            ]
            for name in KEPT
        },
    }


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(json.dumps(main(Path(sys.argv[1]), *([list(map(int, sys.argv[2:]))] if sys.argv[2:] else [])), indent=2))

"""Does the reward help? Every objective plain and with every reward, on one cached teacher, evaluated side by side.

Run after `dvc repro`, in the project's root: `python -m tests.benchmarks.rewards OUT`. Takes about half a minute a
student on two cores; students that OUT already holds are not trained again.
"""

import json
import subprocess
import sys
from pathlib import Path

OBJECTIVES = ("fkl", "rkl", "jsd")
REWARDS = {"none": 0.01, "frozen": 0.01, "scratch": 0.03, "zero": 0.01}  # with their lam


def cli(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pipeline.cli", *map(str, arguments)], check=True)


def main(out: Path) -> None:
    models = {}
    for objective in OBJECTIVES:
        for reward, lam in REWARDS.items():
            name = f"{objective}-{reward}"
            models[name] = out / name
            if not models[name].exists():
                settings = (f"distill.objective={objective}", f"distill.reward={reward}", f"distill.lam={lam}")
                chosen = [option for setting in settings for option in ("--set", setting)]
                cli(
                    "distill",
                    *chosen,
                    "--out",
                    models[name],
                    "--metrics",
                    out / f"{name}-metrics",
                    "--runs",
                    out / "runs",
                )
    cli("evaluate", *(o for name in models for o in ("--model", f"{name}={models[name]}")), "--out", out / "evaluation")
    metrics = json.loads((out / "evaluation" / "results.json").read_text())["metrics"]
    print("| objective | reward | greedy | sampled | KL(T‖S) | distinct-2 |\n|---|---|---|---|---|---|")
    for name, modes in metrics.items():
        objective, reward = name.split("-")
        (metric,) = list(modes["greedy"])[:1]
        cells = [
            f"{modes[m][metric]['value']:.1f} [{modes[m][metric]['low']:.1f}, {modes[m][metric]['high']:.1f}]"
            for m in ("greedy", "sampled")
        ]
        kl, distinct = modes["heldout"]["kl_to_teacher"]["value"], modes["diversity"]["distinct_2"]
        print(f"| {objective} | {reward} | {cells[0]} | {cells[1]} | {kl:.4f} | {distinct:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.benchmarks.rewards OUT")
    main(Path(sys.argv[1]))

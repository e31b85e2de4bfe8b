"""Does every objective learn, and does the reward help? Students on one cached teacher, evaluated side by side.

Run after `dvc repro`, in the project's root: `python -m tests.benchmarks.rewards OUT`. Every objective plain and with
the frozen reward, and the main ones with every reward and control; about twenty seconds per student on two cores.
Students that OUT already holds are not trained again.
"""

import json
import subprocess
import sys
from pathlib import Path

LAM = {"none": 0.01, "frozen": 0.01, "joint": 0.03, "scratch": 0.03, "zero": 0.01, "shuffled": 0.01}
OBJECTIVES = {
    **dict.fromkeys(("sft", "seqkd", "jsd", "skew_fkl", "skew_rkl", "tvd"), ("none", "frozen")),
    **dict.fromkeys(("fkl", "rkl"), tuple(LAM)),
}


def cli(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pipeline.cli", *map(str, arguments)], check=True, stdout=sys.stderr)


def main(out: Path) -> None:
    models = {"undistilled": Path("data/models/student")}
    for objective, reward in ((objective, reward) for objective, rewards in OBJECTIVES.items() for reward in rewards):
        name = f"{objective}-{reward}"
        models[name] = out / name
        if not models[name].exists():
            settings = (f"distill.objective={objective}", f"distill.reward={reward}", f"distill.lam={LAM[reward]}")
            chosen = [option for setting in settings for option in ("--set", setting)]
            folders = ("--out", models[name], "--metrics", out / f"{name}-metrics", "--runs", out / "runs")
            cli("distill", *chosen, *folders)
    cli("evaluate", *(o for name in models for o in ("--model", f"{name}={models[name]}")), "--out", out / "evaluation")
    metrics = json.loads((out / "evaluation" / "results.json").read_text())["metrics"]
    print("| objective | reward | greedy | sampled | KL(T‖S) | distinct-2 | λ_eff |\n|---|---|---|---|---|---|---|")
    for name, modes in metrics.items():
        objective, _, reward = name.partition("-")
        metric = next(iter(modes["greedy"]))
        cells = [
            f"{modes[m][metric]['value']:.1f} [{modes[m][metric]['low']:.1f}, {modes[m][metric]['high']:.1f}]"
            for m in ("greedy", "sampled")
        ]
        kl, distinct = modes["heldout"]["kl"]["value"], modes["diversity"]["distinct_2"]
        training = out / f"{name}-metrics" / "results.json"
        strength = json.loads(training.read_text()).get("heldout_lam_eff", 0.0) if training.is_file() else 0.0
        print(f"| {objective} | {reward} | {cells[0]} | {cells[1]} | {kl:.4f} | {distinct:.2f} | {strength:.3f} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.benchmarks.rewards OUT")
    main(Path(sys.argv[1]))

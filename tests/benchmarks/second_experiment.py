"""How soon a second experiment trains on a cache that is there: another objective, another student.

    python -m tests.benchmarks.second_experiment OUT STUDENT     # after `dvc repro`, in the same folder

STUDENT is the folder of another starting point. Runs `xkd-pipeline distill` for one step each and prints, as JSON, the
seconds from the start of the command to the first optimiser step, and their share of the seconds that generating the
cache took, where the last run of `generate` in this folder made it.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ONE_STEP = ("distill.optimisation.steps=1", "distill.evaluate_every=1", "distill.save_every=1")


def first_step(out: Path, name: str, *options: str) -> float:
    """Seconds from starting the command, this Python's start included."""
    settings = [option for setting in ONE_STEP for option in ("--set", setting)]
    folders = ["--out", str(out / name), "--metrics", str(out / f"{name}-metrics"), "--runs", str(out / "runs")]
    command = [sys.executable, "-m", "pipeline.cli", "distill", *settings, *folders, *options]
    started = time.time()
    subprocess.run(command, check=True, stdout=sys.stderr)
    cost = json.loads((out / f"{name}-metrics" / "results.json").read_text())["cost"]
    assert cost["seconds_to_first_step"] < time.time() - started
    return cost["seconds_to_first_step"]


def main(out: Path, student: str) -> dict:
    generation = json.loads(Path("data/generate/results.json").read_text())["cost"]
    seconds = {
        "another objective": first_step(out, "objective", "--set", "distill.objective=rkl"),
        "another student": first_step(
            out, "student", "--student", student, "--set", "distill.reward=none"
        ),
    }  # fmt: skip
    made = generation["seconds"] if generation["rows_made"] else None
    return {
        name: {"seconds_to_first_step": value, "share_of_generation": value / made if made else None}
        for name, value in seconds.items()
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2]), indent=2))

"""What a second experiment's evaluation takes, with a teacher that has answered before.

    python -m tests.benchmarks.second_evaluation OUT [REPETITIONS]     # after `dvc repro`, in the same folder

Times `xkd-pipeline evaluate` of teacher and student in turns: the teacher `asked` again for all its answers (as before
they were kept), run forward over held-out rows alone (`live`), and not loaded at all (`cache`). Prints, as JSON, the
median seconds of each and their ratio to the first.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

MODELS = ("--model", "teacher=data/models/teacher", "--model", "distilled=data/student")
KINDS = {
    # a selection that is not the default one has no answers beside it
    "asked": ("--selection", str(Path("data/teacher").absolute()), "--set", "evaluate.kl=cache"),
    "live": ("--set", "evaluate.kl=live"),
    "cache": ("--set", "evaluate.kl=cache"),
}


def seconds(out: Path, kind: str) -> float:
    """Of one command, from its start to its end."""
    command = [sys.executable, "-m", "pipeline.cli", "evaluate", *MODELS, *KINDS[kind], "--out", str(out / kind)]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def main(out: Path, repetitions: int = 5) -> dict:
    taken = [{kind: seconds(out, kind) for kind in KINDS} for _ in range(repetitions)]
    medians = {kind: median(each[kind] for each in taken) for kind in KINDS}
    return {kind: {"seconds": value, "of_asked": value / medians["asked"]} for kind, value in medians.items()}


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:])), indent=2))

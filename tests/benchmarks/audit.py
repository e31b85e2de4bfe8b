"""Is the reward a judge? Its audit on the three built-in tasks, with the action head, the soft residual, and negatives.

`python -m tests.benchmarks.audit OUT`: for each task the stages up to `reward` run in OUT/TASK with the default
parameters, but those that README names for the task; then a table of every judge's AUC within prompts. About four
minutes per task on two cores; a task whose audit OUT already holds is not run again.
"""

import json
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl

from pipeline.prompts import read_prompts
from pipeline.tasks import get_task

ROOT = Path(__file__).parents[2]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
TASKS = {
    "arithmetic": (),
    "translation": ("teach.teacher.optimisation.steps=300",),
    "summarisation": ("teach.student.pairs=150", "teach.teacher.optimisation.steps=400"),
}
STAGES = (("prepare",), ("teach", "teacher"), ("teach", "student"), ("generate",), ("score",), ("reward",))


def run(task: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [o for setting in (f"prepare.task={task}", *TASKS[task]) for o in ("--set", setting)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XKD_STORE": str(folder.resolve() / "store")}
    command = [sys.executable, "-m", "pipeline.cli"]
    with (folder / "params.yaml").open("w") as file:
        subprocess.run([*command, "params", "--params", os.devnull, *chosen], env=environment, check=True, stdout=file)
    for stage in STAGES:
        subprocess.run([*command, *stage], cwd=folder, env=environment, check=True, stdout=sys.stderr)


def lucky(data: Path) -> str:
    """How many of the arithmetic samples that count as right have a false step."""
    prompts = read_prompts(data / "prompts" / "prompts.parquet", ("validation",))
    references, task = {prompt.id: prompt.references for prompt in prompts}, get_task("arithmetic")
    rows = pl.read_parquet(data / "scored" / "samples-*.parquet").to_dicts()
    right = [row["response"] for row in rows if task.accepts(row["response"], references[row["prompt_id"]])]
    steps = [re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", response) for response in right]
    false = [any(OPERATIONS[sign](int(a), int(b)) != int(c) for a, sign, b, c in equations) for equations in steps]
    return f"{len(right)} of {len(rows):,} arithmetic samples are right, {sum(false)} of them with a false step"


def main(out: Path) -> None:
    columns = ("task", "ranking", "prompts", "judge", "mean over tokens", "sum over tokens", "mean, pooled")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for task in TASKS:
        file = out / task / "data" / "audit" / "results.json"
        if not file.is_file():
            run(task, out / task)
        results = json.loads(file.read_text())
        for ranking, judges in results["audit"].items():
            for judge, aucs in judges.items():
                cells = [
                    f"{aucs[how]['auc']:.3f} [{aucs[how]['low']:.3f}, {aucs[how]['high']:.3f}]"
                    for how in ("within_mean", "within_sum", "pooled_mean")
                ]
                print(f"| {task} | {ranking} | {results['audited_prompts'][ranking]} | {judge} | {' | '.join(cells)} |")
        soft, negatives = results["soft"], results["negatives"]
        print(
            f"| {task} | | | soft fit | -log q {soft['heldout_nll']:.3f}, {soft['inside_1_sigma']:.0%} and "
            f"{soft['inside_2_sigma']:.0%} within 1 and 2 sigma, {soft['sigma_at_floor']:.0%} at the floor | "
            f"negatives {'used' if negatives['used'] else 'not used'}: {negatives.get('choice_auc')} | |"
        )
    print("\n" + lucky(out / "arithmetic" / "data"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.benchmarks.audit OUT")
    main(Path(sys.argv[1]))

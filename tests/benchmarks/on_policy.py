"""What learning from the student's own samples brings, and what it takes: second phases from one distilled student.

    python -m tests.benchmarks.on_policy OUT                                  # every arm of arithmetic, three seeds
    python -m tests.benchmarks.on_policy OUT --arms r1-jsd r4-jsd --seeds 1   # a part of it
    python -m tests.benchmarks.on_policy OUT --temperatures 0.8 0.9 1.1       # also compare at equal distinct-2
    python -m tests.benchmarks.on_policy OUT --setting length4 --arms fresh1-jsd r4-jsd    # other settings: SETTINGS
    python -m tests.benchmarks.on_policy OUT --report --figure sweep.svg      # only tables and figure of what is there

A setting is a task, or arithmetic with longer problems or another size of the student. It is set up once in
OUT/SETTING, an experiment's folder like any other, with as many fresh prompts as training ones.
For each seed a student is distilled with `fkl`; every arm starts from it, takes as many steps again with one
learning-rate schedule, and is evaluated. Each training has a store of its own, so that it takes the time of one that
finds nothing. What OUT holds is not made again. All numbers go to OUT/SETTING.json, tables as Markdown to stdout. One
process per setting; a training takes half a minute on one core, and several where the student answers at every step.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.layout import RESULTS, Layout
from pipeline.params import Prepare
from pipeline.params.file import load_params, to_yaml
from pipeline.prompts import SPLITS
from tests.benchmarks import on_policy_report as reports
from tests.benchmarks.on_policy_report import AT, BASE, COST_UNIT, DIVERGENCES, REFRESHES, START, TEACHER

HELD_OUT = ("validation", "test")
SECOND_PHASE = 100  # added to a seed after the first phase, so that no batch comes in the same order again
SLOWER = "optimisation.learning_rate=3e-4"  # for opd, whose students are lost at the 3e-3 of the others
SETUP = (("prepare",), ("teach", "teacher"), ("teach", "student"), ("generate",), ("score",))


@dataclass(frozen=True)
class Setting:
    """What the arms are compared in."""

    task: str
    times: int = 1  # so many times the steps in a problem of arithmetic
    student: tuple[int, int, int] | None = None  # its width, layers and intermediate size; None: the default
    rate: float | None = None  # of learning in every arm; None: the default

    @property
    def overrides(self) -> list[str]:
        """Of all parameters, but for the data set of longer problems."""
        sizes = zip(("width", "layers", "intermediate"), self.student or (), strict=False)
        model = [f"teach.student.model.{name}={size}" for name, size in sizes]
        longest = [f"max_tokens={24 + 24 * self.times}"] if self.times > 1 else []
        rate = [f"distill.optimisation.learning_rate={self.rate:g}"] if self.rate else []
        return [f"prepare.task={self.task}", *longest, *model, *rate]


SETTINGS = {
    **{task: Setting(task) for task in ("arithmetic", "translation", "summarisation")},
    # At the default rate, 3e-3, the start of the second phase breaks a student of answers four times as long.
    **{f"length{times}": Setting("arithmetic", times, rate=1e-3) for times in (2, 4)},
    # The teacher has so many times the parameters of the student; in `arithmetic` it has 5.7 times as many.
    "gap2": Setting("arithmetic", student=(68, 3, 176)),
    "gap8": Setting("arithmetic", student=(40, 2, 104)),
    "gap32": Setting("arithmetic", student=(20, 2, 48)),
}


@dataclass(frozen=True)
class Arm:
    """A second phase."""

    overrides: Sequence[str]  # of distill
    fresh: int = 0  # samples of the teacher per fresh prompt to learn from, instead of its cache; 0: the cache


def _own(*overrides: str) -> Arm:
    """On the student's samples of the fresh prompts."""
    return Arm((*overrides, "on_policy.split=student"))


def _arms() -> dict[str, Arm]:
    arms = {COST_UNIT: Arm(("objective=sft",))}
    for name in DIVERGENCES:
        objective = f"objective={name}"
        arms |= {f"same-{name}": Arm((objective,))}
        arms |= {f"fresh{times}-{name}": Arm((objective,), times) for times in (1, 4)}
        arms |= {f"r{count}-{name}": _own(objective, f"on_policy.refreshes={count}") for count in REFRESHES[1:]}
    four, dense = "on_policy.refreshes=4", "on_policy.scores=dense"
    return arms | {
        "gkd": _own("objective=gkd"),
        "opd": _own("objective=opd", four, SLOWER),
        "same-jsd-slow": Arm(("objective=jsd", SLOWER)),
        "r4-jsd-slow": _own("objective=jsd", four, SLOWER),
        "opd-fast": _own("objective=opd", four),
        "opd-live": _own("objective=opd", "on_policy.every=1", "on_policy.scores=live", SLOWER),
        "minillm": _own("objective=minillm"),
        "r4-rkl-dense": _own("objective=rkl", four, dense),
        "gkd-dense": _own("objective=gkd", dense),
        "minillm-dense": _own("objective=minillm", dense),
        "r4-x-jsd-frozen": _own("objective=jsd", four, "reward=frozen"),
        "r4-x-jsd-shuffled": _own("objective=jsd", four, "reward=shuffled"),
    }


ARMS = _arms()


class Experiment:
    """One setting in its folder."""

    def __init__(self, out: Path, name: str, steps: int, params: Path | None):
        """params: sizes of something else than the defaults. Exits where the folder is of other parameters."""
        self.root, self.layout = out / name, Layout(out / name)
        self.store, self.log = out / "store", out / f"{name}.log"
        setting = SETTINGS[name]
        given = [*setting.overrides, "generate.engine=hf", f"distill.optimisation.steps={steps}"]
        loaded = load_params(params, [*given, "distill.reward=none", "distill.on_policy.validation=0"])
        loaded.prepare.student = loaded.prepare.train
        if setting.times > 1:
            write_longer_problems(self.root.resolve() / "problems", setting.times, loaded.prepare)
        text = to_yaml(loaded)
        self.root.mkdir(parents=True, exist_ok=True)
        if self.layout.params.is_file() and self.layout.params.read_text(encoding="utf-8") != text:
            sys.exit(f"{self.layout.params} has other parameters: take another OUT")
        self.layout.params.write_text(text, encoding="utf-8")

    def cli(self, *arguments: str | Path, store: Path | None = None) -> dict[str, float]:
        """Run a command in the folder; returns its seconds, and the bytes that its process held at most."""
        command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments), "--root", str(self.root)]
        begun = time.monotonic()
        with open(self.log, "a") as log:
            environment = os.environ | {"XKD_STORE": str(store or self.store)}
            child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            sys.exit(f"{' '.join(command)} ended with {child.returncode}: see {self.log}")
        spent = {"seconds": time.monotonic() - begun, "cpu_seconds": usage.ru_utime + usage.ru_stime}
        return spent | {"peak_bytes": usage.ru_maxrss * 1024}

    def set_up(self, names: Sequence[str]) -> None:
        """Models, the cache, and the reward where one of the arms needs it."""
        fits = any(each.startswith("reward=") for name in names for each in ARMS[name].overrides)
        for stage in (*SETUP, ("reward",)) if fits else SETUP:
            if not self.layout.results(*stage).is_file():
                say(f"{self.root.name}: {' '.join(stage)}")
                self.cli(*stage)

    def folder(self, name: str, seed: int) -> Path:
        return self.root / "students" / f"{name}-{seed}"

    def fresh(self, samples: int) -> Path:
        """The selection of the teacher's samples of the fresh prompts."""
        import polars as pl

        out, prompts = self.root / f"fresh{samples}", self.root / "fresh.parquet"
        if not (out.with_suffix(".json")).is_file():
            fresh = pl.col("split").replace({"student": "train"})
            table = pl.read_parquet(self.layout.prompts).filter(pl.col("split").is_in(["student", "validation"]))
            table.with_columns(fresh).write_parquet(prompts)
            say(f"{self.root.name}: {samples} of the teacher's samples per fresh prompt")
            results = ("--results", out.with_suffix(".json"))
            self.cli("generate", "--prompts", prompts, "--samples", samples, "--out", out, *results)
        return out

    def train(self, name: str, arm: Arm, seed: int, temperatures: Sequence[float] = ()) -> None:
        """Train and evaluate the arm's student, where that has not been done.

        temperatures: at which its samples are evaluated too.
        """
        folder = self.folder(name, seed)
        done = folder / "training.json"
        if not done.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # what is taken up again would take less time
            start = () if name == START else ("--student", self.folder(START, seed) / "student")
            seed += 0 if name == START else SECOND_PHASE
            options = [o for each in (*arm.overrides, f"seed={seed}") for o in ("--set", f"distill.{each}")]
            paths = {"--out": "student", "--metrics": "metrics", "--rounds": "rounds", "--runs": "runs"}
            paths = [o for option, place in paths.items() for o in (option, folder / place)]
            selection = self.fresh(arm.fresh) if arm.fresh else self.layout.selection
            inputs = ("--selection", selection, "--scored", self.layout.scored)
            took = self.cli("distill", *options, *start, *inputs, *paths, store=folder / "store")
            cost = json.loads((folder / "metrics" / RESULTS).read_text())["cost"]
            shutil.rmtree(folder / "store", ignore_errors=True)
            shutil.rmtree(folder / "runs", ignore_errors=True)
            done.write_text(json.dumps(cost | took | (self._written(selection) if arm.fresh else {}), indent=1))
        self.evaluate(folder / "student", folder / "evaluation")
        for temperature in temperatures:
            settings = (f"evaluate.temperature={temperature:g}", "evaluate.kl=cache")
            self.evaluate(folder / "student", folder / f"{AT}{temperature:g}", settings)

    def _written(self, selection: Path) -> dict[str, float]:
        """What the teacher writes for an arm, and in what time, by the rate of the command that made what was missing.

        No time where another setting's samples are the same ones and nothing was missing.
        """
        from pipeline.store.selection import Selection

        cost = json.loads(selection.with_suffix(".json").read_text())["cost"]
        tokens = Selection(selection).parts["train"]["tokens"]
        rate = cost["tokens_per_second"]
        return {"tokens_written": tokens} | ({"seconds_writing": tokens / rate} if rate else {})

    def evaluate(self, model: Path, out: Path, settings: Sequence[str] = ()) -> None:
        if not (out / RESULTS).is_file():
            options = [o for setting in settings for o in ("--set", setting)]
            self.cli("evaluate", "--model", f"student={model}", "--out", out, *options)

    def run(self, names: Sequence[str], seeds: Sequence[int], temperatures: Sequence[float] = ()) -> None:
        """All arms of a seed, then those of the next one."""
        self.set_up(names)
        self.evaluate(self.layout.teacher, self.root / TEACHER)
        for seed in seeds:
            for name, arm in {START: Arm(("objective=fkl",)), **{name: ARMS[name] for name in names}}.items():
                begun = time.monotonic()
                self.train(name, arm, seed, temperatures)
                say(f"{self.root.name}: {name}, seed {seed}: {time.monotonic() - begun:.0f} s")


def write_longer_problems(folder: Path, times: int, settings: Prepare) -> None:
    """Make a data set of arithmetic with so many times the steps, and its tokenizer; `settings` are given both."""
    from pipeline.models import word_tokenizer
    from pipeline.tasks import Generator, Task
    from pipeline.tasks.shipped import arithmetic
    from stages.prepare import draw

    data, tokenizer = folder / "data", folder / "tokenizer"
    if not tokenizer.is_dir():
        lengths = tuple(times * steps for steps in arithmetic.LENGTHS)
        longer = Generator(partial(arithmetic.example, lengths=lengths), arithmetic.lexicon)
        sizes = {split: getattr(settings, split) for split in SPLITS}
        rows: dict[str, list[str]] = {split: [] for split in ("train", *HELD_OUT)}
        for prompt in draw(Task("arithmetic", 1, (), longer), sizes, seed=0):
            row = {"prompt": prompt.prompt, "references": prompt.references}
            rows[prompt.split if prompt.split in HELD_OUT else "train"].append(json.dumps(row))
        data.mkdir(parents=True, exist_ok=True)
        for split, lines in rows.items():
            (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        word_tokenizer(sorted({*arithmetic.lexicon(), "=>"})).save_pretrained(tokenizer)
    settings.tokenizer, settings.dataset.path = str(tokenizer), str(data)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--setting", choices=SETTINGS, default="arithmetic")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps of each phase")
    parser.add_argument("--params", type=Path, help="parameter file with other sizes")
    parser.add_argument("--temperatures", nargs="+", type=float, default=(), help="of samples that are evaluated too")
    parser.add_argument("--figure", type=Path, help="SVG of the sweep over refreshes")
    parser.add_argument("--report", action="store_true", help="make nothing, only show what is there")
    parser.add_argument(
        "--across", action="store_true", help="make nothing, compare own and teacher's samples in settings"
    )
    options = parser.parse_args(arguments)
    if options.across:
        print(reports.across(options.out, list(SETTINGS)))
        return
    if not options.report:
        names = dict.fromkeys((BASE, *options.arms))
        experiment = Experiment(options.out, options.setting, options.steps, options.params)
        experiment.run(list(names), range(options.seeds), options.temperatures)
    print(reports.report(options.out, options.setting, list(ARMS), options.figure))


if __name__ == "__main__":
    main()

"""What `tests.benchmarks.on_policy` has measured so far: every number as JSON, a Markdown table, and the figure."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.layout import RESULTS, Layout
from pipeline.store.selection import Selection

DIVERGENCES = ("jsd", "fkl", "rkl")
REFRESHES = (0, 1, 2, 4, 8, 16)  # 0: the teacher's samples of the same fresh prompts
START, TEACHER, COST_UNIT, BASE = "start", "teacher", "sft", "same-jsd"
OWN, TEACHERS = "r4-jsd", "fresh1-jsd"  # what is compared in every setting
AT = "temperature-"  # before it, the folder of an evaluation at another temperature than 1
MEASURES = {  # where an evaluation has it, by the name that it has here
    "distinct_2": ("diversity", "distinct_2"),
    "kl": ("heldout", "kl"),
    "reverse_kl": ("heldout", "reverse_kl"),
    "own_kl": ("own", "kl"),
    "own_reverse_kl": ("own", "reverse_kl"),
}
COSTS = ("tokens_written", "tokens_scored", "seconds_writing", "seconds_drawing", "seconds_scoring")
COMPARED = ("greedy", "sampled", "matched", *MEASURES)
_DRAWN = ("sampled", "distinct_2")  # measures of samples
TOTALS = ("cpu_seconds", "seconds", "peak_bytes")  # of `distill`, and times also of the teacher's writing
Runs = dict[str, dict[int, dict[str, float]]]  # arm -> seed -> measure -> value
COLOURS = dict(zip(DIVERGENCES, ("#3366aa", "#dd7733", "#338855"), strict=True))


def measures_of(evaluation: Path) -> dict[str, float]:
    """What an evaluation of one model found; the task's first metric is `greedy` and `sampled`."""
    (modes,) = json.loads((evaluation / RESULTS).read_text())["metrics"].values()
    found = {mode: next(iter(modes[mode].values()))["value"] for mode in ("greedy", "sampled")}
    for name, (mode, measure) in MEASURES.items():
        if measure in modes.get(mode, {}):
            value = modes[mode][measure]
            found[name] = value["value"] if isinstance(value, dict) else value
    return found


def run_of(folder: Path) -> dict[str, float]:
    """All numbers of a student."""
    training = json.loads((folder / "training.json").read_text())
    run = {name: training.get(name, 0.0) for name in COSTS} | {"peak_bytes": training["peak_bytes"]}
    for name in ("cpu_seconds", "seconds"):  # the teacher writes in one thread
        run[name] = training[name] + run["seconds_writing"]
    for other in sorted(folder.glob(f"{AT}*/{RESULTS}")):
        found, temperature = measures_of(other.parent), other.parent.name.removeprefix(AT)
        run |= {f"{name} at {temperature}": found[name] for name in _DRAWN}
    return measures_of(folder / "evaluation") | run


def at_diversity(points: Sequence[tuple[float, float]], diversity: float) -> float | None:
    """The metric at a distinct-2, between the two of the points (distinct-2, metric) around it; None beyond them."""
    x, y = zip(*sorted(points), strict=True)
    return float(np.interp(diversity, x, y)) if x[0] <= diversity <= x[-1] else None


def add_matched(runs: Runs) -> None:
    """Give runs that were sampled at several temperatures the metric at the distinct-2 of BASE's samples: `matched`."""
    for by_seed in runs.values():
        for seed, run in by_seed.items():
            names = [name.removeprefix("sampled") for name in run if name.startswith("sampled")]
            points = [tuple(run[f"{of}{name}"] for of in reversed(_DRAWN)) for name in names]
            base = runs.get(BASE, {}).get(seed)
            if base and len(points) > 1 and (value := at_diversity(points, base["distinct_2"])) is not None:
                run["matched"] = value


def read_runs(root: Path, names: Sequence[str]) -> Runs:
    """Every student that is finished."""
    runs: Runs = {}
    for name in (START, *names):
        for done in sorted(root.glob(f"students/{name}-*/evaluation/{RESULTS}")):
            seed = done.parents[1].name.removeprefix(f"{name}-")
            if seed.isdigit():  # not that of an arm whose name begins like this one
                runs.setdefault(name, {})[int(seed)] = run_of(done.parents[1])
    add_matched(runs)
    return runs


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, spread over seeds and standard error of the mean; None of a single seed."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    error = spread / len(values) ** 0.5 if spread is not None else None
    return {"n": len(values), "mean": float(np.mean(values)), "spread": spread, "error": error}


def compared(runs: Runs, name: str, other: str, measure: str) -> dict | None:
    """Difference of the students of the same seeds, where both arms have the measure."""
    mine, theirs = (
        {seed: run[measure] for seed, run in runs.get(arm, {}).items() if measure in run} for arm in (name, other)
    )
    differences = [value - theirs[seed] for seed, value in mine.items() if seed in theirs]
    return summary(differences) if differences else None


def _ratios(runs: Runs, by_seed: Mapping[int, Mapping[str, float]], cost: str) -> list[float]:
    """A cost of an arm's runs by the mean of COST_UNIT's; without those of which it was not taken, which have NaN."""
    units, costs = (
        [run[cost] for run in each.values() if math.isfinite(run[cost])] for each in (runs.get(COST_UNIT, {}), by_seed)
    )
    return [each / float(np.mean(units)) for each in costs] if units else []


def base_of(name: str) -> str:
    """The arm that an arm is compared with: the same cache for longer, by its divergence; jsd where it has no other."""
    return next((f"same-{each}" for each in DIVERGENCES if each in name.split("-")), BASE)


def aggregate(runs: Runs) -> dict[str, dict]:
    """Of each arm all runs, means, differences from its base, and times and memory by those of COST_UNIT."""
    found = {}
    for name, by_seed in runs.items():
        shared = sorted(set.intersection(*map(set, by_seed.values())))
        minus = {measure: compared(runs, name, base_of(name), measure) for measure in COMPARED}
        by_unit = {cost: summary(of_arm) for cost in TOTALS if (of_arm := _ratios(runs, by_seed, cost))}
        found[name] = {
            "runs": by_seed,
            "means": {measure: summary([run[measure] for run in by_seed.values()]) for measure in shared},
            "minus_base": {measure: difference for measure, difference in minus.items() if difference},
            "by_cost_unit": by_unit,
        }
    return found


def _plus_minus(value: Mapping | None, digits: int, error: str = "spread", sign: str = "") -> str:
    if value is None:
        return ""
    more = "" if value[error] is None else f" ± {value[error]:.{digits}f}"
    return f"{value['mean']:{sign}.{digits}f}{more}"


def table(found: Mapping[str, dict], teacher: Mapping[str, float]) -> list[str]:
    """Quality and closeness with the spread over seeds, differences with their standard error, and what it took."""
    columns = [
        "second phase", "n", "greedy", "sampled", "distinct-2", "KL(T‖S)", "KL(S‖T), own states",
        "greedy − same cache", "sampled − same cache", "at equal distinct-2", "the teacher's tokens",
        f"CPU time by {COST_UNIT}", "memory",
    ]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    given = [f"{teacher[name]:.1f}" for name in ("greedy", "sampled")] + [f"{teacher['distinct_2']:.3f}"]
    lines.append("| " + " | ".join(["teacher", "", *given, *[""] * 8]) + " |")
    for name, arm in found.items():
        means, minus, by_unit = arm["means"], arm["minus_base"] if name != base_of(name) else {}, arm["by_cost_unit"]
        digits = {"greedy": 1, "sampled": 1, "distinct_2": 3, "kl": 4, "own_reverse_kl": 4}
        cells = [name, str(len(arm["runs"]))]
        cells += [_plus_minus(means.get(measure), number) for measure, number in digits.items()]
        cells += [_plus_minus(minus.get(mode), 1, "error", "+") for mode in ("greedy", "sampled", "matched")]
        asked = {how: means[f"tokens_{how}"]["mean"] for how in ("written", "scored")}
        cells += [", ".join(f"{count:,.0f} {how}" for how, count in asked.items() if count)]
        cells += [f"{by_unit[each]['mean']:.2f}" if each in by_unit else "" for each in ("cpu_seconds", "peak_bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def of_sweep(name: str, refreshes: int) -> str:
    """The arm with so many refreshes."""
    return f"r{refreshes}-{name}" if refreshes else f"fresh1-{name}"


def plot(found: Mapping[str, dict], setting: str, path: Path) -> None:
    """Quality, both KLs, distinct-2 and time over the number of refreshes, for each divergence."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    panels = {
        "quality, greedy": ("means", "greedy"), "quality, sampled": ("means", "sampled"),
        "distinct-2": ("means", "distinct_2"), "KL(T‖S), teacher's states": ("means", "kl"),
        "KL(S‖T), own states": ("means", "own_reverse_kl"), f"CPU time by {COST_UNIT}": ("by_cost_unit", "cpu_seconds"),
    }  # fmt: skip
    style = {"svg.hashsalt": "xkd", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.2, 5.6), layout="constrained")
        figure.suptitle(f"{setting}: refreshes at equal steps; 0: the teacher's samples of the same prompts")
        for axes, (title, (group, measure)) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
            for name, colour in COLOURS.items():
                arms = {place: found.get(of_sweep(name, count), {}) for place, count in enumerate(REFRESHES)}
                points = {place: arm[group][measure] for place, arm in arms.items() if measure in arm.get(group, {})}
                if points:
                    means, errors = ([p[key] or 0.0 for p in points.values()] for key in ("mean", "error"))
                    axes.errorbar(list(points), means, errors, color=colour, label=name, marker="o", markersize=4)
            axes.set_xticks(range(len(REFRESHES)), list(map(str, REFRESHES)))
            axes.set(title=title, xlabel="refreshes")
            axes.grid(alpha=0.25)
        if figure.axes[0].get_legend_handles_labels()[0]:
            figure.axes[0].legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def parameters_of(model: Path) -> int:
    """How many numbers a model's file has."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def about(layout: Layout) -> dict[str, float]:
    """What the settings differ in."""
    train = Selection(layout.selection).parts["train"]
    gap = parameters_of(layout.teacher) / parameters_of(layout.start)
    return {"tokens_per_response": train["tokens"] / train["rows"], "gap": gap}


def report(out: Path, setting: str, names: Sequence[str], figure: Path | None = None) -> str:
    """Writes OUT/SETTING.json and the figure; returns the table."""
    root = out / setting
    found, teacher = aggregate(read_runs(root, names)), measures_of(root / TEACHER)
    parameters = (root / "params.yaml").read_text(encoding="utf-8")
    numbers = {"setting": setting, "teacher": teacher, "arms": found, "parameters": parameters}
    (out / f"{setting}.json").write_text(json.dumps(numbers | about(Layout(root)), indent=1) + "\n")
    if figure:
        plot(found, setting, figure)
    return "\n".join(table(found, teacher))


def across(out: Path, settings: Sequence[str]) -> str:
    """The student's own samples against the teacher's of the same prompts, in every setting that has a report."""
    columns = [
        "setting", "n", "tokens per response", "teacher / student", "teacher", START, BASE, TEACHERS,
        *(f"{OWN} − {TEACHERS}: {name}" for name in ("greedy", "sampled", "KL(S‖T), own states")),
        "tokens written", "tokens scored",
    ]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for path in (path for path in (out / f"{name}.json" for name in settings) if path.is_file()):
        numbers = json.loads(path.read_text())
        arms = numbers["arms"]
        runs = {name: arm["runs"] for name, arm in arms.items()}
        if {START, BASE, TEACHERS, OWN} <= runs.keys():
            differences = {of: compared(runs, OWN, TEACHERS, of) for of in ("greedy", "sampled", "own_reverse_kl")}
            cells = [path.stem, str(differences["greedy"]["n"])]
            cells += [f"{numbers[name]:.1f}" for name in ("tokens_per_response", "gap")]
            cells += [f"{numbers['teacher']['greedy']:.1f}"]
            cells += [_plus_minus(arms[arm]["means"]["greedy"], 1) for arm in (START, BASE, TEACHERS)]
            cells += [_plus_minus(each, 4 if "kl" in of else 1, "error", "+") for of, each in differences.items()]
            of_teacher = ((TEACHERS, "tokens_written"), (OWN, "tokens_scored"))
            cells += [f"{arms[arm]['means'][tokens]['mean']:,.0f}" for arm, tokens in of_teacher]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

"""Results of stages: the one writer of results.json and metrics.json, and the headline numbers of a model.

The headline numbers are the first metric of the task, and the exact KL or else its estimate from cached rows.
"""

from collections.abc import Mapping
from pathlib import Path

from pipeline.files import write_json_atomically
from pipeline.provenance import git_commit, seconds_since_start, versions

KL_NAMES = {
    "kl": "KL(T‖S)",
    "reverse_kl": "KL(S‖T)",
    "kl_estimate": "KL(T‖S), estimate",
    "kl_bound": "KL(T‖S), bound",
    "cross_entropy": "cross-entropy",
}
CUT_WARNING = 0.05  # share of responses cut at max_tokens, above which there is a warning
FORWARD_KLS = ("kl", "kl_estimate", "kl_bound")  # of KL(T‖S), best first: exact, unbiased estimate, lower bound


def write_results(path: Path, stage: str, measured: Mapping, cost: Mapping | None = None, **origins) -> dict:
    """Write a results.json, and return it: what a stage measured, what it cost, and what it was made from."""
    provenance = {"stage": stage, **origins, "git_commit": git_commit(), "versions": versions()}
    costs = {"seconds": seconds_since_start(), **(cost or {})}
    results = {**measured, "cost": costs, "provenance": provenance}
    write_json_atomically(path, results)
    return results


def write_metrics(path: Path, evaluation: Mapping) -> None:
    """Write the few numbers that `dvc metrics` shows on one screen; results.json has all of them, with intervals."""
    headline, shown = headline_metric(evaluation), {}
    for name, modes in evaluation["metrics"].items():
        shown[name] = {headline: round(modes["greedy"][headline]["value"], 2)}
        measure, kl = headline_kl(modes)
        if kl and name != "teacher":
            shown[name][measure] = round(kl["value"], 4)
    write_json_atomically(path, shown)


def headline_metric(evaluation: Mapping) -> str:
    """Name of the task's first metric, from the results of `evaluate`."""
    return next(iter(evaluation["higher_is_better"]))


def headline_kl(modes: Mapping) -> tuple[str, Mapping | None]:
    """Name and interval of KL(T‖S), from a model's or a difference's entry in results.json; None without one."""
    measures = modes.get("heldout", {})
    name = next((name for name in FORWARD_KLS if name in measures), FORWARD_KLS[-1])
    return name, measures.get(name)

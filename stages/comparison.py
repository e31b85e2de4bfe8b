"""Any set of results in one table: folders that `evaluate` filled, DVC experiments, git revisions."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.listing import Column, Form, Listing
from pipeline.shards.kept_mass import kept_mass_warning
from stages.bootstrap import say_interval
from stages.headline import KL_NAMES
from stages.reporting.experiments import Experiment, read_experiments


@dataclass(frozen=True)
class Scored:
    """A model as one result has it."""

    experiment: Experiment
    model: str

    @property
    def modes(self) -> dict:
        return self.experiment.evaluation["metrics"][self.model]

    @property
    def identity(self) -> tuple:
        """Equal for a model that several results share, with equal numbers."""
        provenance = self.experiment.evaluation["provenance"]
        return self.experiment.set, provenance["models"][self.model], json.dumps(self.modes, sort_keys=True)

    def answers(self, name: str) -> float | None:
        """`tokens` or `cut` of the greedy answers."""
        found = (self.experiment.evaluation.get("answers") or {}).get(self.model, {})
        return found.get("greedy", {}).get(name)


def models_of(experiments: Sequence[Experiment]) -> list[Scored]:
    """Every model of every experiment; one that several share is there once."""
    found: dict[tuple, Scored] = {}
    for experiment in experiments:
        for model in experiment.evaluation["metrics"]:
            scored = Scored(experiment, model)
            found.setdefault(scored.identity, scored)
    return list(found.values())


def differ(experiments: Sequence[Experiment]) -> bool:
    """Whether the experiments' numbers do not compare."""
    return len({experiment.set for experiment in experiments}) > 1


def compare(names: list[str], data: Path, form: Form = Form.TEXT) -> Listing:
    """Print one row for each result and model, and return them; names as for `read_experiments`."""
    experiments = read_experiments(names, data)
    if differ(experiments):
        console.warn("these results are of different prompts, tasks or teachers: their numbers do not compare")
    for experiment in experiments:
        evaluation = experiment.evaluation
        if evaluation.get("kl") == "cache" and (word := kept_mass_warning(evaluation.get("kept_mass"))):
            console.warn(f"{experiment.name}: {word}")
    rows = models_of(experiments)
    listing = Listing(list(_columns(rows)), rows, names=2)
    if form is Form.TEXT:
        listing.show("compared")
    else:
        listing.write(form)
    return listing


def _columns(rows: Sequence[Scored]) -> Iterator[Column]:
    """What is said of every model: the one place that lists it."""
    yield Column("result", lambda row: row.experiment.name)
    yield Column("model", lambda row: row.model)
    yield Column("objective", lambda row: row.experiment.objective_of(row.model))
    for metric in dict.fromkeys(row.experiment.headline for row in rows):
        yield _measure(metric, lambda row, metric=metric: row.modes["greedy"].get(metric), ".1f", metric)
        yield _measure(
            f"{metric}_sampled",
            lambda row, metric=metric: row.modes["sampled"].get(metric),
            ".1f",
            f"{metric}, sampled",
        )
    for mode, key, on in (("heldout", "", ""), ("own", "own_", ", own samples")):
        for name, heading in KL_NAMES.items():
            read = partial(_read, mode, name)
            if any(read(row) for row in rows):
                yield _measure(key + name, read, ".3f", heading + on)
    yield Column("kept_mass", _kept_mass, "kept mass", "{:.3f}".format)
    yield Column("cut", lambda row: row.answers("cut"), "cut", "{:.0%}".format)
    yield Column("tokens", lambda row: row.answers("tokens"), "tokens", "{:.1f}".format)
    yield Column("self_bleu", lambda row: row.modes["diversity"]["self_bleu"], "Self-BLEU", "{:.1f}".format)


def _read(mode: str, name: str, row: Scored) -> dict | None:
    return row.modes.get(mode, {}).get(name)


def _kept_mass(row: Scored) -> float | None:
    return (row.experiment.evaluation.get("kept_mass") or {}).get("mean")


def _measure(key: str, read: Callable[[Scored], Any], form: str, heading: str) -> Column:
    """A column of values with intervals."""
    return Column(key, read, heading, partial(say_interval, form=form), interval=True)

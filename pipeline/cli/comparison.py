"""Any set of results in one table: folders that `evaluate` filled, DVC experiments, git revisions."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pipeline import console
from pipeline.cli.listing import Column, Form, Listing
from pipeline.layout import Layout
from pipeline.results import FORWARD_KLS, KL_NAMES
from pipeline.store.kept_mass import kept_mass_warning
from pipeline.tasks.intervals import say_interval
from stages.report.experiments import Scored, differ, models_of, read_experiments


def compare(names: list[str], layout: Layout, form: Form = Form.TEXT) -> Listing:
    """Print one row per result and model, and return them; names as for `read_experiments`."""
    experiments = read_experiments(names, layout)
    if differ(experiments):
        console.warn("these results are of different prompts, tasks or teachers: their numbers do not compare")
    for experiment in experiments:
        if warning := kept_mass_warning(experiment.evaluation.get("kept_mass")):
            console.warn(f"{experiment.name}: {warning}")
    rows = models_of(experiments)
    listing = Listing(list(_columns(rows)), rows, names=2)
    if form is Form.TEXT:
        listing.show("compared")
    else:
        listing.write(form)
    return listing


def _columns(rows: Sequence[Scored]) -> Iterator[Column]:
    """The columns of the comparison, listed here alone."""
    yield Column("result", lambda row: row.experiment.name)
    yield Column("model", lambda row: row.model)
    yield Column("objective", lambda row: row.experiment.objective_of(row.model))
    for metric in dict.fromkeys(row.experiment.headline for row in rows):
        for mode, key, heading in (("greedy", "", ""), ("sampled", "_sampled", ", sampled")):
            yield _measure(metric + key, partial(_read, mode, metric), ".1f", metric + heading)
    exact = all(_read("heldout", "kl", row) for row in rows)
    shown = {"kl", "reverse_kl"} if exact else set(FORWARD_KLS)
    for mode, key in (("heldout", ""), ("own", "own_")):
        for name, heading in KL_NAMES.items():
            heading = heading if mode == "heldout" and name in shown else None  # the others are in JSON and CSV only
            yield _measure(key + name, partial(_read, mode, name), ".3f", heading)
    yield Column("kept_mass", _kept_mass, show="{:.3f}".format)
    yield Column("cut", lambda row: row.answers("cut"), show="{:.0%}".format)
    yield Column("tokens", lambda row: row.answers("tokens"), None)
    yield Column("self_bleu", lambda row: row.modes["diversity"]["self_bleu"], "Self-BLEU", "{:.1f}".format)


def _read(mode: str, name: str, row: Scored) -> dict | None:
    return row.modes.get(mode, {}).get(name)


def _kept_mass(row: Scored) -> float | None:
    return (row.experiment.evaluation.get("kept_mass") or {}).get("mean")


def _measure(key: str, read: Callable[[Scored], Any], form: str, heading: str | None) -> Column:
    """A column of values with intervals."""
    return Column(key, read, heading, partial(say_interval, form=form), interval=True)

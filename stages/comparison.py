"""Any set of results in one table: folders that `evaluate` filled, DVC experiments, git revisions."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.errors import UserError
from pipeline.listing import Column, Form, Listing
from pipeline.shards.files import parse_json, read_json, require_shape
from stages.bootstrap import say_interval
from stages.reporting.results import read_evaluation

_EVALUATION = "evaluation/results.json"
_DISTILL = "distill/results.json"


@dataclass(frozen=True)
class Scored:
    """A model as one result has it."""

    result: str
    model: str
    objective: str | None  # of the student that was distilled, where it is known
    metric: str  # the task's headline
    modes: dict


def compare(names: list[str], data: Path, form: Form = Form.TEXT) -> Listing:
    """Print one row for each result and model, and return them; a model that several results share is shown once.

    A name is a results.json, the folder it is in, the folder above (as `data`), or a DVC experiment or git revision,
    whose `data` is read. Raises UserError for a name that is none of these.
    """
    found = {name: _read(name, data) for name in dict.fromkeys(names)}
    sets = {name: _set(evaluation) for name, (evaluation, _) in found.items()}
    if len(set(sets.values())) > 1:
        console.warn("these results are of different prompts, tasks or teachers: their numbers do not compare")
    rows, seen = [], set()
    for name, (evaluation, objective) in found.items():
        metric = next(iter(evaluation["higher_is_better"]))
        for model, modes in evaluation["metrics"].items():
            identity = (sets[name], evaluation["provenance"]["models"][model], json.dumps(modes, sort_keys=True))
            if identity not in seen:
                seen.add(identity)
                known = objective if model == evaluation["candidate"] else None
                rows.append(Scored(name, model, known, metric, modes))
    listing = Listing(list(_columns(rows)), rows, names=2)
    if form is Form.TEXT:
        listing.show("compared")
    else:
        listing.write(form)
    return listing


def _columns(rows: Sequence[Scored]) -> Iterator[Column]:
    """What is said of every model: the one place that lists it."""
    yield Column("result", lambda row: row.result)
    yield Column("model", lambda row: row.model)
    yield Column("objective", lambda row: row.objective)
    for metric in dict.fromkeys(row.metric for row in rows):
        yield _measure(metric, lambda row, metric=metric: row.modes["greedy"].get(metric), ".1f", metric)
        yield _measure(
            f"{metric}_sampled",
            lambda row, metric=metric: row.modes["sampled"].get(metric),
            ".1f",
            f"{metric}, sampled",
        )
    yield _measure("kl", lambda row: row.modes.get("heldout", {}).get("kl_to_teacher"), ".3f", "KL")
    yield Column("self_bleu", lambda row: row.modes["diversity"]["self_bleu"], "Self-BLEU", "{:.1f}".format)


def _measure(key: str, read: Callable[[Scored], Any], form: str, heading: str) -> Column:
    """A column of values with intervals."""
    return Column(key, read, heading, partial(say_interval, form=form), interval=True)


def _set(evaluation: dict) -> tuple[str, ...]:
    """What must be equal for two results to be comparable."""
    provenance = evaluation["provenance"]
    return provenance["task"]["name"], provenance["prompts"], provenance["teacher"]


def _read(name: str, data: Path) -> tuple[dict, str | None]:
    """An evaluation, and the objective of the student that it ends with where that is known."""
    path = Path(name)
    for file in (path, path / "results.json", path / _EVALUATION):
        if file.is_file():
            evaluation = read_evaluation(file)
            beside = file.parents[1] / _DISTILL if file.parent.name == "evaluation" else None
            known = beside is not None and beside.is_file()
            return evaluation, _objective(read_json(beside), beside) if known else None
    if path.exists():
        raise UserError(f"{name} holds no results of `xkd-pipeline evaluate`")
    return _read_revision(name, data)


def _read_revision(name: str, data: Path) -> tuple[dict, str | None]:
    import dvc.api
    from dvc.exceptions import DvcException
    from scmrepo.exceptions import SCMError

    try:
        evaluation, distillation = (
            dvc.api.read((data / file).as_posix(), rev=name) for file in (_EVALUATION, _DISTILL)
        )
    except (DvcException, SCMError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} is neither a folder with results nor an experiment or revision that has them: {reason}"
        ) from error
    beside = f"{data / _DISTILL} of {name}"
    found = read_evaluation(f"{data / _EVALUATION} of {name}", evaluation)
    return found, _objective(parse_json(distillation, beside), beside)


def _objective(distillation: Any, source: Path | str) -> str | None:
    require_shape(distillation, dict, f"{source} holds no results of `xkd-pipeline distill`")
    objective = distillation.get("objective")
    return None if objective is None else str(objective)

"""Any set of results in one table: folders that `evaluate` filled, DVC experiments, git revisions."""

import json
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.errors import UserError
from pipeline.shards.files import parse_json, read_json, require_shape
from stages.bootstrap import say_interval
from stages.reporting.results import read_evaluation

_EVALUATION = "evaluation/results.json"
_DISTILL = "distill/results.json"


def compare(names: list[str], data: Path) -> list[dict[str, str]]:
    """Print and return one row for each result and model; a model that several results share is shown once.

    A name is a results.json, the folder it is in, the folder above (as `data`), or a DVC experiment or git revision,
    whose `data` is read. Raises UserError for a name that is none of these.
    """
    found = {name: _read(name, data) for name in dict.fromkeys(names)}
    sets = {name: _set(evaluation) for name, (evaluation, _) in found.items()}
    if len(set(sets.values())) > 1:
        console.warn("these results are of different prompts, tasks or teachers: their numbers do not compare")
    rows, seen = [], set()
    for name, (evaluation, objective) in found.items():
        for model, modes in evaluation["metrics"].items():
            identity = (sets[name], evaluation["provenance"]["models"][model], json.dumps(modes, sort_keys=True))
            if identity not in seen:
                seen.add(identity)
                rows.append(_row(name, model, modes, evaluation, objective))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    console.table("compared", columns, [[row.get(column, "-") for column in columns] for row in rows])
    return rows


def _set(evaluation: dict) -> tuple[str, ...]:
    """What must be equal for two results to be comparable."""
    provenance = evaluation["provenance"]
    return provenance["task"]["name"], provenance["prompts"], provenance["teacher"]


def _row(name: str, model: str, modes: dict, evaluation: dict, objective: str) -> dict[str, str]:
    metric = next(iter(evaluation["higher_is_better"]))
    kl = modes.get("heldout", {}).get("kl_to_teacher")
    return {
        "result": name,
        "model": model,
        "objective": objective if model == evaluation["candidate"] else "-",
        metric: say_interval(modes["greedy"][metric]),
        f"{metric}, sampled": say_interval(modes["sampled"][metric]),
        "KL": say_interval(kl, ".3f") if kl else "-",
        "Self-BLEU": f"{modes['diversity']['self_bleu']:.1f}",
    }


def _read(name: str, data: Path) -> tuple[dict, str]:
    """An evaluation, and the objective of the student that it ends with where that is known."""
    path = Path(name)
    for file in (path, path / "results.json", path / _EVALUATION):
        if file.is_file():
            evaluation = read_evaluation(file)
            beside = file.parents[1] / _DISTILL if file.parent.name == "evaluation" else None
            known = beside is not None and beside.is_file()
            return evaluation, _objective(read_json(beside), beside) if known else "-"
    if path.exists():
        raise UserError(f"{name} holds no results of `xkd-pipeline evaluate`")
    return _read_revision(name, data)


def _read_revision(name: str, data: Path) -> tuple[dict, str]:
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


def _objective(distillation: Any, source: Path | str) -> str:
    require_shape(distillation, dict, f"{source} holds no results of `xkd-pipeline distill`")
    return str(distillation.get("objective", "-"))

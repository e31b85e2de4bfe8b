"""Results of experiments, wherever they are: folders that `evaluate` filled, DVC experiments, git revisions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import parse_json, read_json, require_shape
from pipeline.layout import RESULTS, Layout
from pipeline.results import headline_metric
from stages.report.results import read_evaluation


@dataclass(frozen=True)
class Experiment:
    """What `evaluate` measured, and the objective of its last student where that is known."""

    name: str
    evaluation: dict
    objective: str | None

    @property
    def set(self) -> tuple[str, ...]:
        """What must be equal for two results to be comparable."""
        provenance = self.evaluation["provenance"]
        return provenance["task"]["name"], provenance["prompts"], provenance["teacher"]

    @property
    def headline(self) -> str:
        """The task's first metric."""
        return headline_metric(self.evaluation)

    def objective_of(self, model: str) -> str | None:
        return self.objective if model == self.evaluation["candidate"] else None


@dataclass(frozen=True)
class Scored:
    """A model as one result has it."""

    experiment: Experiment
    model: str

    @property
    def modes(self) -> dict:
        return self.experiment.evaluation["metrics"][self.model]

    def answers(self, name: str) -> float | None:
        """`tokens` or `cut` of the greedy answers."""
        modes = (self.experiment.evaluation.get("answers") or {}).get(self.model, {})
        return modes.get("greedy", {}).get(name)


def models_of(experiments: Sequence[Experiment]) -> list[Scored]:
    """Every model of every experiment; one that several share, with equal numbers, is there once."""
    models: dict[tuple, Scored] = {}
    for experiment in experiments:
        for model, modes in experiment.evaluation["metrics"].items():
            identity = experiment.evaluation["provenance"]["models"][model]
            shared = experiment.set, identity, json.dumps(modes, sort_keys=True)
            models.setdefault(shared, Scored(experiment, model))
    return list(models.values())


def differ(experiments: Sequence[Experiment]) -> bool:
    """Whether the experiments' numbers cannot be compared."""
    return len({experiment.set for experiment in experiments}) > 1


def read_experiments(names: Sequence[str], layout: Layout) -> list[Experiment]:
    """Each once. A name is a results.json, the folder it is in, the folder above (as `data`), an experiment's root,
    or a DVC experiment or git revision, in which the layout's folders are read. Raises UserError for any other name.
    """
    return [_read(name, layout) for name in dict.fromkeys(names)]


def _read(name: str, layout: Layout) -> Experiment:
    path = Path(name)
    evaluations = (Layout(data=path).results("evaluate"), Layout(path).results("evaluate"))
    for file in (path, path / RESULTS, *evaluations):
        if file.is_file():
            evaluation = read_evaluation(file)
            layout_there = Layout(data=file.parents[1])
            beside = layout_there.results("distill")
            known = file == layout_there.results("evaluate") and beside.is_file()
            return Experiment(name, evaluation, _objective(read_json(beside), beside) if known else None)
    if path.exists():
        raise UserError(f"{name} holds no results of `xkd-pipeline evaluate`")
    return _read_revision(name, layout)


def _read_revision(name: str, layout: Layout) -> Experiment:
    import dvc.api
    from dvc.exceptions import DvcException
    from scmrepo.exceptions import SCMError

    files = layout.results("evaluate"), layout.results("distill")
    try:
        evaluation, distillation = (dvc.api.read(file.as_posix(), rev=name) for file in files)
    except (DvcException, SCMError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} is neither a folder with results nor an experiment or revision that has them: {reason}"
        ) from error
    evaluation_of, distillation_of = (f"{file} of {name}" for file in files)
    objective = _objective(parse_json(distillation, distillation_of), distillation_of)
    return Experiment(name, read_evaluation(evaluation_of, evaluation), objective)


def _objective(distillation: Any, source: Path | str) -> str | None:
    require_shape(distillation, dict, f"{source} holds no results of `xkd-pipeline distill`")
    objective = distillation.get("objective")
    return None if objective is None else str(objective)

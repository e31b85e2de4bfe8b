"""What tables and pages read of the stages' results and curves, and the check that a file has it."""

import csv
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator
from typing_extensions import TypedDict

from pipeline.errors import UserError, in_one_line, shown
from pipeline.files import parse_json, read_json, require_shape
from pipeline.store.kept_mass import KeptMassFound

# What a round of the student's own samples found, made and took, and what each is called on the page.
COUNTS = {
    "samples_drawn": "samples drawn", "samples_found": "samples found", "rows_scored": "rows scored",
    "rows_found": "rows found", "tokens_scored": "tokens scored", "seconds_drawing": "seconds drawing",
    "seconds_scoring": "seconds scoring",
}  # fmt: skip
ROUND = ("round", "step", *COUNTS)  # what every round has, beside measures of its student


def _of_a_round(numbers: dict[str, float]) -> dict[str, float]:
    if absent := [name for name in ROUND if name not in numbers]:
        raise ValueError(f"a round without {', '.join(absent)}")
    return numbers


class Interval(TypedDict):
    value: float
    low: float
    high: float


class AucInterval(TypedDict):
    auc: float
    low: float
    high: float


class Difference(TypedDict):
    greedy: dict[str, Interval]
    sampled: dict[str, Interval]
    heldout: NotRequired[dict[str, Interval]]
    own: NotRequired[dict[str, Interval]]


class Diversity(TypedDict):
    distinct_1: float
    distinct_2: float
    self_bleu: float


class Scores(Difference):
    diversity: Diversity


class Task(TypedDict):
    name: str


class EvaluationProvenance(TypedDict):
    task: Task
    prompts: str
    teacher: str
    models: dict[str, str]


class Cost(TypedDict):
    seconds: float
    seconds_to_first_step: NotRequired[float | None]  # of distill
    seconds_drawing: NotRequired[float]  # of its rounds, as seconds_scoring
    seconds_scoring: NotRequired[float]


class Made(TypedDict):
    """What every results.json has."""

    cost: Cost
    provenance: dict[str, Any]


class Lengths(TypedDict):
    tokens: float
    cut: float


class Evaluation(TypedDict):
    """results.json of `evaluate`."""

    metrics: dict[str, Scores]
    candidate: str
    higher_is_better: dict[str, bool]
    provenance: EvaluationProvenance
    differences: NotRequired[dict[str, Difference]]
    counts: NotRequired[dict[str, int]]
    cost: NotRequired[Cost]
    kept_mass: NotRequired[KeptMassFound | None]
    answers: NotRequired[dict[str, dict[str, Lengths]]]
    parameters: NotRequired[dict[str, int | None]]
    sources: NotRequired[dict[str, str]]
    checked: NotRequired[bool]
    signatures: NotRequired[dict[str, str]]


class Distill(Made):
    """results.json of `distill`."""

    objective: str
    samples: int
    rounds: NotRequired[list[Annotated[dict[str, float], AfterValidator(_of_a_round)]]]


class Fit(TypedDict):
    heldout_nll: float
    phi_kl: float
    c: float
    inside_1_sigma: float
    inside_2_sigma: float
    sigma_at_floor: float


class Negatives(TypedDict):
    rows: int
    used: bool
    choice_auc: NotRequired[dict[str, float]]


class Judged(TypedDict):
    within_mean: AucInterval
    within_sum: AucInterval
    pooled_mean: AucInterval
    pooled_sum: AucInterval


class Audit(Made):
    """results.json of `reward`, in the folder of the audit."""

    sarsa: Fit
    soft: Fit
    negatives: Negatives
    audit: NotRequired[dict[str, dict[str, Judged]]]
    audited_prompts: NotRequired[dict[str, int]]


class AskingCost(Cost):
    rows_found: int
    rows_made: int
    rows_left_out: int
    tokens_selected: int
    tokens_made: int
    tokens_per_second: float | None
    store_bytes: int
    bytes_per_token: float | None


class Asking(TypedDict):
    """results.json of `generate` and of `score`."""

    cost: AskingCost
    kept_mass: NotRequired[KeptMassFound | None]
    cut: NotRequired[float]
    provenance: dict[str, Any]


class Data(TypedDict):
    path: str
    config: str


class Format(TypedDict):
    template: str
    chat: bool
    system: str


class Prepared(Made):
    """results.json of `prepare`."""

    data: Data
    prompt_format: Format


def read_results(path: Path, kind: type, stage: str) -> dict:
    """A results.json. Raises UserError, which names it, where `stage` has not written it."""
    results = read_json(path)
    require_shape(results, kind, _none_of(path, stage))
    return results


def read_evaluation(source: Path | str, text: str | None = None) -> dict:
    """An evaluation: a file's, or that of a text from `source`. Raises UserError where it is not one."""
    evaluation = read_json(Path(source)) if text is None else parse_json(text, str(source))
    what = _none_of(source, "evaluate")
    require_shape(evaluation, Evaluation, what)
    metrics, names = evaluation["metrics"], list(evaluation["higher_is_better"])
    if not metrics or not names:
        raise UserError(f"{what}: it has no models, or no metrics")
    for model, modes in [*metrics.items(), *evaluation.get("differences", {}).items()]:
        absent = [name for name in names if name not in modes["greedy"]]
        absent += [f"{name}, sampled" for name in names[:1] if name not in modes["sampled"]]
        if absent:
            raise UserError(f"{what}: {model} has no {', '.join(absent)}")
    if evaluation["candidate"] not in metrics:
        raise UserError(f"{what}: its candidate {shown(evaluation['candidate'])} is not one of its models")
    if unknown := metrics.keys() - evaluation["provenance"]["models"].keys():
        raise UserError(f"{what}: it does not say what {', '.join(sorted(unknown))} is")
    return evaluation


def read_curve(path: Path) -> dict[str, list[float]]:
    """Columns of a curve's CSV file; empty where there is none. Raises UserError where they are not numbers."""
    if not path.is_file():
        return {}
    with in_one_line(f"{path} holds no curve"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())}


def _none_of(source: Path | str, stage: str) -> str:
    return f"{source} holds no results of `xkd-pipeline {stage}`"

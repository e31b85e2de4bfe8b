"""The page's tables of numbers: quality, closeness to the teacher, diversity, and other experiments beside this one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.results import KL_NAMES, headline_kl, headline_metric
from pipeline.store.kept_mass import kept_mass_warning
from pipeline.tasks.intervals import say_interval
from stages.report import figures
from stages.report.experiments import Experiment, Scored, differ, models_of
from stages.report.page import Figure, Section, Table

_LONGEST = 32  # characters of a name in a figure
_MEANINGS = {
    "kl": "KL(T‖S) is exact, over the whole vocabulary: teacher T and model S both ran over held-out samples of T.",
    "kl_estimate": "KL(T‖S), estimate: the teacher did not run; its cached tokens, a sampled support, give an unbiased "
    "estimate.",
    "kl_bound": "KL(T‖S), bound: the teacher did not run, so this is the lower bound that its cached top k gives.",
}

_CACHED = {
    "kl_estimate": "The estimate is what the cached tokens, a sampled support, say of KL(T‖S): it is unbiased.",
    "kl_bound": "The bound sees only the tokens that the cache keeps and the rest as one: what it does not show, no "
    "loss on the cache can teach.",
}


def quality(evaluation: dict) -> Section:
    """Scores of all models on the test prompts, and the differences of the last one."""
    metrics, names = evaluation["metrics"], list(evaluation["higher_is_better"])
    measure, _ = headline_kl(metrics[evaluation["candidate"]])
    section = Section("quality", "Quality", [_MEANINGS[measure] + " In nats per token."])
    if signatures := evaluation.get("signatures"):
        section.texts.append(" ".join(f"{name}: {signature}." for name, signature in signatures.items()))
    columns = ["model", *names, f"{names[0]}, sampled", KL_NAMES[measure]]
    title = "Scores on the test prompts, greedy unless said otherwise"
    section.tables.append(Table(columns, [[model, *_scores(modes, names)] for model, modes in metrics.items()], title))
    if evaluation.get("differences"):
        title = f"{evaluation['candidate']} minus the others, paired over prompts"
        rows = [[f"− {model}", *_scores(modes, names, "+")] for model, modes in evaluation["differences"].items()]
        section.tables.append(Table(columns, rows, title))
    kls = {model: headline_kl(modes)[1] for model, modes in metrics.items()}
    section.figures += _intervals(metrics, names[0], kls, measure)
    return section


def _intervals(models: Mapping[str, dict], metric: str, kls: Mapping[str, dict | None], measure: str) -> list[Figure]:
    """A metric and a KL of models (name -> entry in results.json); without the KL where no model has one."""
    greedy = {name: modes["greedy"][metric] for name, modes in models.items()}
    drawn = [Figure(figures.intervals(greedy, f"{metric}, greedy"), f"{metric} of the greedy answers")]
    if known := {name: kl for name, kl in kls.items() if kl}:
        drawn.append(Figure(figures.intervals(known, "nats per token"), KL_NAMES[measure]))
    return drawn


def _scores(modes: dict, names: list[str], sign: str = "") -> list[str]:
    """Cells of one model, or of one difference: all metrics greedy, the headline sampled, KL."""
    _, kl = headline_kl(modes)
    return [
        *(say_interval(modes["greedy"][name], sign=sign) for name in names),
        say_interval(modes["sampled"][names[0]], sign=sign),
        _value(kl, sign),
    ]


def closeness(evaluation: dict) -> Section | None:
    """Every divergence from the teacher, on its samples and on the models' own, and what the cache keeps of it."""
    metrics = evaluation["metrics"]
    measures = [
        (mode, name)
        for mode in ("heldout", "own")
        for name in KL_NAMES
        if any(name in modes.get(mode, {}) for modes in metrics.values())
    ]
    if not measures:
        return None
    places = {"heldout": "the teacher's samples", "own": "the model's own samples"}
    text = (
        "On held-out prompts, in nats per token. KL(T‖S) punishes what the model leaves out, KL(S‖T) what it makes "
        "up; on its own samples, where a model is when it is used. Cross-entropy is of the teacher's samples."
    )
    cached = [_CACHED[name] for _, name in measures if name in _CACHED]
    section = Section("closeness", "Closeness to the teacher", [text, *cached])
    rows = [
        [KL_NAMES[name], places[mode], *(_value(modes.get(mode, {}).get(name)) for modes in metrics.values())]
        for mode, name in measures
    ]
    section.tables.append(Table(["measure", "on", *metrics], rows))
    if kept := evaluation.get("kept_mass"):
        section.texts.append(
            f"The {kept['k']} tokens that the cache keeps at a position have {kept['mean']:.3f} of the teacher's "
            f"probability in the mean, and {kept['worst_tenth']:.3f} in the worst tenth of the positions."
        )
        if warning := kept_mass_warning(kept):
            section.texts.append(f"{warning[0].upper()}{warning[1:]}.")
    return section


def _value(interval: dict | None, sign: str = "") -> str:
    return say_interval(interval, ".3f", sign) if interval else "-"


def diversity(evaluation: dict) -> Section:
    """Quality against diversity of the sampled answers, how long answers are, and how many were cut."""
    metrics, metric = evaluation["metrics"], headline_metric(evaluation)
    text = "Of several sampled answers to each prompt. Lower Self-BLEU and higher distinct-n mean more diverse."
    section = Section("diversity", "Quality and diversity", [text])
    rows = []
    for model, modes in metrics.items():
        of = modes["diversity"]
        numbers = f"{of['distinct_1']:.2f}", f"{of['distinct_2']:.2f}", f"{of['self_bleu']:.1f}"
        rows.append([model, say_interval(modes["sampled"][metric]), *numbers])
    section.tables.append(Table(["model", f"{metric}, sampled", "distinct-1", "distinct-2", "Self-BLEU"], rows))
    if lengths := evaluation.get("answers"):
        columns = ["model", "tokens, greedy", "cut, greedy", "tokens, sampled", "cut, sampled"]
        rows = [
            [model, *(cell for mode in ("greedy", "sampled")
                      for cell in (f"{modes[mode]['tokens']:.1f}", f"{modes[mode]['cut']:.1%}"))]
            for model, modes in lengths.items()
        ]  # fmt: skip
        section.tables.append(Table(columns, rows, "Length of the answers, and the share that max_tokens cut"))
    points = {
        model: (modes["diversity"]["self_bleu"], modes["sampled"][metric]["value"]) for model, modes in metrics.items()
    }
    caption = f"{metric} of sampled answers against their Self-BLEU: up and to the left is better"
    section.figures.append(Figure(figures.trade_off(points, "Self-BLEU", f"{metric}, sampled"), caption))
    return section


def beside(experiments: Sequence[Experiment]) -> Section | None:
    """Students of several experiments in one table; None where there is one experiment."""
    if len(experiments) < 2:
        return None
    metric = experiments[0].headline
    section = Section("beside", "Side by side", ["Several experiments; a model that they share is shown once."])
    if differ(experiments):
        section.texts.append("These results are of different prompts, tasks or teachers: their numbers do not compare.")
    rows = [scored for scored in models_of(experiments) if metric in scored.modes["greedy"]]
    columns = ["result", "model", "objective", metric, f"{metric}, sampled", "KL(T‖S)", "KL(S‖T)", "Self-BLEU"]
    section.tables.append(Table(columns, [_beside(scored, metric) for scored in rows]))
    named = {_name(scored): scored.modes for scored in rows}
    kls = {name: modes.get("heldout", {}).get("kl") for name, modes in named.items()}
    section.figures += _intervals(named, metric, kls, "kl")
    return section


def _beside(scored: Scored, metric: str) -> list[str]:
    modes = scored.modes
    return [
        scored.experiment.name,
        scored.model,
        scored.experiment.objective_of(scored.model) or "-",
        say_interval(modes["greedy"][metric]),
        say_interval(modes["sampled"][metric]),
        *(_value(modes.get("heldout", {}).get(name)) for name in ("kl", "reverse_kl")),
        f"{modes['diversity']['self_bleu']:.1f}",
    ]


def _name(scored: Scored) -> str:
    """For figures, where there is little room."""
    name = f"{Path(scored.experiment.name).name}: {scored.experiment.objective_of(scored.model) or scored.model}"
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"

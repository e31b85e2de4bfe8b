"""The page's part about rounds: what the student's own samples took, and how close and how good it was at each."""

from collections.abc import Mapping

from pydantic import ValidationError

from pipeline.params import Distill
from stages.report import figures
from stages.report.page import Figure, Section, Table
from stages.report.results import COUNTS, ROUND

STUDENTS = {"distilled": "distill", "plain": "plain-metrics"}  # whose rounds are shown, by their name on the page
WORDS = {
    "round": "the student answers prompts anew, the teacher scores the answers, and the steps up to the next round "
    "learn from them",
    "teacher's states, own states": "the positions that a model is asked at: in samples of the teacher, or in the "
    "student's own, as when it is used",
    "unbiased, bound": "a number whose mean over many samples is the exact one; one that is at most the exact one",
}
_KLS = {"KL(T‖S)": ("kl", "own_kl"), "KL(S‖T)": ("reverse_kl", "own_reverse_kl")}
_STATES = {"kl": "teacher's states", "reverse_kl": "teacher's states, bound"}  # the others: own states
_SCORES = {
    "store": "The store keeps the teacher's scores of them.",
    "live": "A teacher in memory scores them, on its kept tokens; a line below has what came since the one above.",
    "dense": "A teacher in memory gives its whole distribution; a line below has what came since the one above.",
}


def rounds_of(results: Mapping[str, dict]) -> dict[str, list[dict]]:
    """The rounds of the students that have any."""
    rounds = {student: results[name].get("rounds") for student, name in STUDENTS.items()}
    return {student: found for student, found in rounds.items() if found}


def own_samples(results: Mapping[str, dict]) -> Section | None:
    """None where no student learned from its own samples."""
    if not (rounds := rounds_of(results)):
        return None
    settings = {student: _setting(results[STUDENTS[student]]["provenance"]) for student in rounds}
    texts = list(dict.fromkeys(settings.values()))
    if len(texts) > 1:
        texts = [f"{student[0].upper()}{student[1:]}: {text}" for student, text in settings.items()]
    section = Section("own-samples", "On the student's own samples", texts)
    measured = {name for found in rounds.values() for each in found for name in each} - set(ROUND)
    if measured:
        section.texts.append(_meanings(measured, results["evaluation"]))
    for student, found in rounds.items():
        rows = [[f"{each['step']:,.0f}", *(f"{each[name]:,.0f}" for name in COUNTS)] for each in found]
        columns = ["step", *COUNTS.values()]
        section.tables.append(Table(columns, rows, f"Rounds of the {student} student, held-out samples included"))
    section.figures = _figures(rounds, measured)
    return section


def _setting(provenance: Mapping) -> str:
    """Who answered what when, in sentences."""
    try:
        settings = Distill.model_validate(provenance.get("parameters"))
    except ValidationError:
        settings = None
    if settings is None or (chosen := settings.rounds) is None:
        return "The parameters, in the provenance below, are those of another version."
    rhythm, steps = f"{chosen.refreshes} times in", f"{settings.optimisation.steps:,} steps"
    if chosen.every:
        rhythm = f"every {chosen.every:,} of" if chosen.every > 1 else "at each of"
    asked = f"at most {chosen.prompts:,} each time" if chosen.prompts else "as many as the steps learn from"
    samples = f"{chosen.samples} sample{'s' if chosen.samples > 1 else ''} per prompt"
    cut = f", of at most {chosen.horizon:,} tokens" if chosen.horizon else ""
    rows = "Every row is" if chosen.share == 1 else f"With probability {chosen.share:g} a row is"
    replay = f", of this round or of the {chosen.replay:,} before it" if chosen.replay else ""
    other = "a reference" if settings.learns_references else "one of the teacher's"
    data = "" if chosen.share == 1 else f", else {other}"
    return (
        f"The student answers prompts of the split {chosen.split} {rhythm} {steps}: {asked}, {samples}, at temperature "
        f"{chosen.temperature:g}{cut}. {rows} such a sample{replay}{data}. {_SCORES[chosen.scores]}"
    )


def _meanings(measured: set[str], evaluation: Mapping) -> str:
    """What each measure is, of those that there are."""
    text = "Measured on held-out prompts, KL in nats per token; own states are those of one sample at temperature 1."
    if "own_reverse_kl" in measured:
        text += " KL(S‖T) on own states is unbiased, from the probability of the sampled tokens alone."
    if measured & {"kl", "own_kl"}:
        known = {name for modes in evaluation["metrics"].values() for name in modes.get("heldout", {})}
        if "kl_estimate" in known:
            text += " KL(T‖S) is unbiased, as the kept tokens are sampled."
        elif "kl_bound" in known:
            text += " KL(T‖S) is a lower bound, as the kept tokens are a plain top k."
        else:
            text += " KL(T‖S) is unbiased where the kept tokens are sampled, and a lower bound of a plain top k."
    if "reverse_kl" in measured:
        text += " KL(S‖T) on the teacher's states is a lower bound."
    return text


def _figures(rounds: Mapping[str, list[dict]], measured: set[str]) -> list[Figure]:
    """Every measure over the steps, of all students together."""
    drawn = []
    for kl, names in _KLS.items():
        curves = _curves(rounds, {name: _STATES.get(name, "own states") for name in names})
        drawn.append((curves, "nats per token", f"{kl} on the teacher's states and on the student's own"))
    for metric in sorted(name.removeprefix("sampled_") for name in measured if name.startswith("sampled_")):
        curves = _curves(rounds, {metric: "greedy", f"sampled_{metric}": "sampled"})
        drawn.append((curves, metric, f"{metric} of greedy and of sampled answers"))
    curves = _curves(rounds, {"distinct_2": ""})
    drawn.append((curves, "distinct-2", "distinct-2 of sampled answers: higher is more diverse"))
    return [Figure(figures.lines(curves, "step", label), caption) for curves, label, caption in drawn if curves]


def _curves(rounds: Mapping[str, list[dict]], names: Mapping[str, str]) -> dict[str, tuple[list, list]]:
    """Steps and values, by student and by what is measured (name in a round -> name in the figure, if it needs one)."""
    curves = {}
    for student, found in rounds.items():
        for name, what in names.items():
            if points := [(each["step"], each[name]) for each in found if name in each]:
                curves[f"{student}, {what}" if what else student] = tuple(map(list, zip(*points, strict=True)))
    return curves

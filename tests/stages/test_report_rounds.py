"""What holds for the page's part about rounds of the student's own samples."""

import base64
import json
import re
from html import unescape
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.params import Distill, Report
from pipeline.params.file import load_params
from stages.distill import distill
from stages.evaluate import evaluate
from stages.report import report
from tests.cli.test_comparison import interval
from tests.cli.test_comparison import write as write_results
from tests.conftest import make_params

EVIL = "<script>alert(1)</script>"
COUNTS = {
    "samples_found": 12, "samples_drawn": 1234, "rows_found": 34, "rows_scored": 567, "tokens_scored": 8901,
    "seconds_drawing": 21.4, "seconds_scoring": 43.2,
}  # fmt: skip
BOUND = "KL(S‖T) on the teacher's states is a lower bound."


def rounds(*steps: int, metric: str = "rouge2", measured: bool = True) -> list[dict]:
    measures = {
        "kl": 0.2, "reverse_kl": 0.3, "own_kl": 0.4, "own_reverse_kl": 0.5, metric: 20.0, f"sampled_{metric}": 10.0,
        "distinct_2": 0.6,
    }  # fmt: skip
    falling = [{name: value / (number + 1) for name, value in measures.items()} for number in range(len(steps))]
    return [
        {"round": number, "step": step} | COUNTS | (falling[number] if measured else {})
        for number, step in enumerate(steps)
    ]


def settings(*overrides: str) -> dict:
    """The parameters of a distillation as its results have them."""
    given = [f"distill.{each}" for each in overrides]
    return load_params(None, ["distill.reward=none", *given]).distill.model_dump()


def write(folder: Path, found: list[dict] | None, name: str = "distill", parameters: dict | None = None) -> Path:
    """Results of a distillation with these rounds."""
    cost = {"seconds": 600.0} | ({"seconds_drawing": 4321.0, "seconds_scoring": 8765.0} if found else {})
    results = {"objective": "jsd(0.5)", "samples": 10, "cost": cost, "provenance": {"parameters": parameters}}
    (folder / name).mkdir(exist_ok=True)
    path = folder / name / "results.json"
    path.write_text(json.dumps(results | ({} if found is None else {"rounds": found})))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write_results(tmp_path / "data", 30.0, "jsd(0.5)")


def page_of(data: Path) -> str:
    report(Report(), Layout(data=data), data / "report.html")
    return (data / "report.html").read_text()


def section_of(page: str) -> str:
    return re.search(r'<section id="own-samples">(.*?)</section>', page, re.S)[1]


def cells_of(section: str) -> list[list[str]]:
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section) if "<td>" in row]


def figures_of(section: str) -> dict[str, list[str]]:
    """Every figure's texts, by its caption."""
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', section)
    texts = [re.findall(r"<text[^>]*>([^<]*)", base64.b64decode(svg).decode()) for svg, _ in found]
    return {unescape(caption): list(map(unescape, of)) for (_, caption), of in zip(found, texts, strict=True)}


def test_a_page_without_rounds_says_nothing_of_them(data):
    """None from before there were rounds, an empty list since."""
    pages = []
    for found in (None, []):
        for name in ("distill", "plain-metrics"):
            write(data, found, name)
        pages.append(page_of(data))
    assert pages[0] == pages[1]
    assert "own-samples" not in pages[0] and "own states" not in pages[0] and "rounds" not in pages[0]


def test_every_round_and_every_measure_of_both_students_is_shown(data):
    parameters = settings("on_policy.refreshes=2", "optimisation.steps=200")
    write(data, rounds(0, 100, 200), parameters=parameters)
    write(data, rounds(0, 200), "plain-metrics", parameters)
    page = page_of(data)
    section = section_of(page)
    counts = ["1,234", "12", "567", "34", "8,901", "21", "43"]
    assert cells_of(section) == [[step, *counts] for step in ("0", "100", "200", "0", "200")]
    assert section.count("The student answers prompts of the split train 2 times in 200 steps") == 1
    assert "Rounds of the distilled student" in section and "Rounds of the plain student" in section
    figures = figures_of(section)
    for caption, label, curves in (
        ("KL(T‖S) on the", "nats per token", ("teacher's states", "own states")),
        ("KL(S‖T) on the", "nats per token", ("teacher's states, bound", "own states")),
        ("rouge2 of", "rouge2", ("greedy", "sampled")),
        ("distinct-2 of", "distinct-2", ("",)),
    ):
        (texts,) = [texts for whole, texts in figures.items() if whole.startswith(caption)]
        legend = [f"{student}, {curve}".removesuffix(", ") for student in ("distilled", "plain") for curve in curves]
        assert texts[-len(legend) :] == legend and {label, "step"} <= set(texts)
    assert len(figures) == 4
    for student in ("distill", "plain"):
        assert f"<td>{student}, drawing samples in its rounds</td><td>4,321</td>" in page
        assert f"<td>{student}, having them scored in its rounds</td><td>8,765</td>" in page
    assert "<td>teacher&#39;s states, own states</td>" in page


def test_only_the_student_that_has_rounds_and_only_what_was_measured_is_shown(data):
    write(data, None)
    found = rounds(0, 10, 20)
    for name in ("kl", "reverse_kl", "own_kl"):  # a teacher without kept tokens
        for each in found:
            del each[name]
    del found[1]["own_reverse_kl"]
    write(data, found, "plain-metrics")
    section = section_of(page_of(data))
    assert "distilled" not in section and "KL(T‖S)" not in section and BOUND not in unescape(section)
    figures = figures_of(section)
    assert [caption.split()[0] for caption in figures] == ["KL(S‖T)", "rouge2", "distinct-2"]
    assert "teacher's states, bound" not in str(figures)
    write(data, rounds(0, 10, measured=False), "plain-metrics")
    section = section_of(page_of(data))
    assert len(cells_of(section)) == 2 and "<img" not in section and "Measured" not in section


@pytest.mark.parametrize(
    ("measure", "sentence"),
    [
        ("kl_estimate", "KL(T‖S) is unbiased, as the kept tokens are sampled."),
        ("kl_bound", "KL(T‖S) is a lower bound, as the kept tokens are a plain top k."),
        ("kl", "KL(T‖S) is unbiased where the kept tokens are sampled, and a lower bound of a plain top k."),
    ],
)
def test_it_is_said_which_measures_are_unbiased_and_which_are_bounds(data, measure, sentence):
    path = data / "evaluation" / "results.json"
    evaluation = json.loads(path.read_text())
    for modes in evaluation["metrics"].values():
        modes["heldout"][measure] = interval(0.1)
    path.write_text(json.dumps(evaluation))
    write(data, rounds(0, 10))
    text = unescape(section_of(page_of(data)))
    assert sentence in text and BOUND in text and "KL(S‖T) on own states is unbiased" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["on_policy.every=5", "on_policy.prompts=20"], "every 5 of 1,600 steps: at most 20 each time, 1"),
        (
            ["on_policy.refreshes=4", "on_policy.samples=3", "on_policy.temperature=0.8", "on_policy.horizon=16"],
            "4 times in 1,600 steps: as many as the steps learn from, 3 samples per prompt, at temperature 0.8, of at "
            "most 16 tokens. Every row is such a sample. The store",
        ),
        (["on_policy.refreshes=4", "on_policy.replay=2"], "such a sample, of this round or of the 2 before it. The"),
        (["objective=gkd"], "at each of 1,600 steps: as many"),
        (
            ["objective=gkd"],
            "a row is such a sample, else one of the teacher's. A teacher in memory scores",
        ),
        (["objective=minillm"], "a row is such a sample, else a reference. The store keeps"),
        (["on_policy.every=1", "on_policy.scores=dense"], "A teacher in memory gives its whole distribution"),
        (["on_policy.every=1", "on_policy.split=student"], "prompts of the split student at each of"),
    ],
)
def test_the_setting_is_that_of_the_parameters(data, overrides, words):
    write(data, rounds(0, 10), parameters=settings(*overrides))
    assert words in unescape(section_of(page_of(data)))


def test_students_of_different_settings_have_a_sentence_each(data):
    write(data, rounds(0, 10), parameters=settings("on_policy.refreshes=2"))
    write(data, rounds(0, 10), "plain-metrics", settings("on_policy.refreshes=3"))
    section = section_of(page_of(data))
    assert "Distilled: The student answers prompts of the split train 2 times" in section
    assert "Plain: The student answers prompts of the split train 3 times" in section


@pytest.mark.parametrize("parameters", [None, {"of_another_version": 1}, Distill().model_dump()])
def test_parameters_of_another_version_are_no_obstacle(data, parameters):
    write(data, rounds(0, 10), parameters=parameters)
    assert "are those of another version" in section_of(page_of(data))


def test_names_in_rounds_are_escaped(data):
    write(data, rounds(0, 10, metric=EVIL))
    page = page_of(data)
    assert EVIL not in page and EVIL in unescape(section_of(page))


@pytest.mark.parametrize(
    "found", [7, [3], [{}], [{"step": 0}], [rounds(0)[0] | {"kl": "low"}], [rounds(0)[0] | {"step": None}], {"step": 1}]
)
def test_broken_rounds_are_refused_by_file(data, found):
    path = write(data, found)
    with pytest.raises(UserError, match=re.escape(f"{path} holds no results of `xkd-pipeline distill`: rounds")):
        page_of(data)


def test_a_student_that_learned_from_its_own_samples_has_its_numbers_on_the_page(cache, teacher, student, tmp_path):
    params = make_params(
        teacher, "prepare.task=summarisation", "distill.reward=none", "distill.objective=jsd",
        "distill.on_policy.refreshes=2",
    )  # fmt: skip
    paths = cache / "selection", student, None, tmp_path / "student", tmp_path / "distill", tmp_path / "runs"
    distill(params, *paths, cache / "store", None, cache / "prompts.parquet")
    models = {"undistilled": student, "distilled": tmp_path / "student"}
    evaluate(params, cache / "prompts.parquet", models, cache / "selection", tmp_path / "evaluation")
    section = section_of(page_of(tmp_path))
    found = json.loads((tmp_path / "distill" / "results.json").read_text())["rounds"]
    assert [each["step"] for each in found] == [0, 5, 10]
    assert cells_of(section) == [
        [f"{each[name]:,.0f}" for name in (
            "step", "samples_drawn", "samples_found", "rows_scored", "rows_found", "tokens_scored", "seconds_drawing",
            "seconds_scoring",
        )]
        for each in found
    ]  # fmt: skip
    text = unescape(section)
    assert "2 times in 10 steps" in text and "The store keeps" in text and BOUND in text
    assert "KL(T‖S) is unbiased, as the kept tokens are sampled." in text
    assert [caption.split()[0] for caption in figures_of(section)] == ["KL(T‖S)", "KL(S‖T)", "rouge2", "distinct-2"]

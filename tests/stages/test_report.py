"""What holds for the report: whole, self-contained, escaped, and true to the files it is made of."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.params import Report
from pipeline.store.selection import Selection
from stages.distill import distill
from stages.evaluate import evaluate
from stages.report import report
from tests.conftest import make_model, make_params

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def data(cache, fitted, teacher, student, tmp_path_factory) -> Path:
    """A folder as the stages leave it, with a model whose name and answers are hostile."""
    folder = tmp_path_factory.mktemp("data")
    params = make_params(teacher, "prepare.task=summarisation")
    shutil.copytree(cache / "selection", folder / "teacher")
    shutil.copytree(fitted, folder / "reward")
    shutil.copytree(cache / "audit", folder / "audit")
    shutil.copytree(student, folder / "models" / "student")
    distill(params, folder / "teacher", student, fitted, folder / "student", folder / "distill", folder / "runs")
    models = {EVIL: teacher, "undistilled": student, "distilled": folder / "student"}
    paths = cache / "prompts.parquet", models, folder / "teacher", folder / "evaluation"
    evaluate(params, *paths, answers_path=cache / "answers")
    path = folder / "evaluation" / "predictions.parquet"
    pl.read_parquet(path).with_columns(response=pl.col("response") + EVIL).write_parquet(path)
    return folder


@pytest.fixture(scope="module")
def page(data) -> str:
    report(Report(), Layout(data=data), data / "report.html")
    return (data / "report.html").read_text()


class Parsed(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_nothing_from_models_or_data_becomes_markup(page):
    parsed = Parsed(page)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "iframe", "object", "form")]
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    assert EVIL in parsed.text and EVIL not in page


def test_the_page_loads_nothing(page):
    parsed = Parsed(page)
    sources = [attrs[name] for _, attrs in parsed.tags for name in ("src", "href") if name in attrs]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"url\(|@import|https?://", re.sub(r'src="data:[^"]*"', "", page))
    assert "default-src 'none'" in page


def test_every_section_is_there_and_its_numbers_are_those_of_the_files(page, data):
    parsed = Parsed(page)
    assert {attrs["id"] for tag, attrs in parsed.tags if tag == "section"} == {
        "setting", "quality", "closeness", "diversity", "training", "reward", "samples", "costs", "glossary",
        "provenance",
    }  # fmt: skip
    evaluation = json.loads((data / "evaluation" / "results.json").read_text())
    for modes in evaluation["metrics"].values():
        for mode, names in (("heldout", ("kl", "reverse_kl", "kl_estimate", "cross_entropy")), ("own", ("kl",))):
            for name in names:
                kl = modes[mode][name]
                assert f"{kl['value']:.3f} [{kl['low']:.3f}, {kl['high']:.3f}]" in parsed.text
    for model, parameters in evaluation["parameters"].items():
        assert f"{parameters:,} parameters" in parsed.text
        cut = evaluation["answers"][model]["greedy"]["cut"]
        assert f"{cut:.1%}" in parsed.text
    assert f"{evaluation['kept_mass']['mean']:.3f} of the teacher's" in parsed.text
    assert evaluation["provenance"]["date"] in parsed.text
    for word in ("sarsa, soft", "c", "phi_kl", "lam, lam_eff"):
        assert f">{word}</td>" in page
    assert evaluation["provenance"]["versions"]["torch"] in parsed.text
    assert f"{json.loads((data / 'distill' / 'results.json').read_text())['cost']['seconds']:,.0f}" in parsed.text


def test_the_reward_is_drawn_over_every_token_of_a_response_of_each_kind(page, data):
    parsed = Parsed(page)
    titled = [attrs["title"] for tag, attrs in parsed.tags if tag == "span" and "title" in attrs]
    rewards = pl.read_parquet(data / "reward" / "soft" / "rewards.parquet")
    rows = {row.key: row for part in ("validation", "scored") for row in Selection(data / "teacher").rows(part)}
    prompts = {row.prompt_id for row in rows.values()}
    first = next(row for row in rows.values() if row.origin == "corrupted" and row.prompt_id in prompts)
    mu, log_sigma = rewards.filter(pl.col("key") == first.key).select("mu", "log_sigma").row(0)
    assert len(mu) == len(first.response_ids) == len(log_sigma)
    assert all(re.fullmatch(r"mu -?\d+\.\d\d, sigma \d+\.\d\d", title) for title in titled)
    assert {origin for origin in ("teacher", "reference", "corrupted") if f"{origin}, mean reward" in parsed.text} == {
        "teacher", "reference", "corrupted",
    }  # fmt: skip
    shown = {row.key for row in rows.values()} & set(rewards["key"])
    assert len(titled) >= 3 * 3 * min(len(rows[key].response_ids) for key in shown)


def test_answers_are_drawn_at_random_and_from_the_failures_and_marked(data, tmp_path):
    """A checked task: every second prompt is answered rightly by all models, and no answer is right elsewhere."""
    copy = shutil.copytree(data, tmp_path / "data")
    path = copy / "evaluation" / "predictions.parquet"
    frame = pl.read_parquet(path)
    ids = frame["prompt_id"].unique(maintain_order=True).to_list()
    right = pl.when(pl.col("prompt_id").is_in(ids[::2])).then(100.0).otherwise(0.0)
    both = pl.lit(["first reference", "second reference"])
    frame.with_columns(score=right, prompt=pl.col("prompt_id"), references=both).write_parquet(path)
    results = json.loads((copy / "evaluation" / "results.json").read_text())
    (copy / "evaluation" / "results.json").write_text(json.dumps(results | {"checked": True}))
    report(Report(samples=6), Layout(data=copy), tmp_path / "page.html")
    text = Parsed((tmp_path / "page.html").read_text()).text
    assert text.count("first reference") == text.count("second reference") == 6
    shown = re.findall(r"prompt, (drawn at random|distilled fails, or does worst)\s*(\w+)", text)
    assert len({identity for _, identity in shown}) == 6
    failing = [identity for why, identity in shown if why.startswith("distilled")]
    assert len(failing) == 3 and set(failing) <= set(ids[1::2])
    wrong = sum(identity in ids[1::2] for _, identity in shown)
    marks = re.findall(r">(right|wrong)(?:, cut)?</b>", (tmp_path / "page.html").read_text())
    assert marks.count("wrong") == 3 * wrong and marks.count("right") == 3 * (6 - wrong)


def test_students_of_several_experiments_are_shown_side_by_side(data, cache, teacher, tmp_path):
    """A folder of another student of the same teacher, and one on other prompts, which is said."""
    params = make_params(teacher, "prepare.task=summarisation")
    paths = cache / "selection", tmp_path / "other" / "evaluation"
    other = make_model(tmp_path / "model", seed=9, width=32, layers=1)
    evaluate(params, cache / "prompts.parquet", {"jsd": other}, *paths)
    report(Report(), Layout(data=data), tmp_path / "page.html", also=[str(tmp_path / "other")])
    page = (tmp_path / "page.html").read_text()
    section = re.search(r'<section id="beside">(.*?)</section>', page, re.S)[1]
    results = json.loads((data / "evaluation" / "results.json").read_text())
    for model in ("undistilled", "distilled"):
        value = results["metrics"][model]["heldout"]["kl"]
        assert f"<td>{model}</td>" in section and f"{value['value']:.3f} [" in section
    assert str(tmp_path / "other") in section and "do not compare" not in section
    path = tmp_path / "other" / "evaluation" / "results.json"
    path.write_text(path.read_text().replace(results["provenance"]["prompts"], "others"))
    report(Report(), Layout(data=data), tmp_path / "page.html", also=[str(tmp_path / "other")])
    assert "do not compare" in (tmp_path / "page.html").read_text()


def test_the_same_files_give_the_same_page(page, data, tmp_path):
    report(Report(), Layout(data=data), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_what_is_missing_is_left_out_and_without_an_evaluation_there_is_no_report(page, data, tmp_path, capsys):
    partial = tmp_path / "data"
    shutil.copytree(data / "evaluation", partial / "evaluation")
    report(Report(samples=0), Layout(data=partial), tmp_path / "partial.html")
    assert "left out of the report" in capsys.readouterr().err
    sections = {attrs.get("id") for tag, attrs in Parsed((tmp_path / "partial.html").read_text()).tags}
    assert {"quality", "diversity"} <= sections and not {"training", "reward", "samples", "beside"} & sections
    with pytest.raises(UserError, match="no evaluation at"):
        report(Report(), Layout(data=tmp_path / "nothing"), tmp_path / "none.html")

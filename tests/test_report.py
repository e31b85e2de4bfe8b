"""What holds for the report: whole, self-contained, escaped, and true to the files it is made of."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import UserError
from pipeline.params import Report
from pipeline.shards.selection import Selection
from stages.distill import distill
from stages.evaluate import evaluate
from stages.report import report
from tests.conftest import make_params

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
    evaluate(params, cache / "prompts.parquet", models, folder / "teacher", folder / "evaluation")
    path = folder / "evaluation" / "predictions.parquet"
    pl.read_parquet(path).with_columns(response=pl.col("response") + EVIL).write_parquet(path)
    return folder


@pytest.fixture(scope="module")
def page(data) -> str:
    report(Report(), data, data / "report.html")
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
        "quality", "diversity", "training", "reward", "samples", "costs", "provenance",
    }  # fmt: skip
    evaluation = json.loads((data / "evaluation" / "results.json").read_text())
    for modes in evaluation["metrics"].values():
        kl = modes["heldout"]["kl_to_teacher"]
        assert f"{kl['value']:.3f} [{kl['low']:.3f}, {kl['high']:.3f}]" in parsed.text
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


def test_the_same_files_give_the_same_page(page, data, tmp_path):
    report(Report(), data, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_what_is_missing_is_left_out_and_without_an_evaluation_there_is_no_report(page, data, tmp_path, capsys):
    partial = tmp_path / "data"
    shutil.copytree(data / "evaluation", partial / "evaluation")
    report(Report(samples=0), partial, tmp_path / "partial.html")
    assert "left out of the report" in capsys.readouterr().err
    sections = {attrs.get("id") for tag, attrs in Parsed((tmp_path / "partial.html").read_text()).tags}
    assert {"quality", "diversity"} <= sections and not {"training", "reward", "samples"} & sections
    with pytest.raises(UserError, match="no evaluation at"):
        report(Report(), tmp_path / "nothing", tmp_path / "none.html")

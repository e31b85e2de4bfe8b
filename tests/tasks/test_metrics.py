"""What holds for metrics: each scores real data as its reference tool does, greedy and over several samples."""

import json
from functools import cache
from random import Random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from pipeline.tasks import TASKS, get_task
from pipeline.tasks.metrics import Metric, bleu, chrf, rouge
from pipeline.tasks.shipped.gsm8k import flexible, strict, target
from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the data sets lie beside the project, not in it")


@cache
def read(file: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


@cache
def summaries() -> tuple[list[list[str]], list[list[str]]]:
    """(samples, references) of 150 papers: a reference that is not among the latter, the first sentence, a title."""
    papers = [row for row in read("scitldr/test.jsonl") if len(row["target"]) > 1][:150]
    samples = [[row["target"][0], row["source"][0].strip(), row["target"][0].lower()[:60]] for row in papers]
    return samples, [row["target"][1:] for row in papers]


def pairs() -> tuple[list[str], list[list[str]]]:
    """All pairs of a sample and its references, one below the other."""
    samples, references = summaries()
    return [text for row in samples for text in row], [refs for refs in references for _ in range(3)]


def streams(references: list[list[str]]) -> list[list[str | None]]:
    """References as sacrebleu reads them: the first of every segment, the second ones, ..."""
    return [[refs[i] if i < len(refs) else None for refs in references] for i in range(max(map(len, references)))]


# ROUGE


@needs_data
@pytest.mark.parametrize("stemmer", [True, False])
@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_rouge_score(name, stemmer):
    texts, references = pairs()
    scorer = RougeScorer([name], use_stemmer=stemmer)
    expected = [scorer.score_multi(refs, text)[name].fmeasure for text, refs in zip(texts, references, strict=True)]
    (metric,) = [metric for metric in get_task("summarisation", stemmer).metrics if metric.name == name]
    assert metric(texts, references) == pytest.approx(100 * np.mean(expected), abs=1e-9)
    samples, each = summaries()
    assert metric.score(metric.pooled(samples, each).mean(axis=0)) == pytest.approx(100 * np.mean(expected), abs=1e-9)


def test_rouge_is_stemmed_unless_told_otherwise_and_says_so():
    answer, reference = ["the models are learning"], [["the model learns"]]
    assert rouge("rouge1")(answer, reference) > rouge("rouge1", stemmer=False)(answer, reference)
    assert get_task("summarisation") is TASKS["summarisation"]
    assert "stemmer:Porter" in get_task("summarisation").metrics[0].signature(reference)
    assert "stemmer:none" in get_task("summarisation", stemmer=False).metrics[0].signature(reference)


# BLEU and chrF


@needs_data
@pytest.mark.parametrize(("metric", "tool"), [(bleu(), sacrebleu.BLEU()), (chrf(), sacrebleu.CHRF())])
def test_bleu_and_chrf_are_those_of_sacrebleu_with_its_signature(metric, tool):
    samples, references = summaries()
    first = [row[0] for row in samples]
    expected = tool.corpus_score(first, streams(references)).score
    assert metric(first, references) == pytest.approx(expected, abs=1e-9) and expected > 5
    assert metric.signature(references) == str(tool.get_signature()) and "nrefs:var" in metric.signature(references)


@needs_data
@pytest.mark.parametrize(("metric", "tool"), [(bleu(), sacrebleu.BLEU()), (chrf(), sacrebleu.CHRF())])
def test_the_score_of_several_samples_is_that_of_all_pairs_in_one_corpus(metric, tool):
    """Averaged over the samples and rounded, the counts of five prompts gave another BLEU by up to 1.4 points."""
    samples, references = summaries()
    for count in (5, 150):
        texts, repeated = (part[: 3 * count] for part in pairs())
        expected = tool.corpus_score(texts, streams(repeated)).score
        statistics = metric.pooled(samples[:count], references[:count])
        assert statistics.shape[0] == count
        assert metric.score(statistics.mean(axis=0)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("metric", "tool"), [(bleu(), sacrebleu.BLEU(force=True)), (chrf(), sacrebleu.CHRF())])
def test_counts_of_zero_are_smoothed_as_sacrebleu_does(metric, tool):
    samples, references = [["a b x", "a y b c"], ["d e", "z"]], [["a b c d"], ["d e f"]]
    expected = tool.corpus_score([text for row in samples for text in row], [["a b c d"] * 2 + ["d e f"] * 2]).score
    assert metric.score(metric.pooled(samples, references).mean(axis=0)) == pytest.approx(expected, abs=1e-9) != 0


# GSM8K


@pytest.mark.parametrize(
    ("response", "by_strict", "by_flexible"),
    [
        ("3 + 4 = 7\n#### 7", "7", "7"),
        ("so it is -$5", None, "-5"),
        ("#### -$5", None, "-5"),
        ("#### .5", ".5", ".5"),
        ("#### 18 ####", "18", "18"),
        ("#### 1.000.000", "1.000.000", "1.000.000"),
        ("#### 1,200.00", "1200.00", "1200.00"),
        ("#### $1,200", None, "1200"),
        ("#### 3 and #### 4", "3", "4"),
        ("####7", None, "7"),
        ("The total is $1,234.50.", None, "1234.50"),
        ("first 3, then 5 apples.", None, "5"),
        ("it is 18...", None, "18.."),
        ("no number", None, None),
    ],
)
def test_the_answer_of_a_word_problem_is_what_lm_eval_takes(response, by_strict, by_flexible):
    assert (strict(response), flexible(response)) == (by_strict, by_flexible)


def test_answers_are_compared_with_what_follows_the_mark_of_a_reference():
    assert target("9 * 2 = $<<9*2=18>>18\n#### 1,018") == "1018" == target("$1,018.")
    task = TASKS["gsm8k"]
    assert [metric.name for metric in task.metrics] == ["accuracy", "flexible"]
    assert task.accepts("#### 18", ["#### 18"]) and not task.accepts("it is 18", ["#### 18"])
    assert task.metrics[1](["it is 18", "it is 18.0"], [["#### 18"], ["#### 18"]]) == 50


def word_problem_answers() -> tuple[list[str], list[str]]:
    """(responses, references): the test answers in the forms that models give them in, right and wrong."""
    rows, rng = read("gsm8k/test.jsonl"), Random(0)
    responses = []
    for row in rows:
        steps, _, number = row["answer"].rpartition("#### ")
        wrong = rng.choice(rows)["answer"].rpartition("#### ")[2]
        forms = (
            "{steps}#### {number}", "{steps}#### {wrong}", "{steps}####{number}", "{steps}The answer is {number}.",
            "The answer is ${number}", "{steps}#### ${number}.00", "{steps}#### {number}.", "-${number}", "{steps}",
            "{steps}#### {number} ####", "#### {wrong}\n\n{steps}#### {number}", "#### -{number}", "**{number}**...",
        )  # fmt: skip
        responses.append(rng.choice(forms).format(steps=steps, number=number, wrong=wrong))
    return responses, [row["answer"] for row in rows]


@needs_data
@pytest.mark.parametrize(
    ("metric", "settings"),
    zip(
        TASKS["gsm8k"].metrics,
        (
            {"regex_pattern": r"#### (\-?[0-9\.\,]+)"},
            {"regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1},
        ),
        strict=True,
    ),
    ids=("strict-match", "flexible-extract"),
)
def test_word_problems_are_judged_as_by_lm_eval(metric: Metric, settings):
    """The filters of lm-eval's task gsm8k, version 3.0, and its exact match, with the settings of its YAML file."""
    filters = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    responses, references = word_problem_answers()
    extracted = [found for (found,) in filters.RegexFilter(**settings).apply([[text] for text in responses], [])]
    ignored = [",", r"\$", "(?s).*#### ", r"\.$"]
    expected = [
        metrics.exact_match_hf_evaluate([found], [reference], ignored, ignore_case=True)["exact_match"]
        for found, reference in zip(extracted, references, strict=True)
    ]
    found = metric.statistics(responses, [[reference] for reference in references])[:, 0]
    np.testing.assert_array_equal(found, expected)
    assert 0.2 < np.mean(expected) < 0.8

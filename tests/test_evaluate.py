"""What holds for evaluation: models side by side, paired, with everything that results were made of."""

import json

import polars as pl
import pytest

from pipeline.errors import UserError
from stages.bootstrap import say_interval
from stages.evaluate import _report, evaluate
from tests.conftest import WORDS, make_model, make_params, make_prompts


@pytest.fixture(scope="module")
def results(cache, teacher, student):
    models = {"teacher": teacher, "student": student, "same": student}
    params = make_params(teacher, "evaluate.sampled_prompts=6")
    return evaluate(params, cache / "prompts.parquet", models, cache / "selection", cache / "evaluation")


def test_a_model_compared_with_itself_differs_by_exactly_nothing(results):
    same = results["differences"]["student"]
    for mode, metric in (("greedy", "accuracy"), ("sampled", "accuracy"), ("heldout", "kl_to_teacher")):
        assert same[mode][metric] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_teacher_is_nearest_to_itself(results):
    kl = {name: modes["heldout"]["kl_to_teacher"]["value"] for name, modes in results["metrics"].items()}
    assert abs(kl["teacher"]) < 1e-3 < kl["student"] == kl["same"]


def test_results_say_what_they_were_made_of(results, cache):
    provenance = json.loads((cache / "evaluation" / "results.json").read_text())["provenance"]
    assert provenance["task"] == {"name": "arithmetic", "version": 1} and provenance["seed"] == 0
    assert provenance["models"]["student"] == provenance["models"]["same"] != provenance["models"]["teacher"]
    assert {"git_commit", "versions", "prompts", "evaluate", "teacher"} <= provenance.keys()


def test_answers_are_kept_with_their_prompts_and_references(results, cache):
    frame = pl.read_parquet(cache / "evaluation" / "predictions.parquet")
    assert frame.columns == ["model", "mode", "prompt_id", "sample", "prompt", "response", "references"]
    assert frame.filter(pl.col("mode") == "greedy").height == 3 * 12
    assert frame.filter(pl.col("mode") == "sampled").height == 3 * 6 * 2
    headline = json.loads((cache / "evaluation" / "metrics.json").read_text())
    assert headline["same"].keys() == {"accuracy", "sampled_accuracy", "kl"}


@pytest.mark.parametrize("width", [80, 120])
def test_its_tables_are_readable_in_a_terminal(results, cache, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    long = {name: f"{name}-of-a-rather-long-experiment-seed-0" for name in results["metrics"]}
    renamed = {
        part: {long[name]: found for name, found in results[part].items()} for part in ("metrics", "differences")
    }
    _report(results | renamed | {"candidate": long["same"]}, "accuracy", cache / "evaluation")
    said = capsys.readouterr().out
    assert all(len(line) <= width or str(cache) in line for line in said.splitlines())
    for name in long:
        modes = results["metrics"][name]
        assert long[name] in said and say_interval(modes["greedy"]["accuracy"]) in said
        assert say_interval(modes["heldout"]["kl_to_teacher"], ".3f") in said


def test_a_model_with_another_tokenizer_is_not_compared(cache, teacher, tmp_path):
    stranger = make_model(tmp_path / "stranger", seed=0, words=WORDS[::-1])
    with pytest.raises(UserError, match="is not the teacher's"):
        evaluate(
            make_params(teacher), cache / "prompts.parquet", {"s": stranger}, cache / "selection", tmp_path / "out"
        )


def test_evaluation_needs_test_prompts_with_references(cache, teacher, tmp_path):
    prompts = make_prompts(tmp_path / "p.parquet", train=3)
    with pytest.raises(UserError, match="no test prompts with references"):
        evaluate(make_params(teacher), prompts, {"a": teacher}, cache / "selection", tmp_path / "out")

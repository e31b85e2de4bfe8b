"""What holds for evaluation: models side by side, paired, with everything that results were made of."""

import json

import polars as pl
import pytest

from pipeline.engines.hf import HfEngine
from pipeline.errors import UserError
from pipeline.store.selection import Selection
from pipeline.tasks.intervals import say_interval
from stages.evaluate import _report, evaluate
from stages.generate import generate
from tests.conftest import WORDS, make_model, make_params, make_prompts

KLS = [(mode, name) for mode in ("heldout", "own") for name in ("kl", "reverse_kl")]


@pytest.fixture(scope="module")
def results(cache, teacher, student):
    models = {"teacher": teacher, "student": student, "same": student}
    params = make_params(teacher, "evaluate.sampled_prompts=6")
    paths = cache / "prompts.parquet", models, cache / "selection", cache / "evaluation"
    return evaluate(params, *paths, answers_path=cache / "answers")


def test_a_model_compared_with_itself_differs_by_exactly_nothing(results):
    same = results["differences"]["student"]
    for mode, metric in (*KLS, ("heldout", "kl_estimate")):
        assert same[mode][metric] == {"value": 0.0, "low": 0.0, "high": 0.0}
    for mode in ("greedy", "sampled"):  # which a dozen prompts cannot prove of two models that answer alike
        found = same[mode]["accuracy"]
        assert found["value"] == 0.0 and found["low"] == -found["high"] < -1


def test_the_teacher_is_at_no_distance_from_itself_and_others_are(results):
    for mode, name in KLS:
        kl = {model: modes[mode][name]["value"] for model, modes in results["metrics"].items()}
        assert kl["teacher"] == 0 < kl["student"] == kl["same"]
    metrics = results["metrics"]["student"]["heldout"]
    assert metrics["kl_estimate"]["value"] == pytest.approx(metrics["kl"]["value"], rel=0.2)
    assert results["kl"] == "live" and 0 < results["kept_mass"]["worst_tenth"] < results["kept_mass"]["mean"] < 1


def test_results_say_what_they_were_made_of(results, cache, teacher):
    provenance = json.loads((cache / "evaluation" / "results.json").read_text())["provenance"]
    assert provenance["task"] == {"name": "arithmetic", "version": 1} and provenance["seed"] == 0
    assert provenance["models"]["student"] == provenance["models"]["same"] != provenance["models"]["teacher"]
    assert provenance["models"]["teacher"] == Selection(cache / "answers").teacher["identity"]
    assert {"git_commit", "versions", "prompts", "evaluate", "teacher"} <= provenance.keys()
    assert results["parameters"]["teacher"] > results["parameters"]["student"] > 0


def test_answers_are_kept_with_their_prompts_and_references_and_whether_they_were_cut(results, cache):
    frame = pl.read_parquet(cache / "evaluation" / "predictions.parquet")
    assert frame.columns == [
        "model", "mode", "prompt_id", "sample", "prompt", "response", "score", "tokens", "cut", "references",
    ]  # fmt: skip
    assert frame.filter(pl.col("mode") == "greedy").height == 3 * 12
    assert frame.filter(pl.col("mode") == "sampled").height == 3 * 6 * 2
    greedy = frame.filter((pl.col("mode") == "greedy") & (pl.col("model") == "student"))
    assert results["answers"]["student"]["greedy"] == {
        "tokens": pytest.approx(greedy["tokens"].mean()), "cut": pytest.approx(greedy["cut"].mean()),
    }  # fmt: skip
    assert (greedy["cut"] <= (greedy["tokens"] == 6)).all() and greedy["tokens"].max() == 6


def test_the_headline_is_the_full_kl_of_every_model_but_the_teacher(results, cache):
    headline = json.loads((cache / "evaluation" / "metrics.json").read_text())
    assert headline["teacher"].keys() == {"accuracy"}
    assert headline["same"].keys() == {"accuracy", "kl"}
    assert headline["student"]["kl"] == round(results["metrics"]["student"]["heldout"]["kl"]["value"], 4)


class TestWithoutTheTeacher:
    """A teacher that has answered once is not run again to be evaluated, and one that is not here costs only its KL."""

    @pytest.fixture(autouse=True)
    def count(self, monkeypatch):
        """How many responses were drawn."""
        self.drawn, sample = 0, HfEngine.sample

        def counting(engine, asks, *order, **options):
            asks = list(asks)
            self.drawn += len(asks)
            return sample(engine, asks, *order, **options)

        monkeypatch.setattr(HfEngine, "sample", counting)

    def run(self, cache, out, params, models, **options):
        paths = cache / "prompts.parquet", models, cache / "selection", out
        return evaluate(params, *paths, answers_path=cache / "answers", **options)

    def test_its_answers_are_those_of_the_store(self, cache, teacher, student, tmp_path, results):
        params = make_params(teacher, "evaluate.sampled_prompts=6")
        found = self.run(cache, tmp_path / "out", params, {"teacher": teacher})
        assert self.drawn == 0 and found["metrics"]["teacher"] == results["metrics"]["teacher"]
        said = {(row.prompt_id, row.sample): row.response for row in Selection(cache / "answers").rows("sampled")}
        frame = pl.read_parquet(tmp_path / "out" / "predictions.parquet").filter(pl.col("mode") == "sampled")
        assert frame.height == 12
        for row in frame.iter_rows(named=True):
            assert row["response"] == said[row["prompt_id"], row["sample"]]
        self.run(cache, tmp_path / "out", params, {"student": student})
        assert self.drawn == 12 + 6 * 2 + 8  # greedy, sampled, held out

    def test_it_gives_the_greedy_answers_that_it_would_give_if_it_were_asked(self, cache, teacher, tmp_path, results):
        params = make_params(teacher, "evaluate.sampled_prompts=6")
        paths = cache / "prompts.parquet", {"teacher": teacher}, cache / "selection", tmp_path / "out"
        evaluate(params, *paths)
        assert self.drawn == 12 + 6 * 2 + 8
        frames = [pl.read_parquet(path / "predictions.parquet") for path in (tmp_path / "out", cache / "evaluation")]
        one, other = (f.filter((pl.col("mode") == "greedy") & (pl.col("model") == "teacher")) for f in frames)
        assert one.equals(other)

    @pytest.mark.parametrize("gone", ["folder", "weights"])
    def test_a_teacher_that_is_not_here_leaves_the_estimate(self, cache, student, tmp_path, capsys, results, gone):
        absent = tmp_path / "gone"
        if gone == "weights":
            make_model(absent, seed=5)  # another teacher in its place
        params = make_params(absent, "evaluate.sampled_prompts=6")
        found = self.run(cache, tmp_path / "out", params, {"teacher": absent, "student": student})
        assert found["kl"] == "cache" and "no exact KL" in capsys.readouterr().err
        assert found["metrics"]["student"]["heldout"].keys() == {"kl_estimate", "cross_entropy"}
        for name in ("kl_estimate", "cross_entropy"):
            assert found["metrics"]["student"]["heldout"][name] == results["metrics"]["student"]["heldout"][name]
        assert found["metrics"]["teacher"]["greedy"] == results["metrics"]["teacher"]["greedy"]
        assert "own" not in found["metrics"]["student"] and found["parameters"]["teacher"] is None
        headline = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert headline["student"].keys() == {"accuracy", "kl_estimate"}

    def test_cache_never_loads_it(self, cache, teacher, student, tmp_path, capsys, results):
        params = make_params(teacher, "evaluate.sampled_prompts=6", "evaluate.kl=cache")
        found = self.run(cache, tmp_path / "out", params, {"teacher": teacher, "student": student})
        assert found["kl"] == "cache" and found["parameters"]["teacher"] is None
        assert "cannot run here" not in capsys.readouterr().err

    def test_a_top_k_leaves_a_bound_and_a_warning_of_what_it_leaves_out(
        self, cache, teacher, student, tmp_path, capsys, results
    ):
        params = make_params(teacher, "evaluate.sampled_prompts=6", "evaluate.kl=cache", "generate.support=topk")
        generate(params, cache / "prompts.parquet", tmp_path / "selection", cache / "store")
        paths = cache / "prompts.parquet", {"teacher": teacher, "student": student}, tmp_path / "selection"
        found = evaluate(params, *paths, tmp_path / "out", answers_path=cache / "answers")
        assert "of the teacher's probability in the mean" in capsys.readouterr().err
        bound = found["metrics"]["student"]["heldout"]["kl_bound"]["value"]
        assert 0 < bound < results["metrics"]["student"]["heldout"]["kl"]["value"]

    def test_answers_to_other_prompts_or_drawn_otherwise_are_refused(self, cache, teacher, tmp_path):
        for changed in ("evaluate.samples=9", "evaluate.temperature=0.5", "max_tokens=7"):
            with pytest.raises(UserError, match=r"lacks the teacher's (greedy|sampled) answers"):
                self.run(cache, tmp_path / "out", make_params(teacher, changed), {"teacher": teacher})
        other = make_prompts(tmp_path / "p.parquet", train=1, test=1)
        with pytest.raises(UserError, match="answers to 1 of 1 test prompts"):
            evaluate(make_params(teacher), other, {"t": teacher}, cache / "selection", tmp_path / "out",
                     answers_path=cache / "answers")  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
def test_its_tables_are_readable_in_a_terminal(results, cache, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    long = {name: f"{name}-of-a-rather-long-experiment-seed-0" for name in results["metrics"]}
    renamed = {
        part: {long[name]: found for name, found in results[part].items()} for part in ("metrics", "differences")
    }
    _report(results | renamed | {"candidate": long["same"]}, cache / "evaluation")
    said = capsys.readouterr().out
    assert all(len(line) <= width or str(cache) in line for line in said.splitlines())
    for name in long:
        modes = results["metrics"][name]
        assert long[name] in said and say_interval(modes["greedy"]["accuracy"]) in said
        assert say_interval(modes["heldout"]["kl"], ".3f") in said


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

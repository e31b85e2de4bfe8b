"""What holds for scoring: what others said gets the teacher's view of it, once, into the same store."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from pipeline.engines.hf import HfEngine
from pipeline.learning.forward import per_row, score_tokens
from pipeline.models import load_lm, load_tokenizer
from pipeline.prompts import encode_response, read_prompts
from pipeline.store.identity import score_key
from pipeline.store.requests import open_store
from pipeline.store.selection import Selection
from pipeline.store.users import users_of
from pipeline.teacher.teacher import Teacher
from pipeline.upkeep.collect import garbage, in_use
from stages.score import score
from tests.conftest import WORDS, make_model, make_params, make_prompts


def test_every_part_holds_what_it_should_with_the_teachers_view(cache, teacher):
    selection = Selection(cache / "scored")
    parts = {name: list(selection.rows(name)) for name in selection.parts}
    assert parts.keys() == {"references", "negatives", "samples"}
    assert {row.origin for row in parts["references"]} == {"reference"} and len(parts["references"]) == 40
    assert {row.origin for row in parts["negatives"]} == {"corrupted", "student"}
    assert {row.origin for row in parts["samples"]} == {"student"} and len(parts["samples"]) > 30
    prompts = {prompt.id: prompt for prompt in read_prompts(cache / "prompts.parquet", ("train", "validation"))}
    splits = {name: {prompts[row.prompt_id].split for row in rows} for name, rows in parts.items()}
    assert splits == {"references": {"train"}, "negatives": {"train"}, "samples": {"validation"}}
    tokenizer, rows = load_tokenizer(teacher), [row for part in parts.values() for row in part]
    for row in parts["references"]:
        np.testing.assert_array_equal(
            row.response_ids, encode_response(tokenizer, prompts[row.prompt_id].references[0])
        )
    model = load_lm(teacher)
    scores = per_row(rows, lambda batch: [score_tokens(model, batch).logprob])
    for row, (logprob,) in zip(rows, scores, strict=True):
        np.testing.assert_allclose(row.logprobs, logprob, atol=1e-4)
        assert row.key == score_key(row.prompt_ids, row.response_ids)


def test_samples_are_the_students_own(cache, student):
    """Its own likelihood of them is far above that of the corrupted references."""
    model = load_lm(student)

    def mean(rows):
        return np.mean([v.mean() for (v,) in per_row(rows, lambda b: [score_tokens(model, b).logprob])])

    rows = list(Selection(cache / "scored").rows("negatives"))
    assert mean([r for r in rows if r.origin == "student"]) > mean([r for r in rows if r.origin == "corrupted"])


def run(teacher, student, prompts, out, *overrides, **options):
    return score(make_params(teacher, *overrides), prompts, student, out, **options)


def test_what_is_scored_is_never_scored_again_and_another_student_adds_only_its_samples(teacher, student, tmp_path):
    prompts = make_prompts(tmp_path / "p.parquet", train=10, validation=4)
    first = run(teacher, student, prompts, tmp_path / "a", results=tmp_path / "results.json")
    assert first.made > 20 and json.loads((tmp_path / "results.json").read_text())["cost"]["rows_made"] == first.made
    again = run(teacher, student, prompts, tmp_path / "b", engine=object())  # an engine that cannot answer
    assert (again.made, again.cached) == (0, first.made)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    other = make_model(tmp_path / "other", seed=7, width=32, layers=1)
    second = run(teacher, other, prompts, tmp_path / "c")
    assert second.cached >= 20 and 0 < second.made <= 10 + 4 * 6
    students = {json.loads((tmp_path / name / "manifest.json").read_text())["student"] for name in "abc"}
    assert len(students) == 2


def test_negatives_come_from_the_first_prompts_only_and_can_be_none(teacher, student, tmp_path):
    prompts = make_prompts(tmp_path / "p.parquet", train=10, validation=4)
    run(teacher, student, prompts, tmp_path / "few", "score.prompts=3", "score.corrupted=2")
    negatives = list(Selection(tmp_path / "few").rows("negatives"))
    assert len({row.prompt_id for row in negatives}) == 3
    assert [row.origin for row in negatives].count("corrupted") == 6
    none = ["score.samples=0", "score.corrupted=0", "score.validation_samples=0"]
    run(teacher, student, prompts, tmp_path / "none", *none)
    assert Selection(tmp_path / "none").parts.keys() == {"references"}


def test_where_no_teacher_is_run_only_the_references_are_kept_as_text(teacher, student, tmp_path):
    prompts = make_prompts(tmp_path / "p.parquet", train=5, validation=2)
    (tmp_path / "r.jsonl").write_text("")
    run(teacher, student, prompts, tmp_path / "out", "generate.engine=text", f"generate.responses={tmp_path}/r.jsonl")
    selection = Selection(tmp_path / "out")
    rows = list(selection.rows("references"))
    assert selection.parts.keys() == {"references"} and len(rows) == 5
    assert all(row.logprobs is None and row.k == 0 for row in rows)


def test_a_student_with_another_tokenizer_is_refused(teacher, tmp_path):
    stranger = make_model(tmp_path / "stranger", seed=0, words=["a", "b"])
    prompts = make_prompts(tmp_path / "p.parquet", train=5, validation=2)
    with pytest.raises(Exception, match="is not the teacher's"):
        run(teacher, stranger, prompts, tmp_path / "out")


def test_the_rows_are_plain_parquet(cache):
    frame = pl.read_parquet(cache / "scored" / "samples-*.parquet")
    assert (
        frame["prompt"].dtype == pl.String and (frame["topk_ids"].list.len() == 8 * frame["logprobs"].list.len()).all()
    )


def test_the_students_samples_are_drawn_once_and_kept_as_a_selection(teacher, student, tmp_path, monkeypatch):
    """A student that is the same again is not run; one that changed is."""
    prompts, place = make_prompts(tmp_path / "p.parquet", train=6, validation=2), tmp_path / "samples"
    run(teacher, student, prompts, tmp_path / "a", results=tmp_path / "results.json", samples=place)
    cost = json.loads((tmp_path / "results.json").read_text())["cost"]
    drawn = 6 + 2 * 6
    assert (cost["samples_found"], cost["samples_drawn"]) == (0, drawn)
    samples = Selection(place)
    said = {name: [row.response_ids.tolist() for row in samples.rows(name)] for name in samples.parts}
    scored = Selection(tmp_path / "a")
    for name in ("negatives", "samples"):
        assert said[name] == [row.response_ids.tolist() for row in scored.rows(name) if row.origin == "student"]
    assert samples.teacher["identity"] != scored.teacher["identity"] and samples.k == 0

    monkeypatch.setattr(HfEngine, "sample", lambda *_, **__: pytest.fail("the student was run"))
    run(teacher, student, prompts, tmp_path / "b", results=tmp_path / "results.json", samples=place)
    cost = json.loads((tmp_path / "results.json").read_text())["cost"]
    assert (cost["samples_found"], cost["samples_drawn"], cost["rows_made"]) == (drawn, 0, 0)
    with pytest.raises(pytest.fail.Exception, match="the student was run"):
        run(teacher, make_model(tmp_path / "other", seed=7, width=32, layers=1), prompts, tmp_path / "c")


def test_gc_keeps_the_samples_of_a_selection_and_lets_those_of_a_deleted_one_go(teacher, student, tmp_path, own_store):
    prompts, place = make_prompts(tmp_path / "p.parquet", train=6, validation=2), tmp_path / "samples"
    run(teacher, student, prompts, tmp_path / "a", samples=place)
    storage = open_store()
    assert list(garbage(storage, in_use(storage))) == []
    shutil.rmtree(place)
    used = in_use(storage, forget=[user for user in users_of(storage)[0] if user.absent])
    identity = Teacher.of(make_params(teacher).generate).student(student, 8).identity
    gone = {each.name for each in garbage(storage, used)}
    assert any(name.startswith(identity) for name in gone)
    assert all(name.startswith((identity, "references/")) for name in gone)


def test_a_prompt_that_the_student_cannot_read_has_no_sample_and_a_reason(teacher, tmp_path, capsys):
    short = make_model(tmp_path / "short", seed=1, width=32, layers=1, context=16)
    path = tmp_path / "p.jsonl"
    rows = [("a", "w1", "train"), ("b", " ".join(WORDS[:14]), "train"), ("c", "w2", "validation")]
    lines = [{"id": i, "prompt": text, "references": ["w3"], "split": split} for i, text, split in rows]
    path.write_text("\n".join(map(json.dumps, lines)))
    run(teacher, short, path, tmp_path / "out")
    assert "prompt 'b' left out by the student: a prompt of 15 tokens" in capsys.readouterr().err
    negatives = list(Selection(tmp_path / "out").rows("negatives"))
    assert {row.prompt_id for row in negatives if row.origin == "student"} == {"a"}

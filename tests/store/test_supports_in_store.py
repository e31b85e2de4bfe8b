"""What holds for samples and top k's in one store: neither is taken for the other, and nothing is asked in vain."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli.dry_run import dry_run
from pipeline.cli.listing import Form
from pipeline.store.narrowing import narrowed
from pipeline.store.schema import read_metadata, row_digest
from pipeline.store.selection import Selection
from pipeline.store.storage import Storage
from pipeline.store.training_rows import TeacherRows
from pipeline.upkeep.collect import garbage, in_use
from pipeline.upkeep.export import splits_of_request
from pipeline.upkeep.verify import verify_selection, verify_store
from stages.generate import Summary, generate
from stages.score import score
from tests.conftest import make_params, make_prompts
from tests.stages.test_generate import Recorder, contents, stub_params

PARTS = ("train", "validation", "scored")
VOCABULARY = 44  # of the test's models: all of it has no tau


@pytest.fixture
def prompts(tmp_path):
    return make_prompts(tmp_path / "prompts.parquet", train=6, validation=2, test=2)


def sampled(teacher, k: int, *overrides: str):
    return stub_params(teacher, f"generate.k={k}", "generate.support=sampled", *overrides)


def plain(teacher, k: int, *overrides: str):
    return stub_params(teacher, f"generate.k={k}", "generate.support=topk", *overrides)


def all_rows(out: Path) -> list:
    selection = Selection(out)
    return [row for part in selection.parts for row in selection.rows(part)]


def faults(store: Path, *selections: Path) -> list:
    found = list(verify_store(Storage(store), "", False, lambda: None))
    return found + [fault for out in selections for fault in verify_selection(out, store, False)]


def test_a_selection_and_its_shards_say_what_they_hold(teacher, prompts, tmp_path, own_store):
    for support, params in (("sampled", sampled(teacher, 8)), ("topk", plain(teacher, 8))):
        generate(params, prompts, tmp_path / support, tmp_path / f"store-{support}")
        selection = Selection(tmp_path / support)
        assert (selection.support, selection.k) == (support, 8)
        for row in all_rows(tmp_path / support):
            assert (row.tau is None, row.tail is None) == (support == "topk", support == "sampled")
        shards = list((tmp_path / f"store-{support}").glob("*/*/part-*.parquet"))
        footers = [read_metadata(shard) for shard in shards]
        assert {(footer["schema_version"], footer["support"]) for footer in footers} == {(2, support)}
        assert not faults(tmp_path / f"store-{support}", tmp_path / support)


@pytest.mark.parametrize("materialize", ["true", "false"])
def test_the_exact_width_is_read_first_and_else_the_smallest_larger_one_which_is_named(
    teacher, prompts, tmp_path, own_store, materialize
):
    params = partial(sampled, teacher)
    generate(params(12), prompts, tmp_path / "12")
    engine, option = Recorder(teacher), f"generate.materialize={materialize}"
    assert generate(params(6, option), prompts, tmp_path / "6 of 12", engine=engine).made == 0
    selection = Selection(tmp_path / "6 of 12")
    assert {name: part["drawn"] for name, part in selection.parts.items()} == {
        "train": {"12": 12}, "validation": {"12": 2}, "scored": {"12": 6},
    }  # fmt: skip
    for part in PARTS:
        for wide, row in zip(Selection(tmp_path / "12").rows(part), selection.rows(part), strict=True):
            assert row_digest(row) == row_digest(narrowed(wide, 6, "sampled")) and row.k == 6
        loaded = TeacherRows(selection, part)
        assert [row_digest(row) for row in loaded.__getitems__(range(len(loaded)))] == [
            row_digest(row) for row in selection.rows(part)
        ]
    assert not faults(own_store, tmp_path / "6 of 12")
    generate(params(8), prompts, tmp_path / "8", engine=engine)
    assert not engine.sampled and not engine.scored  # 8 is there as well, out of 12
    assert Selection(tmp_path / "8").part("train")["drawn"] == {"12": 12}
    generate(params(16), prompts, tmp_path / "16", engine=engine)
    assert len(engine.scored) == 20 and Selection(tmp_path / "16").part("train")["drawn"] == {"16": 12}
    generate(params(6, option), prompts, tmp_path / "again", engine=Recorder(teacher, die_after=0))
    assert contents(tmp_path / "again") == contents(tmp_path / "6 of 12")


def test_a_sample_of_more_tokens_is_a_draw_of_its_own(teacher, prompts, tmp_path, own_store):
    """Nothing but the response and its end is kept of what was stored."""
    generate(sampled(teacher, 6), prompts, tmp_path / "6")
    generate(sampled(teacher, 12), prompts, tmp_path / "12")
    generate(sampled(teacher, 12), prompts, tmp_path / "new", tmp_path / "empty store")
    assert contents(tmp_path / "12") == contents(tmp_path / "new")
    generate(sampled(teacher, 6), prompts, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "6")


def test_who_asks_for_samples_where_top_ks_are_is_told_before_anything_is_loaded(
    teacher, student, prompts, tmp_path, own_store, capsys
):
    generate(plain(teacher, 8), prompts, tmp_path / "plain")
    capsys.readouterr()
    expected = (
        "20 stored rows have the teacher's top k and are to be scored anew for generate.support=sampled; "
        "generate.support=topk with generate.k=8 keeps what is there"
    )
    dry_run(sampled(teacher, 8), prompts, form=Form.JSON)
    said = capsys.readouterr()
    requests = {row["request"]: row for row in json.loads(said.out)["requests"]}
    assert (requests["sample"]["to_rescore"], requests["score"]["to_rescore"]) == (14, 6)
    assert requests["sample"]["cached"] == requests["sample"]["missing"] == 0
    assert expected in " ".join(said.err.split())
    engine = Recorder(teacher)
    assert generate(sampled(teacher, 8), prompts, tmp_path / "sampled", engine=engine) == Summary(0, 20, 0)
    assert expected in " ".join(capsys.readouterr().err.split())
    assert len(engine.scored) == 20 and not engine.sampled
    for before, after in zip(all_rows(tmp_path / "plain"), all_rows(tmp_path / "sampled"), strict=True):
        assert before.key == after.key and (before.response_ids == after.response_ids).all()
        assert before.finish == after.finish and after.tau is not None
    for params, out in ((plain, "plain"), (sampled, "sampled")):
        again = generate(params(teacher, 8), prompts, tmp_path / "again", engine=Recorder(teacher, die_after=0))
        assert again == Summary(20, 0, 0) and contents(tmp_path / "again") == contents(tmp_path / out)
    assert "scored anew" not in capsys.readouterr().err
    score(plain(teacher, 8, "score.samples=0", "score.validation_samples=0"), prompts, student, tmp_path / "scored")
    capsys.readouterr()
    score(sampled(teacher, 8, "score.samples=0", "score.validation_samples=0"), prompts, student, tmp_path / "scored")
    assert "12 stored rows have the teacher's top k" in " ".join(capsys.readouterr().err.split())
    assert not faults(own_store, tmp_path / "plain", tmp_path / "sampled", tmp_path / "scored")


def test_a_top_k_is_served_from_samples_that_have_all_of_it_and_scored_otherwise(teacher, prompts, tmp_path, own_store):
    generate(sampled(teacher, VOCABULARY), prompts, tmp_path / "all")
    never = Recorder(teacher, die_after=0)
    for materialize in ("true", "false"):
        params = plain(teacher, 8, f"generate.materialize={materialize}")
        assert generate(params, prompts, tmp_path / "served", engine=never) == Summary(20, 0, 0)
        assert not faults(own_store, tmp_path / "served")
    assert not never.scored
    generate(plain(teacher, 8), prompts, tmp_path / "plain", tmp_path / "other store")
    for served, row in zip(all_rows(tmp_path / "served"), all_rows(tmp_path / "plain"), strict=True):
        assert (served.topk_ids == row.topk_ids).all() and served.tau is None
        np.testing.assert_allclose(served.tail, row.tail, atol=2e-3)
    shutil.rmtree(own_store)
    generate(sampled(teacher, 12), prompts, tmp_path / "some")
    engine = Recorder(teacher)
    assert generate(plain(teacher, 8), prompts, tmp_path / "plain again", engine=engine) == Summary(0, 20, 0)
    assert len(engine.scored) == 20
    assert contents(tmp_path / "plain again") == contents(tmp_path / "plain")


def test_gc_keeps_the_samples_that_a_top_k_is_read_from(teacher, prompts, tmp_path, own_store):
    generate(sampled(teacher, VOCABULARY), prompts, tmp_path / "a")
    generate(plain(teacher, 8, "generate.materialize=false"), prompts, tmp_path / "a")
    assert not list(garbage(Storage(own_store), in_use(Storage(own_store))))


@pytest.mark.parametrize("stored", ["sampled", "topk"])
def test_rows_without_tokens_are_served_by_any_and_are_no_text(teacher, prompts, tmp_path, own_store, stored, capsys):
    params = plain(teacher, 0)
    generate(params, prompts, tmp_path / "none", tmp_path / "own store")
    generate((sampled if stored == "sampled" else plain)(teacher, 8), prompts, tmp_path / "some")
    assert generate(params, prompts, tmp_path / "served", engine=Recorder(teacher, die_after=0)).made == 0
    for out, store in (("none", tmp_path / "own store"), ("served", own_store)):
        selection = Selection(tmp_path / out, store)
        assert (selection.k, selection.support) == (0, "topk") and not faults(store, tmp_path / out)
        for row in all_rows(tmp_path / out):
            assert row.topk_ids.shape == (len(row.response_ids), 0) and (row.tail == 1).all()
            assert len(row.logprobs) == len(row.lse) == len(row.response_ids)
        selection.require_teacher("a reward")  # it has the teacher's log-probabilities
    engine = Recorder(teacher)
    before = {row.key: row for row in all_rows(tmp_path / "none")}
    generate(plain(teacher, 8), prompts, tmp_path / "widened", tmp_path / "own store", engine=engine)
    assert len(engine.scored) == 20 and not engine.sampled and not faults(tmp_path / "own store", tmp_path / "widened")
    for row in all_rows(tmp_path / "widened"):
        assert row.k == 8 and (row.logprobs == before[row.key].logprobs).all()


def test_answers_to_test_prompts_are_served_by_rows_of_either_support(teacher, prompts, tmp_path, own_store):
    for number, params in enumerate((sampled(teacher, 8), plain(teacher, 8))):
        engine = Recorder(teacher)
        generate(params, prompts, tmp_path / "out", answers=tmp_path / "answers", engine=engine)
        assert bool(engine.sampled) == (number == 0)
        assert {row.k for row in all_rows(tmp_path / "answers")} == {0}


class Padded(Recorder):
    """Its embedding is padded: some mass is on ids that no token has."""

    def sample(self, *given, **more):
        for number, answer in enumerate(super().sample(*given, **more)):
            yield replace(answer, dropped=(3e-5, 1e-7)[number % 2])


def test_what_is_on_ids_that_no_token_has_is_said_once(teacher, prompts, tmp_path, own_store, capsys):
    generate(sampled(teacher, 8), prompts, tmp_path / "out", engine=Padded(teacher))
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("up to 3e-5 of the teacher's probability at a position is on ids that its tokenizer") == 1


def test_an_export_of_a_request_has_each_support_apart(teacher, prompts, tmp_path, own_store):
    for params in (plain(teacher, 0), plain(teacher, 4), plain(teacher, 8), sampled(teacher, 6), sampled(teacher, 12)):
        generate(params, prompts, tmp_path / "out")
    name = max(own_store.glob("*/*"), key=lambda path: len(list(path.glob("part-*"))))
    _, splits = splits_of_request(Storage(own_store), "/".join(name.parts[-2:]))
    assert [(split.name, split.k, split.support) for split in splits] == [
        ("train_sampled_k12", 12, "sampled"), ("train_topk_k8", 8, "topk"),
    ]  # fmt: skip


def test_an_empty_response_is_scored_drawn_and_narrowed(teacher, tmp_path):
    model = Path(shutil.copytree(teacher, tmp_path / "model"))
    state = json.loads((model / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "_"}, "content": ""}  # "_" is no token
    (model / "tokenizer.json").write_text(json.dumps(state))
    prompts, given = make_prompts(tmp_path / "p.parquet", train=1), tmp_path / "given.jsonl"
    for responses, store in ((["w1 w2", "_"], "both"), (["_"], "alone")):
        lines = [json.dumps({"prompt": "w0 w0 w0", "response": text, "finish": "length"}) for text in responses]
        given.write_text("\n".join(lines))
        for support, k in (("topk", 4), ("topk", 8), ("sampled", 8), ("sampled", 4), ("topk", 0), ("sampled", 12)):
            options = f"generate.support={support}", f"generate.k={k}", f"generate.responses={given}"
            generate(make_params(model, *options), prompts, tmp_path / "out", tmp_path / store)
            rows = all_rows(tmp_path / "out")
            assert [len(row.response_ids) for row in rows] == [2, 0][-len(responses) :]
            assert {row.tau is None for row in rows} == {support == "topk"}
            assert not faults(tmp_path / store, tmp_path / "out")

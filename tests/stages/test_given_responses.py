"""What holds for responses of another tool, with and without a teacher to score them, and for rejection sampling."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.errors import UserError
from pipeline.files import write_json_atomically
from pipeline.learning.batches import collate
from pipeline.learning.forward import score_tokens
from pipeline.models import load_lm, load_tokenizer
from pipeline.prompts import Prompt, encode_response, read_prompts, write_prompts
from pipeline.store.manifest import sealed
from pipeline.store.selection import Selection
from pipeline.store.training_rows import TeacherRows
from pipeline.upkeep.verify import verify_selection
from stages.distill import distill
from stages.generate import generate
from stages.reward import reward
from tests.conftest import WORDS, make_model, make_params, make_prompts
from tests.stages.test_generate import Recorder, contents, stub_params


@pytest.fixture
def given(tmp_path):
    """A prompt file, and two responses to each of its training prompts but the last."""
    prompts = read_prompts(make_prompts(tmp_path / "prompts.parquet", train=6, validation=2))
    rows = [
        {"prompt": p.prompt, "response": text, **({"finish": "length"} if text == "w3 w4" else {})}
        for p in prompts
        for text in ("w1 w2", "w3 w4")
        if p is not prompts[5]
    ]
    rows += [rows[0], {"prompt": "never asked", "response": "w1"}]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "prompts.parquet", path


def test_text_alone_becomes_seqkd_data_without_a_model(given, teacher, student, tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    load_tokenizer(teacher).save_pretrained(tmp_path / "tokenizer")
    prompts, path = given
    params = make_params(tmp_path / "tokenizer", f"generate.responses={path}", "generate.engine=text")
    summary = generate(params, prompts, tmp_path / "selection")
    said = " ".join(capsys.readouterr().err.split())
    assert summary.made == 14 and "1 of its prompts are not in the prompt file; 1 prompts have no response" in said
    rows = list(Selection(tmp_path / "selection").rows("train"))
    assert [(row.sample, row.finish, row.origin, row.k) for row in rows[:2]] == [
        (0, "stop", "teacher", 0), (1, "length", "teacher", 0),
    ]  # fmt: skip
    tokenizer = load_tokenizer(teacher)
    assert rows[0].response_ids.tolist() == encode_response(tokenizer, "w1 w2").tolist()
    assert rows[1].response_ids.tolist() == encode_response(tokenizer, "w3 w4", ends=False).tolist()
    assert rows[0].logprobs is None and rows[0].lse is None
    assert pl.read_parquet(tmp_path / "selection" / "train-*.parquet")["logprobs"].null_count() == 10
    assert generate(params, prompts, tmp_path / "again").made == 0

    seqkd = make_params(teacher, "distill.objective=seqkd", "distill.reward=none", "distill.optimisation.steps=30")
    places = (tmp_path / "student", tmp_path / "metrics", tmp_path / "runs")
    metrics = distill(seqkd, tmp_path / "selection", student, None, *places)
    curve = pl.read_csv(tmp_path / "metrics" / "training.csv")
    assert curve["nll"][-1] < curve["nll"][0] and metrics["samples"] == 10
    for wrong in ("distill.objective=fkl", "distill.reward=zero"):
        other = make_params(teacher, "distill.objective=seqkd", "distill.reward=none", wrong)
        with pytest.raises(UserError, match="holds text only"):
            distill(other, tmp_path / "selection", student, None, *places)
    with pytest.raises(UserError, match="holds text only"):
        reward(seqkd, tmp_path / "selection", student, tmp_path / "r", tmp_path / "a", tmp_path / "runs")


def test_a_teacher_scores_the_responses_of_another_tool(given, teacher, tmp_path):
    prompts, path = given
    generate(make_params(teacher, f"generate.responses={path}"), prompts, tmp_path / "selection")
    selection = Selection(tmp_path / "selection")
    rows = [row for part in ("train", "validation") for row in selection.rows(part)]
    assert len(rows) == 14 and {row.k for row in rows} == {8} and "scored" in selection.parts
    model = load_lm(teacher)
    expected = score_tokens(model, collate(rows, topk=False)).logprob.detach().numpy()
    np.testing.assert_allclose(np.concatenate([row.logprobs for row in rows]), expected, atol=1e-4)


def test_bad_rows_and_text_without_responses_are_refused(tmp_path, teacher):
    prompts = make_prompts(tmp_path / "prompts.parquet", train=2)
    for row, message in (({"prompt": "w1"}, "row 1 has no column 'response'; found prompt"),
                         ({"prompt": "w1", "response": 5}, r"row 1: 'response' must be text, found 5 \(int\)"),
                         ({"prompt": "w1", "response": ""}, "row 1 has an empty response"),
                         ({"prompt": "w1", "response": "w2", "finish": "eos"}, "row 1 has finish 'eos'")):  # fmt: skip
        (tmp_path / "bad.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError, match=message):
            generate(make_params(teacher, f"generate.responses={tmp_path / 'bad.jsonl'}"), prompts, tmp_path / "s")
    with pytest.raises(UserError, match="no file of responses"):
        generate(make_params(teacher, "generate.responses=none.jsonl"), prompts, tmp_path / "s")
    with pytest.raises(UserError, match="engine text runs no teacher"):
        make_params(teacher, "generate.engine=text")


def test_only_right_answers_are_selected_and_all_are_kept_in_the_store(tmp_path):
    make_model(tmp_path / "tokenizer", seed=0, words=[*WORDS, "#", "1", "2"])
    prompts = [Prompt(str(i), f"w{i} w1", ("# 1",), "train") for i in range(4)]
    write_prompts(tmp_path / "prompts.parquet", prompts)
    rows = [{"prompt": p.prompt, "response": f"w1 # {1 if i < 3 else 2}"} for i, p in enumerate(prompts)]
    rows += [{"prompt": prompts[0].prompt, "response": "# 2"}]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = [f"generate.responses={tmp_path / 'answers.jsonl'}", "generate.engine=text"]
    params = make_params(tmp_path / "tokenizer", *common, "generate.accept=correct")
    assert generate(params, tmp_path / "prompts.parquet", tmp_path / "right").made == 5
    selection = Selection(tmp_path / "right")
    assert [row.response for row in selection.rows("train")] == ["w1 # 1"] * 3
    assert list(selection.part("train")["keys"]) == ["0", "1", "2"]
    everything = make_params(tmp_path / "tokenizer", *common)
    assert generate(everything, tmp_path / "prompts.parquet", tmp_path / "all").cached == 5
    with pytest.raises(UserError, match="translation has none"):
        wrong = make_params(tmp_path / "tokenizer", *common, "generate.accept=correct", "prepare.task=translation")
        generate(wrong, tmp_path / "prompts.parquet", tmp_path / "none")


def cut_off(path: Path, *rows: tuple[str, str]) -> str:
    """The parameter that names a file of prompts and responses, none of which ended by itself."""
    path.write_text("\n".join(json.dumps({"prompt": p, "response": r, "finish": "length"}) for p, r in rows))
    return f"generate.responses={path}"


@pytest.mark.parametrize("materialize", [True, False])
def test_numbers_and_texts_are_those_of_this_experiment_whoever_stored_the_rows(teacher, tmp_path, materialize):
    """The store may have got a response as another one of its prompt, and a prompt with other spaces in it."""
    theirs, mine = tmp_path / "theirs.parquet", tmp_path / "mine.parquet"
    for path, spaces in ((theirs, "  "), (mine, " ")):
        prompts = [("a", f"w1{spaces}w2", ("w5",), "train"), ("v", f"w3{spaces}w4", ("w5 w6",), "validation")]
        write_prompts(path, [Prompt(*prompt) for prompt in prompts])
    earlier = cut_off(tmp_path / "theirs.jsonl", ("w1  w2", "w7"), ("w3  w4", "w9"))
    extended = cut_off(tmp_path / "mine.jsonl", ("w1 w2", "w8"), ("w1 w2", "w7"), ("w3 w4", "w9"))
    generate(stub_params(teacher, earlier), theirs, tmp_path / "theirs", tmp_path / "used")
    params = stub_params(teacher, extended, f"generate.materialize={str(materialize).lower()}")
    made = [generate(params, mine, tmp_path / f"of {store}", tmp_path / store).made for store in ("used", "new")]
    assert made == [1, 6]  # of 3 responses, a reference and 2 corruptions
    assert contents(tmp_path / "of used") == contents(tmp_path / "of new")
    selection = Selection(tmp_path / "of used", tmp_path / "used")
    rows = list(TeacherRows(selection, "train").__getitems__(range(2)))
    assert [(row.sample, row.response) for row in rows] == [(0, "w8"), (1, "w7")]
    texts = {row.prompt for part in selection.parts for row in selection.rows(part)}
    assert texts == ({"w1 w2", "w3 w4"} if materialize else {"w1 w2", "w1  w2", "w3  w4"})


@pytest.mark.parametrize("materialize", ["true", "false"])
def test_whether_a_scored_response_has_ended_follows_from_the_stop_tokens_of_now(teacher, tmp_path, materialize):
    """They are no part of a score request, so that the rows of other ones are found, and no teacher is run."""
    model = shutil.copytree(teacher, tmp_path / "model")
    prompts = make_prompts(tmp_path / "prompts.parquet", train=2, validation=1)
    first, second = (prompt.prompt for prompt in read_prompts(prompts) if prompt.split == "train")
    responses = cut_off(tmp_path / "answers.jsonl", (first, "w3 w4"), (second, "w3 w5"))
    params = stub_params(model, responses, f"generate.materialize={materialize}")

    def finishes(selection: Selection) -> list[str]:
        assert {row.finish for row in selection.rows("scored")} == {"stop"}  # these end with the tokenizer's own
        found = [row.finish for row in selection.rows("train")]
        assert found == [row.finish for row in TeacherRows(selection, "train").__getitems__(range(2))]
        return found

    generate(params, prompts, tmp_path / "before")
    settings = json.loads((model / "generation_config.json").read_text())
    eos = [load_tokenizer(model).eos_token_id, *encode_response(load_tokenizer(model), "w4", ends=False).tolist()]
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": eos}))
    engine = Recorder(model)
    assert generate(params, prompts, tmp_path / "after", engine=engine).made == 0 and not engine.scored
    before, after = Selection(tmp_path / "before"), Selection(tmp_path / "after")
    assert finishes(before) == ["length", "length"] and finishes(after) == ["stop", "length"]
    assert before.teacher == after.teacher
    assert not list(verify_selection(tmp_path / "after", None, False))


def test_a_manifest_without_stop_tokens_leaves_the_ends_as_they_are_stored(teacher, tmp_path):
    """As earlier versions wrote it."""
    prompts = make_prompts(tmp_path / "prompts.parquet", train=2, validation=1)
    generate(stub_params(teacher, "generate.materialize=false"), prompts, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (
        manifest["parts"]["scored"].pop("stop_token_ids") == [2] and "stop_token_ids" not in manifest["parts"]["train"]
    )
    write_json_atomically(tmp_path / "out" / "manifest.json", sealed(manifest))
    assert {row.finish for row in Selection(tmp_path / "out").rows("scored")} == {"stop"}

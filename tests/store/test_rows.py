"""What holds for single rows: one that is wrong fails alone, none is stored that a teacher cannot have said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engines import Ask, Failure
from pipeline.engines.hf import HfEngine
from pipeline.engines.stub import StubEngine
from pipeline.errors import UserError
from pipeline.files import sha256_file
from pipeline.models import load_config, load_lm, load_tokenizer
from pipeline.prompts import Prompt, write_prompts
from pipeline.store.checks import RowCheck
from pipeline.store.identity import score_key
from pipeline.store.requests import RequestFolder
from pipeline.store.schema import Row, from_table, read_metadata, row_digest, to_table, write_shard
from pipeline.store.selection import Selection
from pipeline.store.storage import Storage
from pipeline.teacher.teacher import Teacher
from pipeline.upkeep.verify import verify_store
from stages.evaluate import evaluate
from stages.generate import generate
from stages.score import score
from tests.conftest import make_model, make_params, make_prompts
from tests.engines.test_engines import DRAWN, by_key, make_asks
from tests.stages.test_generate import contents, stub_params


def skipped(store, model: str = "*") -> list[dict]:
    """What was left out of requests to a model (identity), or to any."""
    files = store.glob(f"{model}/*/skipped.jsonl")
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def shards(store) -> list:
    return sorted(store.glob("*/*/part-*.parquet"))


# Values that are no numbers


@pytest.fixture
def broken(teacher, tmp_path):
    """A teacher whose weights have become NaN, as a failed training leaves them."""
    folder = shutil.copytree(teacher, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_teacher_that_says_nan_is_an_error_and_stores_nothing(broken, student, tmp_path, own_store, capsys):
    prompts = make_prompts(tmp_path / "prompts.parquet", train=20, validation=2)
    with pytest.raises(UserError, match=r"none of 48 rows .* by the teacher; the first: it has .* not finite"):
        generate(make_params(broken), prompts, tmp_path / "out")
    assert len(skipped(own_store)) == 48 and not shards(own_store) and not (tmp_path / "out" / "manifest.json").exists()
    assert capsys.readouterr().err.count("left out") <= 2 * (5 + 1)  # of each request: some, and where the others are
    with pytest.raises(UserError, match=r"none of .* rows could be made by the teacher"):
        score(
            make_params(broken, "score.samples=0", "score.validation_samples=0"), prompts, student, tmp_path / "scored"
        )
    assert not shards(own_store)


def test_a_student_that_says_nan_is_an_error(broken, teacher, tmp_path):
    """Its samples would be scored, and its answers counted, as if it had said them."""
    prompts = make_prompts(tmp_path / "prompts.parquet", train=3, validation=2, test=2)
    with pytest.raises(UserError, match=r"none of 15 rows .* by the student; the first: it has .* not finite"):
        score(make_params(teacher), prompts, broken, tmp_path / "scored")
    generate(make_params(teacher), prompts, tmp_path / "out")
    with pytest.raises(UserError, match=r"the model .*broken .* has logits that are NaN or infinite"):
        evaluate(make_params(teacher), prompts, {"broken": broken}, tmp_path / "out", tmp_path / "evaluation")


def test_every_row_that_is_left_out_is_recorded_and_some_are_named(teacher, tmp_path, own_store, capsys):
    params = stub_params(teacher, "max_tokens=63", "generate.samples=1")  # no prompt of three words fits
    with pytest.raises(UserError, match=r"none of 30 rows .* by the teacher; the first: a prompt of 4 tokens"):
        generate(params, make_prompts(tmp_path / "prompts.parquet", train=30), tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("' left out: a prompt of") == 5 and said.count("more rows are left out") == 1
    assert len(skipped(own_store)) == 30


WRONG = {
    "log-probabilities of its tokens": {"logprobs": np.nan},
    "normalisers": {"lse": np.inf},
    "a top k with": {"topk_logprobs": np.nan},
    "values of tau": {"tau": np.nan},
}


class Spoilt(StubEngine):
    """A stub that spoils one value of one answer."""

    def __init__(self, folder, number: int, **values: float):
        super().__init__(load_config(folder).vocab_size)
        self.number, self.values = number, values

    def sample(self, asks, sampling, k, support="topk"):
        for number, answer in enumerate(super().sample(asks, sampling, k, support)):
            if number == self.number:
                (name, value), *_ = self.values.items()
                values = getattr(answer, name).copy()
                values.flat[-1] = value
                answer = replace(answer, **{name: values})
            yield answer


@pytest.mark.parametrize("reason", WRONG)
def test_a_row_with_a_value_that_is_not_finite_fails_alone(teacher, tmp_path, own_store, reason):
    prompts = make_prompts(tmp_path / "prompts.parquet", train=20)
    summary = generate(stub_params(teacher), prompts, tmp_path / "out", engine=Spoilt(teacher, 17, **WRONG[reason]))
    assert (summary.made, summary.skipped) == (39, 1)
    (entry,) = skipped(own_store)
    assert reason in entry["reason"] and len(list(Selection(tmp_path / "out").rows("train"))) == 39


def excluded(row: Row) -> Row:
    """The row with tokens outside its top k that the teacher gave no probability at all."""
    unlisted = ~(row.topk_ids == row.response_ids[:, None]).any(1)
    assert unlisted.any()
    return replace(row, logprobs=np.where(unlisted, -np.inf, row.logprobs))


@pytest.mark.parametrize(
    ("kind", "spoil", "reason"),
    [
        ("sample", lambda row: replace(row, lse=row.lse * np.nan), "normalisers that are not finite"),
        ("score", excluded, "log-probabilities of its tokens that are not finite"),
    ],
)
def test_a_row_of_no_numbers_that_an_earlier_version_stored_is_not_selected(
    teacher, tmp_path, own_store, kind, spoil, reason
):
    """And `cache verify` sets it aside, as the message says."""
    prompts = make_prompts(tmp_path / "prompts.parquet", train=20, validation=2)
    generate(stub_params(teacher), prompts, tmp_path / "before")
    shard = next(shard for shard in shards(own_store) if read_metadata(shard)["request"]["kind"] == kind)
    rows, metadata = from_table(pq.read_table(shard)), read_metadata(shard)
    write_shard(shard, [spoil(rows[0]), *rows[1:]], metadata)
    shard.rename(shard.with_name(f"part-{sha256_file(shard)[:16]}.parquet"))
    with pytest.raises(UserError, match=rf"row {rows[0].key} in .* {reason}.*cache verify"):
        generate(stub_params(teacher), prompts, tmp_path / "out")
    assert any(problem.aside for problem in verify_store(Storage(own_store), "", True, lambda: None))
    assert generate(stub_params(teacher), prompts, tmp_path / "out").made == len(rows)
    assert contents(tmp_path / "out") == contents(tmp_path / "before")


def test_a_token_that_cannot_be_said_may_be_in_the_top_k(teacher, tmp_path, own_store):
    """Masked logits: with a k near the size of the vocabulary some entries are -inf."""
    prompts, engine = make_prompts(tmp_path / "prompts.parquet", train=5), Spoilt(teacher, 3, topk_logprobs=-np.inf)
    assert generate(stub_params(teacher), prompts, tmp_path / "out", engine=engine).skipped == 0


# Tokens and prompts


def test_a_token_beyond_the_embedding_fails_alone(teacher):
    asks = make_asks(20)
    beyond = replace(asks[3], key="beyond", prompt_ids=np.array([5, 44, 6], np.int32))
    engine = HfEngine(load_lm(teacher))
    found = {answer.key: answer for answer in engine.sample([*asks, beyond], DRAWN, 5)}
    assert "token 44, and the model has 44 embeddings" in found.pop("beyond").reason
    assert not any(isinstance(answer, Failure) for answer in found.values()) and len(found) == 20
    given = Ask("given", asks[0].prompt_ids, response_ids=np.array([50], np.int32))
    (answer,) = engine.score([given], 5, (2,))
    assert "token 50" in answer.reason


@pytest.fixture
def small_embedding(tmp_path):
    """Makes a copy of a model whose tokenizer knows a word, `more`, that its embedding has not."""

    def copied(model):
        folder = shutil.copytree(model, tmp_path / "small" / model.parent.name)
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens(["more"])
        tokenizer.save_pretrained(folder)
        return folder

    return copied


def test_a_prompt_that_the_student_cannot_read_gives_no_samples_and_the_others_do(
    teacher, student, small_embedding, tmp_path, own_store, capsys
):
    """Its references fail alone too, and what is evaluated on it is an error that names it."""
    teacher, student = small_embedding(teacher), small_embedding(student)
    train, held_out = ["w1 w2", "w3 more", "w5 w6"], ["w7 w8", "w9 more"]
    write_texts(tmp_path / "p.parquet", train=train, validation=held_out, test=["w1", "w2 more"])
    params = make_params(teacher)
    summary = score(params, tmp_path / "p.parquet", student, tmp_path / "scored")
    said = " ".join(capsys.readouterr().err.split())
    assert "prompt 'w3-more' left out by the student: it has token 44, and the model" in said
    identity = Teacher.of(params.generate).student(student, 8).identity
    of_student, of_teacher = ([each["prompt_id"] for each in skipped(own_store, name)] for name in (identity, "*"))
    assert set(of_student) == {"w3-more", "w9-more"}
    assert summary.skipped == len(of_teacher) - len(of_student) and set(of_teacher) - {"w9-more"} == {"w3-more"}
    rows = [(name, row) for name in ("negatives", "samples") for row in Selection(tmp_path / "scored").rows(name)]
    found = {(name, row.prompt_id) for name, row in rows if row.origin == "student"}
    assert found == {("negatives", "w1-w2"), ("negatives", "w5-w6"), ("samples", "w7-w8")}
    write_texts(tmp_path / "none.parquet", train=["more"], validation=["w1 more"])
    with pytest.raises(UserError, match=r"none of .* rows could be made by the student; the first: it has token 44"):
        score(params, tmp_path / "none.parquet", student, tmp_path / "none")
    generate(params, tmp_path / "p.parquet", tmp_path / "out")
    with pytest.raises(UserError, match=r"the model .* gave no answer to row w2-more: it has token 44, and the model"):
        evaluate(params, tmp_path / "p.parquet", {"student": student}, tmp_path / "out", tmp_path / "evaluation")


def test_a_prompt_longer_than_the_student_reads_gives_no_samples(teacher, tmp_path, capsys):
    short = make_model(tmp_path / "short", seed=1, width=32, layers=1, context=10)
    write_texts(tmp_path / "p.parquet", train=["w1 w2", "w1 w2 w3 w4 w5 w6"], validation=["w7 w8"])
    score(make_params(teacher), tmp_path / "p.parquet", short, tmp_path / "scored")
    assert "prompt 'w1-w2-w3-w4-w5-w6' left out by the student: a prompt of 7 tokens" in " ".join(
        capsys.readouterr().err.split()
    )
    samples = [row for row in Selection(tmp_path / "scored").rows("negatives") if row.origin == "student"]
    assert {row.prompt_id for row in samples} == {"w1-w2"}


def write_texts(path, **splits) -> None:
    prompts = [(split, text) for split, texts in splits.items() for text in texts]
    write_prompts(path, [Prompt(text.replace(" ", "-"), text, ("w1 w2",), split) for split, text in prompts])


def test_training_prompts_with_the_tokens_of_held_out_ones_are_left_out(teacher, student, tmp_path, own_store, capsys):
    """Words that the tokenizer does not know are one token, so that these prompts read the same."""
    train = ["w1 aaa", "w1 w2", "w3 ccc", "w5"]
    write_texts(tmp_path / "p.parquet", train=train, validation=["w1 bbb", "w7"], test=["w3 ddd"])
    results = tmp_path / "results.json"
    params = stub_params(teacher)
    generate(params, tmp_path / "p.parquet", tmp_path / "out", results=results)
    assert "2 training prompts have the token ids of held-out prompts" in " ".join(capsys.readouterr().err.split())
    assert json.loads(results.read_text())["cost"]["prompts_overlapping"] == 2
    selection = Selection(tmp_path / "out")
    rows = {part: list(selection.rows(part)) for part in selection.parts}
    assert {row.prompt_id for row in rows["train"]} == {"w1-w2", "w5"}
    assert {row.prompt_id for row in rows["validation"]} == {"w1-bbb", "w7"}
    score(params, tmp_path / "p.parquet", student, tmp_path / "scored")
    references = Selection(tmp_path / "scored").rows("references")
    assert {row.prompt_id for row in references} == {"w1-w2", "w5"}


# Rows that are read a second time


def test_a_selection_is_the_same_before_and_after_its_rows_were_widened(teacher, tmp_path, own_store):
    """The second reading differs in its last bits, and what was stored first may be gone by then."""
    prompts = make_prompts(tmp_path / "prompts.parquet", train=30, validation=3)
    narrow, wide = (make_params(teacher, "generate.support=topk", f"generate.k={k}") for k in (4, 12))
    generate(narrow, prompts, tmp_path / "before")
    stored = set(shards(own_store))
    generate(wide, prompts, tmp_path / "wide")
    for shard in stored:
        shard.unlink()
    assert generate(narrow, prompts, tmp_path / "after").made == 0
    for part in ("train", "validation", "scored"):
        rows = (Selection(tmp_path / name).rows(part) for name in ("before", "after"))
        for before, after in zip(*rows, strict=True):
            np.testing.assert_allclose(after.tail, before.tail, atol=1e-3)  # the one value that is of both readings
            assert row_digest(replace(after, tail=before.tail)) == row_digest(before)
    check = {}
    for row in Selection(tmp_path / "wide").rows("train"):
        part = Selection(tmp_path / "wide").part("train")
        check = check or RowCheck(part["request"], part["request_identity"], 12, 44, "topk")
        assert check.fault(row) is None


def test_a_row_without_a_token_keeps_its_k():
    """An empty response that was scored: [0, k], also where no other row of the file has a token."""

    def row(response: list[int], k: int) -> Row:
        ids = np.array(response, np.int32)
        values = np.zeros(len(ids), np.float32)
        topk = np.tile(np.arange(k, dtype=np.int32), (len(ids), 1))
        key = score_key(np.ones(1, np.int32), ids)
        return Row(key, "reference", "p", 0, "", "", np.ones(1, np.int32), ids, "length", values, topk,
                   np.full(topk.shape, -1, np.float16), values)  # fmt: skip

    empty, other = from_table(to_table([row([], 3), row([1, 2], 3)]))
    assert empty.topk_ids.shape == empty.topk_logprobs.shape == (0, 3) and other.topk_ids.shape == (2, 3)
    (alone,) = from_table(to_table([row([], 3)]))
    assert len(alone.topk_ids) == 0
    assert RowCheck({"kind": "score"}, "", 3, 44, "topk").fault(alone) is None


def test_an_empty_response_is_widened_alone_and_among_others(teacher, tmp_path):
    """Its k cannot be read off a row group in which no row has a token."""
    model = Path(shutil.copytree(teacher, tmp_path / "model"))
    state = json.loads((model / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "_"}, "content": ""}  # "_" is no token
    (model / "tokenizer.json").write_text(json.dumps(state))
    prompts, given = make_prompts(tmp_path / "prompts.parquet", train=1), tmp_path / "given.jsonl"

    def select(k: int, *responses: str, out: str = "out", store: str = "store") -> list[int]:
        lines = [json.dumps({"prompt": "w0 w0 w0", "response": text, "finish": "length"}) for text in responses]
        given.write_text("\n".join(lines))
        params = make_params(model, f"generate.responses={given}", f"generate.k={k}")
        generate(params, prompts, tmp_path / out, tmp_path / store)
        return [len(row.response_ids) for row in Selection(tmp_path / out).rows("train")]

    assert select(4, "w1 w2", "_") == [2, 0]
    assert select(8, "w1 w2") == [2]
    assert select(8, "w1 w2", "_") == [2, 0]  # the empty one alone is widened
    assert select(12, "w1 w2", "_") == [2, 0]  # both
    assert select(12, "w1 w2", "_", out="new", store="new") == [2, 0]
    rows = (list(Selection(tmp_path / out).rows("train")) for out in ("out", "new"))
    for widened, at_once in zip(*rows, strict=True):
        assert (widened.topk_ids == at_once.topk_ids).all()
    assert select(4, "_", store="empty") == select(8, "_", store="empty") == [0]


def test_an_empty_response_is_scored_as_such(teacher):
    ask = Ask("empty", np.array([1, 5], np.int32), response_ids=np.empty(0, np.int32))
    answer = by_key(
        HfEngine(load_lm(teacher)).score([ask, *[replace(ask, key="other", response_ids=np.array([4]))]], 3, (2,))
    )
    assert len(answer["empty"].logprobs) == len(answer["empty"].topk_ids) == 0 and len(answer["other"].logprobs) == 1


# What counts as damage


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, IndexError, ValueError, MemoryError])
def test_an_error_of_our_own_code_sets_no_shard_aside(teacher, tmp_path, own_store, monkeypatch, error):
    prompts = make_prompts(tmp_path / "prompts.parquet", train=5)
    generate(stub_params(teacher), prompts, tmp_path / "out")
    before = shards(own_store)

    def fail(*_):
        raise error("a slip of ours")

    monkeypatch.setattr("pipeline.store.checks._count_fault", fail)
    with pytest.raises(error, match="a slip of ours"):
        generate(stub_params(teacher), prompts, tmp_path / "out")
    assert shards(own_store) == before and not list(own_store.rglob("damaged"))


def test_an_error_of_our_own_code_while_rows_are_read_is_not_hidden(teacher, tmp_path, own_store, monkeypatch):
    prompts = make_prompts(tmp_path / "prompts.parquet", train=5)
    generate(stub_params(teacher), prompts, tmp_path / "out")
    folder = RequestFolder(own_store, *shards(own_store)[0].relative_to(own_store).parts[:2])
    locations = [location for found in folder.index().values() for location in found]
    monkeypatch.setattr("pipeline.store.requests.group_ends", lambda *_: {}["a slip of ours"])
    with pytest.raises(KeyError, match="a slip of ours"):
        folder.read(locations)

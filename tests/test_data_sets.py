"""What holds for data sets: any common form is read, columns are mapped, and training never overlaps with testing."""

import json

import datasets
import polars as pl
import pytest

from pipeline.errors import UserError
from pipeline.models import load_tokenizer
from pipeline.params import DataSet
from pipeline.prompts import PromptFormat, read_prompts
from pipeline.records import fill, load_records, texts_at
from pipeline.tasks.gsm8k import extract
from stages.data_sets import draw_records
from tests.conftest import WORDS, run_cli

PLAIN = PromptFormat("{prompt}")


def rows(count, start=0):
    return [{"question": f"w{i % 40} w{i // 40} w1", "answer": f"w2 w{i % 40}"} for i in range(start, start + count)]


def records(train, **others):
    return {name: datasets.Dataset.from_list(part) for name, part in ({"train": train} | others).items()}


def settings(**changes):
    return DataSet(**({"path": "here", "prompt": "{question}", "references": "answer"} | changes))


SIZES = {"teach": 5, "train": 20, "validation": 4, "test": 6}
REST = {"teach": 0, "train": 99, "validation": 1, "test": 1}  # training takes whatever is there


def split_texts(prompts):
    return {split: {p.prompt for p in prompts if p.split == split} for split in SIZES}


@pytest.fixture(scope="module")
def tokenizer(teacher):
    return load_tokenizer(teacher)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "folder", "datasets"])
def test_every_common_form_gives_the_same_records(tmp_path, form):
    frame = pl.DataFrame(rows(9))
    path = tmp_path / f"data.{form}"
    if form == "jsonl":
        frame.write_ndjson(path)
    elif form == "csv":
        frame.write_csv(path)
    elif form == "parquet":
        frame.write_parquet(path)
    elif form == "folder":
        path.mkdir()
        frame.write_ndjson(path / "train.jsonl")
        frame.head(2).write_ndjson(path / "dev.jsonl")
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows(9))}).save_to_disk(path)
    found = load_records(str(path), config="ignored here")
    assert found["train"].to_list() == rows(9)
    assert set(found) == ({"train", "validation"} if form == "folder" else {"train"})


@pytest.mark.parametrize(
    ("path", "message"),
    [("data.txt", "are read from"), ("./none/at/all", "no data set at"), ("broken.jsonl", "cannot read the data set")],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("text")
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=message):
        load_records(path)


def test_columns_are_mapped_without_running_anything_in_the_data():
    record = {"translation": {"en": "a {dog}", "de": "ein Hund"}, "source": ["One.", "Two."], "n": 3, "none": None}
    assert fill("Translate: {translation.en} ({n}){none}", record) == "Translate: a {dog} (3)"
    assert fill("{source}", record) == "One. Two."
    assert texts_at(record, "translation.de") == ["ein Hund"]
    assert texts_at(record, "source") == ["One.", "Two."]
    for bad in ("translation.fr", "n.real", "__class__"):
        with pytest.raises(KeyError, match="no column"):
            fill(f"{{{bad}}}", record)


def test_a_missing_column_names_file_split_and_row(tokenizer):
    with pytest.raises(UserError, match=r"here, split train, row 1: no column 'text'; found question, answer"):
        draw_records(records(rows(9)), settings(prompt="{text}"), SIZES, tokenizer, PLAIN, 0)
    with pytest.raises(UserError, match=r"no split 'training'.*found train"):
        draw_records(records(rows(9)), settings(train_split="training"), SIZES, tokenizer, PLAIN, 0)


def test_splits_are_disjoint_whatever_the_data_set_has():
    for given in (records(rows(200)), records(rows(200), test=rows(50, 100)), records(rows(99), validation=rows(99))):
        prompts, _ = draw_records(given, settings(), SIZES, None, PLAIN, 0)
        texts = split_texts(prompts)
        assert {split: len(found) for split, found in texts.items()} == SIZES
        assert sum(map(len, texts.values())) == len(set().union(*texts.values()))


def test_training_rows_that_differ_from_test_rows_in_case_and_punctuation_only_are_left_out():
    train = [{"question": f"W{i % 40},  w{i // 40} w1?", "answer": "w2"} for i in range(30)]
    prompts, counts = draw_records(records(train, test=rows(10)), settings(), SIZES | {"test": 10}, None, PLAIN, 0)
    assert counts["test"] == {"kept": 10}
    overlapping = sum(n for split in SIZES for why, n in counts[split].items() if why == "overlaps with test")
    assert overlapping == 10 and sum(p.split != "test" for p in prompts) == 20


def test_the_draw_depends_on_seed_and_text_and_not_on_the_order_of_the_file():
    one, _ = draw_records(records(rows(90)), settings(), SIZES, None, PLAIN, 0)
    other, _ = draw_records(records(rows(90)[::-1]), settings(), SIZES, None, PLAIN, 0)
    seeded, _ = draw_records(records(rows(90)), settings(), SIZES, None, PLAIN, 1)
    assert one == other and one != seeded


def test_what_is_too_long_is_counted_and_nothing_is_truncated(tokenizer):
    given = [{"question": f"w{i} " + "w1 " * (i % 3), "answer": "w2 " * (1 + i // 20)} for i in range(40)]
    limits = settings(max_prompt_tokens=3, max_reference_tokens=2)  # with <s> and </s>
    prompts, counts = draw_records(records(given), limits, REST, tokenizer, PLAIN, 0)
    kept = {p.prompt for p in prompts}
    assert kept == {row["question"].strip() for i, row in enumerate(given) if i % 3 < 2 and i < 20}
    total = sum((counts[split] for split in SIZES), start=type(counts["test"])())
    assert total["prompt longer than 3 tokens"] == 13 and total["kept"] == len(kept) == 14
    assert total["reference longer than 2 tokens"] == 40 - 13 - 14


def test_empty_and_repeated_rows_are_counted():
    given = [*rows(10), *rows(3), {"question": " ", "answer": "w1"}, {"question": "w9 w9", "answer": ""}]
    prompts, counts = draw_records(records(given), settings(), REST, None, PLAIN, 0)
    assert len(prompts) == 10
    left_out = sum((counts[split] for split in SIZES), start=type(counts["test"])())
    assert left_out["without prompt or reference"] == 2
    assert sum(n for why, n in left_out.items() if why == "repeated" or why.startswith("overlaps")) == 3


def test_shots_lead_every_prompt_and_are_used_for_nothing_else(tokenizer):
    few = settings(shots=2, shot="{prompt} => {reference} ;; ")
    prompts, counts = draw_records(records(rows(60)), few, SIZES, tokenizer, PLAIN, 0)
    leads = {prompt.prompt.rpartition(" ;; ")[0] for prompt in prompts}
    (lead,) = leads
    shots = [shot.split(" => ")[0] for shot in lead.split(" ;; ")]
    assert len(shots) == 2 == counts["shots"]["kept"]
    assert not set(shots) & {prompt.prompt.rpartition(" ;; ")[2] for prompt in prompts}


def test_references_lose_what_the_pattern_matches():
    given = [{"question": f"w{i}", "answer": "2 <<1+1=2>>apples\n#### 2"} for i in range(9)]
    prompts, _ = draw_records(records(given), settings(remove="<<[^>]*>>"), REST, None, PLAIN, 0)
    assert {p.references for p in prompts} == {("2 apples\n#### 2",)}


def test_prepare_reads_a_data_set_and_leaves_counts(tmp_path, teacher):
    pl.DataFrame(rows(60)).write_ndjson(tmp_path / "data.jsonl")
    given = {
        "task": "gsm8k", "tokenizer": str(teacher), "dataset.path": str(tmp_path / "data.jsonl"),
        "dataset.prompt": "'{question}'", "dataset.references": "answer", "teach": 0, "train": 20, "validation": 4,
        "test": 6,
    }  # fmt: skip
    options = [option for key, value in given.items() for option in ("--set", f"prepare.{key}={value}")]
    done = run_cli("prepare", "--params", "/dev/null", *options, "--out", tmp_path / "p" / "p.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 prompts" in done.stderr
    assert len(read_prompts(tmp_path / "p" / "p.parquet", ("train",))) == 20
    counts = json.loads((tmp_path / "p" / "p-counts.json").read_text())
    assert counts["test"]["kept"] == 6 and counts["teach"] == {}
    assert load_tokenizer(tmp_path / "data" / "tokenizer").convert_tokens_to_ids(WORDS[0]) > 3
    again = run_cli("prepare", "--params", "/dev/null", *options, "--out", tmp_path / "p" / "p.parquet",
                    "--tokenizer", tmp_path / "data" / "tokenizer", cwd=tmp_path)  # fmt: skip
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,200.00", "1200"),
        ("The total is $1,234.50.", "1234.5"),
        ("first 3, then 5 apples.", "5"),
        ("#### -4 and not 5", "-4"),
        ("#### 0.0", "0"),
        ("no number", None),
        ("9 #### none", None),
    ],
)
def test_the_answer_of_a_word_problem_is_the_marked_or_the_last_number(text, answer):
    assert extract(text) == answer

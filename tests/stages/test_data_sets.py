"""What holds for data sets: any common form is read, columns are mapped, and training never overlaps with testing."""

import json

import datasets
import polars as pl
import pytest

from pipeline.errors import UserError
from pipeline.models import load_tokenizer
from pipeline.params import DataSet
from pipeline.prompts import PromptFormat, read_prompts
from pipeline.prompts.records import fill, find_split, load_records, texts_at
from stages.prepare.data_sets import draw_records
from tests.conftest import WORDS, run_cli
from tests.published import write_dialogsum, write_jsonl, write_lines, write_multi30k

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


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "parquet", "folder", "datasets"])
def test_every_common_form_gives_the_same_records(tmp_path, form):
    frame = pl.DataFrame(rows(9))
    path = tmp_path / f"data.{form}"
    if form.startswith("jsonl"):
        write_jsonl(path, rows(9))
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
    assert list(found["train"]) == rows(9)
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
    assert texts_at(record, ["translation.de"]) == ["ein Hund"]
    assert texts_at(record, ["source"]) == ["One.", "Two."]
    for bad in ("translation.fr", "n.real", "__class__"):
        with pytest.raises(LookupError, match="no column"):
            fill(f"{{{bad}}}", record)


def test_a_missing_column_names_file_split_and_row(tokenizer):
    with pytest.raises(UserError, match=r"here, split train, row 1: no column 'text'; found question, answer"):
        draw_records(records(rows(9)), settings(prompt="{text}"), SIZES, tokenizer, PLAIN, 0)
    with pytest.raises(UserError, match=r"no split 'fit'.*found train"):
        draw_records(records(rows(9)), settings(train_split="fit"), SIZES, tokenizer, PLAIN, 0)


def test_a_column_that_is_no_text_says_what_is_in_it():
    record = {"translation": {"en": "a", "de": "b"}, "image": b"\x00", "answers": [{"text": "a"}]}
    for template, message in (
        ("{translation}", "inside it are en, de"),
        ("{image}", "found b'"),
        ("{answers}", "text"),
    ):
        with pytest.raises(LookupError, match=message):
            fill(template, record)
    with pytest.raises(LookupError, match=r"no column 'translation.fr'; found en, de"):
        fill("{translation.fr}", record)


def test_of_several_columns_those_that_a_row_has_are_used():
    record = {"a": "one", "b": None, "c": ["two", "three"], "d.e": "four"}
    assert texts_at(record, ["a", "b", "c", "z"]) == ["one", "two", "three"]
    assert fill("{z|b|a} {d.e}", record) == "one four" and fill("{b}", record) == ""
    for read in (lambda: texts_at(record, ["y", "z"]), lambda: fill("{y|z}", record)):
        with pytest.raises(LookupError, match=r"none of the columns y, z; found a, b, c, d\.e"):
            read()


def test_dialogsum_is_read_as_its_authors_ship_it(tmp_path):
    found = load_records(str(write_dialogsum(tmp_path)))
    assert list(found) == ["train", "validation", "test"]
    mapped = settings(prompt="{dialogue}", references=["summary", "summary1", "summary2", "summary3"])
    prompts, counts = draw_records(found, mapped, {"teach": 0, "train": 20, "validation": 5, "test": 6}, None, PLAIN, 0)
    assert {split: counts[split]["kept"] for split in ("train", "validation", "test")} == dict(
        train=20, validation=5, test=6
    )
    assert {(p.split, len(p.references)) for p in prompts} == {("train", 1), ("validation", 1), ("test", 3)}
    (first,) = (p for p in prompts if "w25 w2" in p.prompt)
    assert first.references == ("w25 w5 w1", "w25 w5 w2", "w25 w5 w3") and first.prompt.startswith("#Person1#: w25 w2")
    with pytest.raises(UserError, match=r"split test, row 1: no column 'summary'; found fname, dialogue, summary1"):
        draw_records(found, settings(prompt="{dialogue}", references="summary"), SIZES, None, PLAIN, 0)


def test_a_list_in_one_file_and_a_text_in_another_are_both_references(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": f"w{i}", "answer": f"w{i}"} for i in range(9)])
    write_jsonl(tmp_path / "test.jsonl", [{"question": f"w{i}", "answer": ["a", "b"]} for i in range(9, 12)])
    prompts, _ = draw_records(load_records(str(tmp_path)), settings(), REST | {"test": 3}, None, PLAIN, 0)
    assert {(p.split, len(p.references)) for p in prompts} == {("train", 1), ("validation", 1), ("test", 2)}


@pytest.mark.parametrize("packed", [True, False])
def test_multi30k_is_read_as_its_authors_ship_it(tmp_path, packed):
    """A file a language; a line ends with a line feed, whatever else Unicode calls a line."""
    write_multi30k(tmp_path, packed=packed)
    write_lines(tmp_path / "README.md", ["about"])
    write_lines(tmp_path / f"val.en{'.gz' * packed}", ["w20 \u2028 w2\r", "w21 \x85", "w22 \x0b", "", "w24"])
    found = load_records(str(tmp_path))
    assert sorted(found) == ["test_2016_flickr", "test_2017_flickr", "train", "val"]
    mapped = settings(test_split="test_2016_flickr", prompt="{en}", references="de")
    prompts, counts = draw_records(found, mapped, {"teach": 0, "train": 20, "validation": 5, "test": 6}, None, PLAIN, 0)
    assert {p.prompt: p.references for p in prompts if p.split == "test"}["w26 w2 ."] == ("w26 w5 .",)
    assert {p.prompt: p.references for p in prompts if p.split == "validation"} == {
        text: (f"w{i} w5 .",) for text, i in (("w20 \u2028 w2", 20), ("w21", 21), ("w22", 22), ("w24", 24))
    }
    assert counts["validation"] == {"kept": 4, "without prompt or reference": 1}
    with pytest.raises(UserError, match=r"set dataset\.test_split to test_2016_flickr or test_2017_flickr"):
        draw_records(found, settings(prompt="{en}", references="de"), SIZES, None, PLAIN, 0)
    with pytest.raises(UserError, match="no column 'nl'; found de, en, fr"):
        draw_records(found, mapped.model_copy(update={"references": ["nl"]}), SIZES, None, PLAIN, 0)


def test_parallel_files_of_unequal_length_are_named_both(tmp_path):
    write_lines(tmp_path / "train.en", ["a", "b"])
    write_lines(tmp_path / "train.de", ["a", "b", "c"])
    with pytest.raises(UserError, match=r"train\.de has 3, .*train\.en has 2"):
        list(load_records(str(tmp_path))["train"])
    (tmp_path / "train.en").write_bytes(b"a\n\xff\nc\n")
    with pytest.raises(UserError, match=r"train\.en cannot be read as UTF-8 text"):
        list(load_records(str(tmp_path))["train"])
    write_lines(tmp_path / "train.en.gz", ["a", "b", "c"])
    (tmp_path / "train.en").unlink()
    assert [row["en"] for row in load_records(str(tmp_path))["train"]] == ["a", "b", "c"]
    (tmp_path / "train.en.gz").write_bytes(b"not packed")
    with pytest.raises(UserError, match=r"train\.en\.gz cannot be read"):
        list(load_records(str(tmp_path))["train"])


def test_a_split_is_found_by_the_word_for_it_in_its_name():
    assert find_split({"corpus.dev.tok": 1, "train_v2": 1}, "validation") == "corpus.dev.tok"
    assert find_split({"corpus.dev.tok": 1, "train_v2": 1}, "train") == "train_v2"
    assert find_split({"latest": 1, "train": 1}, "test") is None
    assert find_split({"test_b": 1}, "test_a") is None  # a name of its own means this one and no other
    assert find_split({"test_a": 1, "test": 1}, "test") == "test"
    with pytest.raises(UserError, match=r"set dataset\.test_split to test_a or test_b"):
        find_split({"test_a": 1, "test_b": 1}, "test")


def test_held_out_prompts_come_from_the_training_split_only_where_none_was_asked_for(capsys):
    draw_records(records(rows(99)), settings(), SIZES, None, PLAIN, 0)
    assert "no split 'test': prompts of 'train' are held out for it" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no split 'tset' \(dataset.test_split\); found train"):
        draw_records(records(rows(99)), settings(test_split="tset"), SIZES, None, PLAIN, 0)


def test_splits_are_disjoint_whatever_the_data_set_has():
    for given in (records(rows(200)), records(rows(200), test=rows(50, 100)), records(rows(99), validation=rows(99))):
        prompts, _ = draw_records(given, settings(), SIZES, None, PLAIN, 0)
        texts = split_texts(prompts)
        assert {split: len(found) for split, found in texts.items()} == SIZES
        assert sum(map(len, texts.values())) == len(set().union(*texts.values()))


def test_prompts_for_the_student_alone_are_training_records_that_no_other_split_has():
    repeated = [{"question": row["question"].upper(), "answer": "w3"} for row in rows(9, 60)]
    for given in (records(rows(69) + repeated), records(rows(69) + repeated, test=rows(40, 50))):
        without, counts = draw_records(given, settings(), SIZES, None, PLAIN, 0)
        found, counted = draw_records(given, settings(), SIZES | {"student": 99}, None, PLAIN, 0)
        assert found[: len(without)] == without and counts == {split: counted[split] for split in counts}
        own = {prompt.prompt.lower() for prompt in found[len(without) :]}
        texts = {prompt.prompt.lower() for prompt in without}
        assert {prompt.split for prompt in found[len(without) :]} == {"student"}
        assert own == {row["question"].lower() for row in given["train"]} - texts
        assert len(own) == counted["student"]["kept"] == len(found) - len(without)


def test_prompts_for_the_student_alone_are_measured_like_all_others(tokenizer):
    given = [{"question": f"w{i}" + " w1" * (i % 2), "answer": "w2"} for i in range(2, 40)]
    sizes = REST | {"train": 5, "student": 99}
    prompts, counts = draw_records(records(given), settings(max_prompt_tokens=2), sizes, tokenizer, PLAIN, 0)
    assert counts["student"]["kept"] == 19 - 7 and counts["student"]["prompt longer than 2 tokens"] > 0
    assert all(" " not in prompt.prompt for prompt in prompts)


def test_a_data_set_without_a_prompt_left_for_the_student_says_so():
    with pytest.raises(UserError, match=r"nothing is left for student: no rows\. Lower prepare\.train"):
        draw_records(records(rows(35)), settings(), SIZES | {"student": 1}, None, PLAIN, 0)


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
        "dataset.prompt": "{question}", "dataset.references": "answer", "teach": 0, "train": 20, "validation": 4,
        "test": 6,
    }  # fmt: skip
    options = [option for key, value in given.items() for option in ("--set", f"prepare.{key}={value}")]
    done = run_cli("prepare", "--params", "/dev/null", *options, "--out", tmp_path / "p" / "p.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 prompts" in done.stdout
    assert len(read_prompts(tmp_path / "p" / "p.parquet", ("train",))) == 20
    counts = json.loads((tmp_path / "p" / "p-counts.json").read_text())
    assert counts["test"]["kept"] == 6 and counts["teach"] == {}
    assert load_tokenizer(tmp_path / "data" / "tokenizer").convert_tokens_to_ids(WORDS[0]) > 3
    again = run_cli("prepare", "--params", "/dev/null", *options, "--out", tmp_path / "p" / "p.parquet",
                    "--tokenizer", tmp_path / "data" / "tokenizer", cwd=tmp_path)  # fmt: skip
    assert again.returncode == 0, again.stderr

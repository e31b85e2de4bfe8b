"""What holds for prompt files and for the splits of the built-in tasks."""

import json
from hashlib import sha256

import polars as pl
import pytest

from pipeline.errors import UserError
from pipeline.params import Params
from pipeline.params.file import load_params
from pipeline.prompts import Prompt, read_prompts, render, write_prompts
from pipeline.tasks import TASKS
from stages.prepare import check_disjoint, draw, prepare, split_of


def write_jsonl(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_prompt_file_reads_back_as_written(tmp_path):
    prompts = [Prompt("a", "one { two", ("x", "y"), "train"), Prompt("b", "three", (), "test")]
    write_prompts(tmp_path / "p.parquet", prompts)
    assert read_prompts(tmp_path / "p.parquet") == prompts
    assert read_prompts(tmp_path / "p.parquet", ("test",)) == prompts[1:]


def test_jsonl_needs_only_a_prompt(tmp_path):
    (found,) = read_prompts(write_jsonl(tmp_path / "p.jsonl", {"prompt": "hello"}, ""))
    assert (found.prompt, found.references, found.split) == ("hello", (), "train") and len(found.id) == 16


def test_references_are_a_list_or_one_text(tmp_path):
    rows = [{"prompt": "a", "references": ["b", "c"]}, {"prompt": "d", "references": "e"}, {"prompt": "f"}]
    rows += [{"prompt": "g", "references": None}, {"prompt": "h", "references": ""}]
    found = read_prompts(write_jsonl(tmp_path / "p.jsonl", *rows))
    assert [prompt.references for prompt in found] == [("b", "c"), ("e",), (), (), ()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "hello"}], "row 1 has no column 'prompt'; found question"),
        ([{"prompt": "a"}, {"prompt": " "}], "row 2 has an empty prompt"),
        ([{"prompt": "a", "id": 7}, {"prompt": "b", "id": "7"}], "row 2 repeats id '7' of row 1"),
        ([{"prompt": "a", "id": 0}, {"prompt": "a", "id": 1}], "row 2 repeats the prompt of row 1"),
        ([{"prompt": None}], "row 1: 'prompt' must be text, found null"),
        ([{"prompt": 5}], "row 1: 'prompt' must be text, found 5 (int)"),
        ([{"prompt": ["a", "b"]}], "row 1: 'prompt' must be text, found ['a', 'b'] (list)"),
        ([{"prompt": "a", "references": 5}], "row 1: 'references' must be text, found 5"),
        ([{"prompt": "a", "references": ["b", None]}], "row 1: 'references' must be text, found null"),
        ([{"prompt": "a", "split": "dev"}], "row 1 has split 'dev'; known: teach, train"),
        (["{broken"], "row 1 is not JSON"),
        (["[1]"], "row 1 is not a JSON object"),
        ([], "holds no prompts"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(UserError) as error:
        read_prompts(write_jsonl(tmp_path / "p.jsonl", *rows))
    assert message in str(error.value) and "p.jsonl" in str(error.value)


def test_files_that_are_absent_or_of_another_kind_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no prompt file at .*absent"):
        read_prompts(tmp_path / "absent.parquet")
    (tmp_path / "p.txt").write_text("x")
    with pytest.raises(UserError, match=r"\.parquet or \.jsonl"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.parquet").write_text("x")
    with pytest.raises(UserError, match="not a Parquet file"):
        read_prompts(tmp_path / "p.parquet")


def test_braces_in_a_prompt_mean_nothing():
    assert render("Q: {prompt} {x}", "{prompt} {0}") == "Q: {prompt} {0} {x}"


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.generator])
def test_splits_are_disjoint_by_construction(name):
    """A prompt's split is a function of its text: other seeds and sizes cannot move it."""
    sizes = {"teach": 300, "train": 100, "validation": 30, "test": 50}
    prompts = [prompt for seed in (0, 1) for prompt in draw(TASKS[name], sizes, seed)]
    assert all(prompt.split == split_of(prompt.prompt) for prompt in prompts)
    assert len({prompt.id for prompt in prompts[:480]}) == 480
    texts = {split: {p.prompt for p in prompts if p.split == split} for split in sizes}
    assert not texts["test"] & (texts["teach"] | texts["train"] | texts["validation"])
    check_disjoint(prompts)
    moved = Prompt("x", prompts[0].prompt, (), "test")
    with pytest.raises(UserError, match="is in teach and in"):
        check_disjoint([*prompts, moved])


def test_more_prompts_leave_the_first_ones_as_they_are():
    small, large = ([*draw(TASKS["arithmetic"], {"train": n, "test": 5}, 0)] for n in (20, 40))
    assert [p for p in large if p.split == "train"][:20] == small[:20]


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.generator])
def test_prompts_for_the_student_alone_are_new_and_change_no_other_split(name):
    sizes = {"teach": 100, "train": 30, "validation": 5, "test": 10}
    without, found = list(draw(TASKS[name], sizes, 0)), list(draw(TASKS[name], sizes | {"student": 20}, 0))
    assert found[: len(without)] == without
    own = found[len(without) :]
    assert len({prompt.prompt for prompt in own}) == 20 and {prompt.split for prompt in own} == {"student"}
    assert not {prompt.prompt for prompt in own} & {prompt.prompt for prompt in without}
    assert {split_of(prompt.prompt) for prompt in own} == {"train"}  # so in no other split, whatever the seed
    more = [prompt for prompt in draw(TASKS[name], sizes | {"train": 50}, 0) if prompt.split == "train"]
    assert [prompt.prompt for prompt in more[30:]] == [prompt.prompt for prompt in own]


@pytest.mark.parametrize(
    ("name", "digest"),
    [("arithmetic", "ed48cec91fbd"), ("translation", "0376f287d516"), ("summarisation", "c874817588149")],
)
def test_a_seed_draws_the_prompts_that_it_always_drew(name, digest):
    """Whatever happens to a task's metrics: cached answers stay those of the same prompts."""
    prompts = draw(TASKS[name], {"train": 30, "test": 10}, 0)
    assert sha256("\n".join(prompt.prompt for prompt in prompts).encode()).hexdigest().startswith(digest)


def test_a_task_that_runs_out_of_prompts_says_so():
    from pipeline.tasks import Example, Generator, Task

    tiny = Task("tiny", 1, (), Generator(lambda rng: Example(str(rng.randint(0, 2000)), ("x",)), list))
    for sizes in ({"teach": 3000}, {"teach": 10, "validation": 500}, {"train": 100, "student": 500}):
        with pytest.raises(UserError, match="too few distinct prompts"):
            list(draw(tiny, sizes, 0))


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.generator])
def test_prepare_writes_plain_files_and_a_tokenizer_that_knows_every_word(tmp_path, name):
    from pipeline.models import load_tokenizer

    params = load_params(
        None,
        [f"prepare.task={name}", "prepare.teach=200", "prepare.train=50", "prepare.validation=20", "prepare.test=20"],
    )
    for folder in ("a", "b"):
        prepare(params, tmp_path / folder / "p.parquet", tmp_path / folder / "tokenizer")
    frame = pl.read_parquet(tmp_path / "a" / "p.parquet")
    assert frame.columns == ["id", "prompt", "references", "split"] and frame.height == 290
    for file in ("p.parquet", "tokenizer/tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer")
    texts = [render(Params().template, prompt) for prompt in frame["prompt"]] + frame["references"].explode().to_list()
    assert tokenizer.unk_token_id not in {i for ids in tokenizer(texts)["input_ids"] for i in ids}
    text = frame["references"][0][0]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_only_the_counts_of_prompts_that_were_asked_for_name_the_student(tmp_path):
    """A folder of an experiment without such prompts is prepared again with them, and back."""
    sizes = [f"prepare.{split}=5" for split in ("teach", "train", "validation", "test")]
    paths = tmp_path / "prompts.parquet", tmp_path / "tokenizer"
    written = []
    for student in (0, 3, 0):
        prepare(load_params(None, [*sizes, f"prepare.student={student}"]), *paths)
        written.append([paths[0].read_bytes(), (tmp_path / "counts.json").read_bytes()])
        assert len(read_prompts(paths[0], ("student",))) == student
        if student:
            assert json.loads(written[-1][1])["student"] == {"kept": student}
    assert written[0] == written[2] and b"student" not in written[0][1]

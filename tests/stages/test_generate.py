"""What holds for generating: nothing is asked twice, nothing stored is lost, and the selection is always the same."""

import signal
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.cli.dry_run import dry_run
from pipeline.engines import Failure
from pipeline.engines.stub import StubEngine
from pipeline.errors import UserError
from pipeline.models import load_config
from pipeline.prompts import Prompt, prompt_id, read_prompts, write_prompts
from pipeline.store.requests import RequestFolder
from pipeline.store.selection import Selection
from stages.generate import Summary, generate
from tests.conftest import ROOT, WORDS, make_params, make_prompts, run_cli
from tests.processes import Run, start


class Recorder(StubEngine):
    """A stub that remembers what it was asked, may fail on one row, and may die after some answers."""

    def __init__(self, folder, refuse: str | None = None, die_after: int | None = None):
        super().__init__(load_config(folder).vocab_size)
        self.sampled, self.scored, self.refuse, self.die_after = [], [], refuse, die_after

    def sample(self, asks, sampling, k, support="topk"):
        for number, answer in enumerate(super().sample(asks, sampling, k, support)):
            if number == self.die_after:
                raise RuntimeError("the engine died")
            self.sampled.append(answer.key)
            yield Failure(answer.key, "refused") if answer.key == self.refuse else answer

    def score(self, asks, k, stop_token_ids, support="topk"):
        for answer in super().score(asks, k, stop_token_ids, support):
            self.scored.append(answer.key)
            yield answer


@pytest.fixture
def prompts(tmp_path):
    return make_prompts(tmp_path / "prompts.parquet", train=20, validation=5, test=5)


def stub_params(teacher, *overrides):
    return make_params(teacher, "generate.engine=stub", *overrides)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_everything_is_made_once_and_then_served_without_an_engine(teacher, prompts, tmp_path):
    engine, params = Recorder(teacher), stub_params(teacher)
    first = generate(params, prompts, tmp_path / "a", engine=engine)
    assert first == Summary(cached=0, made=60, skipped=0)  # 20 x 2 + 5 samples, 5 references, 5 x 2 corruptions
    assert len(set(engine.sampled)) == len(engine.sampled) == 45 and len(engine.scored) == 15
    again = Recorder(teacher)
    assert generate(params, prompts, tmp_path / "b", engine=again) == Summary(60, 0, 0)
    assert again.sampled == again.scored == [] and contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_teacher_is_never_asked_about_prompts_for_the_student_alone(teacher, prompts, tmp_path):
    own = [Prompt(f"own-{number}", f"{WORDS[number]} w39 w39", ("w1",), "student") for number in range(4)]
    write_prompts(tmp_path / "more.parquet", [*read_prompts(prompts), *own])
    params, engines = stub_params(teacher), []
    assert dry_run(params, tmp_path / "more.parquet", answers=True) == dry_run(params, prompts, answers=True)
    for name, file in (("a", prompts), ("b", tmp_path / "more.parquet")):
        engines.append(Recorder(teacher))
        folder = tmp_path / name
        generate(params, file, folder / "out", folder / "store", engine=engines[-1], answers=folder / "answers")
    without, found = engines
    assert (found.sampled, found.scored) == (without.sampled, without.scored) and found.sampled and found.scored
    for name in ("out", "answers"):
        assert contents(tmp_path / "a" / name) == contents(tmp_path / "b" / name)


def test_a_file_of_prompts_for_the_student_alone_leaves_nothing_to_ask(teacher, tmp_path):
    write_prompts(tmp_path / "p.parquet", [Prompt("own", "w1 w2", (), "student")])
    with pytest.raises(UserError, match="no prompts in the splits train and validation"):
        generate(stub_params(teacher), tmp_path / "p.parquet", tmp_path / "out")


def test_smaller_requests_are_served_and_larger_ones_make_only_what_is_missing(teacher, prompts, tmp_path):
    generate(stub_params(teacher), prompts, tmp_path / "a", engine=Recorder(teacher))
    engine = Recorder(teacher)
    smaller = stub_params(teacher, "generate.k=3", "generate.samples=1", "generate.corrupted=1")
    fewer = make_prompts(tmp_path / "fewer.parquet", train=18)
    assert generate(smaller, fewer, tmp_path / "b", engine=engine).made == 0
    kept = [prompt for prompt in read_prompts(prompts) if prompt.split == "validation"][:3]
    write_prompts(tmp_path / "held-out.parquet", kept)
    assert generate(smaller, tmp_path / "held-out.parquet", tmp_path / "h", engine=engine).cached == 3 + 3 + 3
    assert not engine.sampled and not engine.scored
    assert {row.k for row in Selection(tmp_path / "b").rows("train")} == {3}
    larger = stub_params(teacher, "generate.samples=3")
    assert generate(larger, prompts, tmp_path / "c", engine=engine).made == 20 == len(engine.sampled)


@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_a_larger_k_scores_the_stored_responses_and_keeps_them(teacher, prompts, tmp_path, support):
    params = partial(stub_params, teacher, f"generate.support={support}")
    generate(params(), prompts, tmp_path / "a", engine=Recorder(teacher))
    engine = Recorder(teacher)
    generate(params("generate.k=12"), prompts, tmp_path / "b", engine=engine)
    assert not engine.sampled and len(engine.scored) == 60
    for part in ("train", "validation", "scored"):
        for old, new in zip(Selection(tmp_path / "a").rows(part), Selection(tmp_path / "b").rows(part), strict=True):
            assert (old.key, old.origin, old.sample, old.finish) == (new.key, new.origin, new.sample, new.finish)
            assert (old.response_ids == new.response_ids).all() and (old.k, new.k) == (8, 12)
            assert support == "sampled" or (old.topk_ids == new.topk_ids[:, :8]).all()
    generate(params(), prompts, tmp_path / "c", engine=engine)
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


def test_other_sampling_seeds_and_templates_are_other_samples(teacher, prompts, tmp_path):
    engine = Recorder(teacher)
    for change in ([], ["seed=1"], ["generate.temperature=0.5"], ["max_tokens=5"], ["template='w0 {prompt}'"]):
        before = len(engine.sampled)
        generate(stub_params(teacher, *change), prompts, tmp_path / "out", engine=engine)
        assert len(engine.sampled) - before == 45
    assert len(set(engine.sampled)) == len(engine.sampled)


def test_the_stub_never_answers_for_the_real_teacher(teacher, prompts, tmp_path):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    assert dry_run(make_params(teacher), prompts) == Summary(0, 0, 0, missing=60)


def test_a_row_says_where_it_came_from(teacher, prompts, tmp_path):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    selection = Selection(tmp_path / "a")
    rows = list(selection.rows("scored"))
    assert [row.origin for row in rows[:3]] == ["reference", "corrupted", "corrupted"]
    assert len({tuple(row.response_ids) for row in rows}) == 15
    assert all(row.response_ids[-1] == 2 and row.finish == "stop" for row in rows)
    assert {row.origin for row in selection.rows("train")} == {"teacher"}
    assert [row.sample for row in selection.rows("train")][:4] == [0, 1, 0, 1]
    assert selection.teacher["licence"] == "apache-2.0"


def test_a_dry_run_counts_and_writes_nothing(teacher, prompts, own_store, capsys):
    assert dry_run(stub_params(teacher), prompts) == Summary(0, 0, 0, missing=60)
    assert not own_store.exists()
    assert "nothing was generated" in capsys.readouterr().out


def test_an_engine_that_dies_loses_nothing_and_the_same_command_goes_on(teacher, prompts, tmp_path):
    dying = Recorder(teacher, die_after=19)
    with pytest.raises(UserError, match=r"the engine died.*run the same command to go on"):
        generate(stub_params(teacher), prompts, tmp_path / "a", engine=dying)
    engine = Recorder(teacher)
    assert generate(stub_params(teacher), prompts, tmp_path / "a", engine=engine).cached == 19
    assert len(dying.sampled) == 19 and not set(dying.sampled) & set(engine.sampled)
    generate(stub_params(teacher), prompts, tmp_path / "b", tmp_path / "undisturbed", engine=Recorder(teacher))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_damaged_shards_are_repaired_and_only_they(teacher, prompts, tmp_path, own_store, capsys):
    generate(stub_params(teacher), prompts, tmp_path / "a", engine=Recorder(teacher))
    shard = sorted(own_store.glob("*/*/part-*.parquet"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    engine = Recorder(teacher)
    generate(stub_params(teacher), prompts, tmp_path / "b", engine=engine)
    assert 0 < len(engine.sampled) + len(engine.scored) <= 8
    assert shard.name in capsys.readouterr().err and contents(tmp_path / "a") == contents(tmp_path / "b")


def test_prompts_that_do_not_fit_are_left_out_counted_and_not_tried_again(teacher, tmp_path):
    path = tmp_path / "prompts.parquet"
    long = " ".join(WORDS * 2)  # 80 words for a context of 64
    write_prompts(path, [Prompt("long", long, (), "train"), Prompt(prompt_id("w1"), "w1 w2", (), "train")])
    engine = Recorder(teacher)
    assert generate(stub_params(teacher), path, tmp_path / "a", engine=engine) == Summary(0, 2, 2)
    assert generate(stub_params(teacher), path, tmp_path / "a", engine=engine) == Summary(2, 0, 2)
    assert len(engine.sampled) == 2
    assert Selection(tmp_path / "a").manifest["skipped"] == 2


def test_rows_that_the_engine_refuses_are_retried_only_when_asked(teacher, prompts, tmp_path, own_store):
    probe = Recorder(teacher)
    generate(stub_params(teacher), prompts, tmp_path / "probe", tmp_path / "other", engine=probe)
    refusing = Recorder(teacher, refuse=probe.sampled[3])
    assert generate(stub_params(teacher), prompts, tmp_path / "a", engine=refusing) == Summary(0, 59, 1)
    engine = Recorder(teacher)
    assert generate(stub_params(teacher), prompts, tmp_path / "a", engine=engine) == Summary(59, 0, 1)
    assert generate(stub_params(teacher), prompts, tmp_path / "a", retry_skipped=True, engine=engine) == Summary(
        59, 1, 0
    )
    assert engine.sampled == [probe.sampled[3]]


def test_rows_that_get_no_answer_or_cannot_be_widened_are_counted(teacher, prompts, tmp_path):
    class Lossy(Recorder):
        def score(self, *given, **more):
            answers = list(super().score(*given, **more))
            yield from [*answers[2:], Failure(answers[1].key, "refused")]  # the first one is dropped

    generate(stub_params(teacher), prompts, tmp_path / "a", engine=Recorder(teacher))
    wider = stub_params(teacher, "generate.k=12")
    assert generate(wider, prompts, tmp_path / "b", engine=Lossy(teacher)) == Summary(0, 56, 4)  # two of each request
    assert generate(wider, prompts, tmp_path / "c", engine=Recorder(teacher)) == Summary(56, 2, 2)
    assert generate(stub_params(teacher), prompts, tmp_path / "d", engine=Recorder(teacher)) == Summary(60, 0, 0)


@pytest.mark.slow
def test_left_out_rows_show_in_the_exit_code(teacher, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "{" ".join(WORDS * 2)}"}}\n{{"prompt": "w1"}}\n')
    arguments = ("generate", "--teacher", teacher, "--prompts", path, "--out", tmp_path / "out", "--engine", "stub")
    arguments += ("--max-tokens", "4", "--template", "{prompt}", "--params", ROOT / "params.yaml")
    strict = run_cli(*arguments)
    assert strict.returncode == 3 and "2 rows were left out" in strict.stderr and "Traceback" not in strict.stderr
    assert (tmp_path / "out" / "manifest.json").exists()
    assert run_cli(*arguments, "--set", "generate.max_skipped=2").returncode == 0


def test_without_materialising_the_rows_stay_in_the_store(teacher, prompts, tmp_path, own_store):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    generate(stub_params(teacher, "generate.materialize=false"), prompts, tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["manifest.json"]
    copied, stored = (list(Selection(tmp_path / name).rows("train")) for name in "ab")
    assert [row.key for row in copied] == [row.key for row in stored] and len(copied) == 40


def start_generating(teacher, prompts, out: Path, store: Path) -> Run:
    command = ("generate", "--teacher", teacher, "--prompts", prompts, "--out", out, "--store", store)
    command += ("--engine", "hf", "--max-tokens", "48", "--template", "{prompt}", "--samples", "8")
    settings = ("--set", "generate.rows_per_shard=16", "--params", ROOT / "params.yaml")
    return start(*command, *settings, log=out.with_suffix(".log"))


def stored_keys(store) -> set[str]:
    folders = [path for path in store.glob("*/*") if path.is_dir()]
    return {key for path in folders for key in RequestFolder(store, path.parent.name, path.name).index()}


@pytest.mark.slow
def test_killed_in_the_middle_it_asks_nothing_twice_and_ends_with_the_same_rows(teacher, tmp_path):
    """kill -9 of a real process with a real model; then the same command, against an undisturbed run."""
    prompts = make_prompts(tmp_path / "prompts.parquet", train=60, validation=5)
    store = tmp_path / "killed"
    process = start_generating(teacher, prompts, tmp_path / "a", store)
    process.wait_for(lambda: list(store.glob("*/*/part-*.parquet")))
    process.send(signal.SIGKILL)
    assert process.wait() == 128 + signal.SIGKILL, "it must be killed in the middle, not after the end"
    before = {path: path.stat().st_mtime_ns for path in store.glob("*/*/part-*.parquet")}
    kept = stored_keys(store)
    assert 0 < len(kept) < 8 * 60 + 5 + 5 + 10 and not list((tmp_path / "a").iterdir())

    process = start_generating(teacher, prompts, tmp_path / "a", store)
    assert process.wait() == 0 and f"found in the store  {len(kept):,} rows" in process.output, process.output
    stored_rows = sum(pq.read_metadata(path).num_rows for path in store.glob("*/*/part-*.parquet"))
    assert stored_rows == len(stored_keys(store)) == 8 * 60 + 5 + 5 + 10  # no key is stored twice
    assert {path: path.stat().st_mtime_ns for path in before} == before

    assert start_generating(teacher, prompts, tmp_path / "b", tmp_path / "undisturbed").wait() == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.slow
def test_two_processes_on_one_store_lose_nothing(teacher, tmp_path):
    prompts = make_prompts(tmp_path / "prompts.parquet", train=30, validation=5)
    processes = [start_generating(teacher, prompts, tmp_path / name, tmp_path / "shared") for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(stored_keys(tmp_path / "shared")) == 8 * 30 + 5 + 5 + 10


@pytest.mark.parametrize("error", [AssertionError("no\nblocks"), OSError("no space"), KeyError("lm_head")])
def test_whatever_an_engine_fails_to_start_of_is_one_line(teacher, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("pipeline.teacher.session.open_engine", fail)
    prompts = make_prompts(tmp_path / "prompts.parquet", train=2)
    with pytest.raises(
        UserError, match=rf"engine hf cannot start .*: {type(error).__name__}: .*Nothing was lost"
    ) as found:
        generate(make_params(teacher), prompts, tmp_path / "selection")
    assert "\n" not in str(found.value) and found.value.__cause__ is error

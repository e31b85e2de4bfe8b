"""What holds for the options of rounds: what is refused, and what the student answers."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch

from pipeline.errors import UserError
from pipeline.learning.rounds import schedule
from pipeline.prompts import Prompt, prompt_id, read_prompts, write_prompts
from pipeline.store.selection import Selection
from stages.distill import distill, leave_out
from stages.distill.answering import Answering
from stages.distill.rounds import SAMPLES
from stages.distill.training import Distillation, Paths
from tests.conftest import WORDS, make_model, make_params

BASE = ("distill.objective=jsd", "distill.reward=none", "distill.optimisation.batch_size=4")


def params_of(teacher, *options: str):
    """options: of `distill`, and of `distill.on_policy` where they begin with a point."""
    named = [f"distill.{'on_policy' if option.startswith('.') else ''}{option}" for option in options]
    return make_params(teacher, *BASE, *named)


def distilled(cache, teacher, student, folder, *options, prompts=None) -> SimpleNamespace:
    """What a training wrote."""
    params, rounds = params_of(teacher, *options), folder / "rounds"
    distill(
        params, cache / "selection", student, None, folder / "student", folder / "metrics", folder / "runs",
        prompts_path=prompts or cache / "prompts.parquet", rounds_out=rounds,
    )  # fmt: skip
    results = json.loads((folder / "metrics" / "results.json").read_text())
    if not params.distill.rounds:
        return SimpleNamespace(results=results, folder=rounds)
    samples = pl.read_parquet(rounds / SAMPLES) if (rounds / SAMPLES).is_file() else None
    return SimpleNamespace(results=results, folder=rounds, selection=Selection(rounds), samples=samples)


def answering(cache, teacher, *options) -> Answering:
    params = params_of(teacher, *options)
    chosen = params.distill.rounds
    rounds = schedule(params.distill.optimisation.steps, chosen.refreshes, chosen.every)
    cached = Selection(cache / "selection").teacher
    return Answering.of(params, cache / "prompts.parquet", cached, rounds)


def asked(answering: Answering) -> list[set[str]]:
    """Ids of every round's prompts, each of which has a prompt once."""
    rounds = [[each.prompt.id for each in answering.prompts_of(number)] for number in range(len(answering.schedule))]
    assert all(len(ids) == len(set(ids)) for ids in rounds)
    return [set(ids) for ids in rounds]


@pytest.fixture
def with_fresh_prompts(cache, tmp_path) -> Path:
    """The cache's prompts and 12 for the student alone."""
    prompts = read_prompts(cache / "prompts.parquet", ("train", "validation", "test"))
    texts = [f"{word} w3 w39" for word in WORDS[:12]]
    path = tmp_path / "fresh.parquet"
    write_prompts(path, [*prompts, *(Prompt(prompt_id(text), text, (), "student") for text in texts)])
    return path


# What is refused

OPD = "objective opd is a policy gradient on the student's own samples, drawn at temperature 1"
GIVEN = "is the likelihood of given tokens, and with on_policy they would be the student's own"
FITTED = "fits the reward while the student trains, and on the student's own samples it would explain the student"


@pytest.mark.parametrize(
    "options, message",
    [
        ((".refreshes=2", ".every=3"), "refreshes (2) and every (3) both say when the student answers anew"),
        (("objective=opd",), OPD),
        (("objective=opd", ".refreshes=2", ".share=0.5"), OPD),
        (("objective=opd", ".every=2", ".temperature=0.9"), OPD),
        (("objective=sft", ".refreshes=2"), f"objective sft {GIVEN}"),
        (("objective=seqkd", ".every=2"), f"objective seqkd {GIVEN}"),
        (("nll_weight=0.5", ".refreshes=2"), f"nll_weight {GIVEN}"),
        (("objective=gkd", "nll_weight=0.5"), f"nll_weight {GIVEN}"),
        (("reward=joint", ".refreshes=2"), f"reward: joint {FITTED}"),
        (("reward=scratch", ".refreshes=2"), f"reward: scratch {FITTED}"),
        (("objective=gkd", "reward=scratch"), f"reward: scratch {FITTED}"),
        (("window=4", ".refreshes=2"), "window sorts batches of the cache by length, and on_policy mixes its own"),
        ((".refreshes=11",), "on_policy.refreshes (11) are more than the training has steps (10)"),
        (("objective=opd", ".refreshes=2", ".scores=dense"), "objective opd needs no more than the teacher's word"),
        ((".refreshes=2", ".share=0"), "share: 0 learns from no sample of the student"),
        ((".refreshes=2", ".mixture=0.2"), "on_policy.mixture (0.2) is for objective minillm"),
        (("objective=minillm", ".temperature=0.9"), "objective minillm weights samples by their probabilities"),
        (("objective=minillm", ".share=1"), "objective minillm learns from references too"),
        (("objective=minillm", "tail=truncate"), "objective minillm with tail: truncate is not smallest where"),
        ((".refreshes=2", ".temperature=0"), "on_policy.temperature: Value error, must be at least 0.01"),
        ((".refreshes=2", ".share=1.5"), "on_policy.share"),
        ((".refreshes=2", ".split=test"), "on_policy.split: Input should be 'train' or 'student'"),
        ((".refreshes=-1",), "on_policy.refreshes: Input should be greater than or equal to 0"),
        ((".refreshes=2", ".samples=0"), "on_policy.samples: Input should be greater than 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else "",
)
def test_rounds_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        params_of("unused", *options)


@pytest.mark.parametrize(
    "options, expected",
    [
        ((), None),
        ((".refreshes=10",), (10, 0, 1, "store")),
        ((".every=20", ".share=0.3"), (0, 20, 0.3, "store")),
        (("objective=gkd",), (0, 1, 0.5, "live")),
        (("objective=gkd", ".refreshes=2", ".share=1", ".scores=store"), (2, 0, 1, "store")),
        (("objective=opd", ".refreshes=2"), (2, 0, 1, "store")),
        (("reward=zero", "objective=gkd", ".scores=dense"), (0, 1, 0.5, "dense")),
        (("objective=minillm",), (0, 512, 0.5, "store")),  # 256 rollouts, four epochs of 2 of 4 rows
        (("objective=minillm", ".prompts=16", ".samples=2"), (0, 64, 0.5, "store")),
        (("objective=minillm", "minillm.text=0", ".every=3"), (0, 3, 1, "store")),
    ],
    ids=lambda value: ",".join(map(str, value or ["off"])),
)
def test_what_is_not_chosen_follows_from_the_objective(options, expected):
    rounds = params_of("unused", *options).distill.rounds
    assert (rounds and (rounds.refreshes, rounds.every, rounds.share, rounds.scores)) == expected


def test_rounds_need_prompts_of_their_split_and_the_teacher_of_the_cache(cache, teacher, student, tmp_path):
    with pytest.raises(UserError, match=r"has no prompts of the split student, .* set prepare\.student"):
        distilled(cache, teacher, student, tmp_path, ".refreshes=2", ".split=student")
    with pytest.raises(UserError, match="pass --prompts"):
        places = (tmp_path / name for name in ("student", "metrics", "runs"))
        distill(params_of(teacher, ".refreshes=2"), cache / "selection", student, None, *places)
    other = make_model(tmp_path / "other", seed=7)
    with pytest.raises(UserError, match="needs the teacher of the cache"):
        distilled(cache, other, student, tmp_path, ".refreshes=2")
    assert not (tmp_path / "student").exists() and not (tmp_path / "rounds").exists()


# Whom the student answers, and how


def test_a_horizon_bounds_what_is_learned_from_and_not_what_is_measured(cache, teacher, student, tmp_path):
    made = distilled(cache, teacher, student, tmp_path, ".refreshes=2", ".horizon=3", "optimisation.steps=4")
    lengths = {part: [len(row.response_ids) for row in made.selection.rows(part)] for part in made.selection.parts}
    assert all(max(lengths[f"round{number:04d}"]) == 3 for number in range(2))
    assert max(lengths["heldout0000"]) > 3
    assert made.samples.filter(pl.col("part") == "round0001")["logprobs"].list.len().max() == 3


def test_a_prompt_has_as_many_samples_as_asked_for(cache, teacher, student, tmp_path):
    options = ".refreshes=2", ".samples=3", ".prompts=2", "optimisation.steps=4"
    made = distilled(cache, teacher, student, tmp_path, *options)
    for number in range(2):
        of_round = made.samples.filter(pl.col("part") == f"round{number:04d}")
        counts = of_round.group_by("prompt_id").len()
        assert counts["len"].to_list() == [3, 3]
        assert made.selection.part(f"round{number:04d}")["rows"] == of_round["key"].n_unique() > 2


def test_the_student_answers_other_prompts_while_there_are_any(cache, teacher):
    """There are 40."""
    rounds = asked(answering(cache, teacher, ".refreshes=4", ".prompts=10", "optimisation.steps=12"))
    assert [len(ids) for ids in rounds] == [10] * 4 and len(set.union(*rounds)) == 40
    rounds = asked(answering(cache, teacher, ".refreshes=5", ".prompts=30", "optimisation.steps=40"))
    assert [len(ids) for ids in rounds] == [30] * 5 and len(rounds[0] | rounds[1]) == 40
    counts = Counter(each for ids in rounds[:4] for each in ids)  # three times all
    assert set(counts.values()) == {3}
    assert asked(answering(cache, teacher, ".refreshes=2", "optimisation.steps=20"))[1] == set(counts)


@pytest.mark.parametrize(
    "options, prompts",
    [
        ((".every=1",), 4),
        ((".every=3",), 12),
        ((".every=3", ".prompts=5"), 5),
        ((".every=3", ".prompts=100"), 12),
        ((".every=3", ".samples=5"), 3),
        ((".every=2", ".share=0.5"), 4),
        ((".every=1", ".samples=100"), 1),
        ((".every=12",), 40),
    ],
)
def test_no_more_prompts_are_answered_than_the_steps_learn_from(cache, teacher, options, prompts):
    """A step learns from four rows."""
    rounds = asked(answering(cache, teacher, *options, "optimisation.steps=12"))
    assert {len(ids) for ids in rounds} == {prompts}


def test_the_student_answers_prompts_of_its_own(cache, teacher, student, tmp_path, with_fresh_prompts):
    fresh = {each.id for each in read_prompts(with_fresh_prompts, ("student",))}
    options = ".refreshes=2", ".split=student", "optimisation.steps=6"
    made = distilled(cache, teacher, student, tmp_path, *options, prompts=with_fresh_prompts)
    assert all(set(made.selection.part(f"round{number:04d}")["keys"]) == fresh for number in range(2))
    assert not fresh & set(made.selection.part("heldout0000")["keys"])


def test_without_held_out_prompts_nothing_is_measured(cache, teacher, student, tmp_path):
    made = distilled(cache, teacher, student, tmp_path, ".refreshes=2", ".validation=0", "optimisation.steps=4")
    assert set(made.selection.parts) == {"round0000", "round0001"} == set(made.samples["part"])
    rounds = made.results["rounds"]
    assert [each["samples_drawn"] for each in rounds] == [8, 8]  # two steps of four rows, and nothing greedy
    assert not {name for each in rounds for name in each} & {"kl", "own_reverse_kl", "bleu", "accuracy", "distinct_2"}


@pytest.mark.parametrize("scores", ["live", "dense"])
def test_without_held_out_prompts_a_teacher_in_memory_still_says_what_it_took(
    cache, teacher, student, tmp_path, scores
):
    options = ".every=1", f".scores={scores}", ".validation=0", "optimisation.steps=3"
    made = distilled(cache, teacher, student, tmp_path, *options)
    (only,) = made.results["rounds"]
    assert only["samples_drawn"] == made.results["cost"]["samples_drawn"] == 3 * 4 and only["seconds_drawing"] > 0
    assert (only["rows_scored"] > 0) == (scores == "live")
    assert not set(only) & {"kl", "own_reverse_kl", "distinct_2"}


def test_fewer_held_out_prompts_are_answered_where_fewer_are_asked_for(cache, teacher, student, tmp_path):
    made = distilled(cache, teacher, student, tmp_path, ".refreshes=1", ".validation=3", "optimisation.steps=2")
    assert {made.selection.part(f"heldout{number:04d}")["prompts"] for number in range(2)} == {3}
    assert [each["samples_drawn"] for each in made.results["rounds"]] == [8 + 3 + 3, 3 + 3]


def test_another_seed_of_distill_finds_the_first_round(cache, teacher, student, tmp_path):
    runs = [
        distilled(
            cache, teacher, student, tmp_path / str(seed), ".refreshes=2", "optimisation.steps=4", f"seed={seed}"
        ).results["rounds"]
        for seed in range(2)
    ]
    (first, second, last), again = runs
    assert first["samples_found"] == first["rows_found"] == 0
    assert (again[0]["samples_drawn"], again[0]["rows_scored"], again[0]["tokens_scored"]) == (0, 0, 0)
    assert again[0]["samples_found"] == first["samples_drawn"] and again[0]["own_kl"] == first["own_kl"]
    for before, after in zip((second, last), again[1:], strict=True):
        assert after["samples_found"] == 0 < after["rows_scored"] and after["samples_drawn"] == before["samples_drawn"]


@pytest.mark.parametrize(
    "options",
    [
        ("objective=gkd",),
        ("objective=gkd", ".scores=dense"),
        (".every=2", ".scores=live"),
        (".every=2", ".scores=dense"),
    ],
    ids=",".join,
)
def test_a_teacher_in_memory_keeps_no_rounds(cache, teacher, student, tmp_path, options):
    made = distilled(cache, teacher, student, tmp_path, *options, "optimisation.steps=4", ".validation=2")
    assert made.selection.parts == {} and made.samples is None
    assert made.results["rounds"][-1]["own_reverse_kl"] > 0
    assert not list((tmp_path / "store").rglob("*.parquet"))


@pytest.mark.parametrize("scores", ["store", "live", "dense"])
def test_replayed_rounds_are_those_of_before_a_kill(cache, teacher, student, tmp_path, scores):
    """Also of a single step: the student that answered is gone by then."""
    options = ".every=1", ".replay=1", ".validation=0", f".scores={scores}", "optimisation.steps=3"
    params, places = params_of(teacher, *options), (cache / "selection", student)
    paths = Paths(*places, store=str(tmp_path / "store"), prompts=cache / "prompts.parquet", rounds=tmp_path / "rounds")

    def rows_of_a_round(number: int, step: int) -> set[tuple]:
        plan = Distillation.open(params, 0, paths)
        rows = plan.training(tmp_path / "run").rows
        with torch.no_grad():
            for parameter in plan.student.model.parameters():
                parameter.mul_(1 + step)  # as if it had been trained
        rows[step * 4]
        return {(row.key, tuple(row.response_ids.tolist())) for row in rows._loaded[number].rows}

    assert rows_of_a_round(1, step=1) == rows_of_a_round(1, step=2)


def test_each_group_of_a_rounds_rows_is_decoded_about_once_an_epoch(cache, teacher, student, tmp_path, monkeypatch):
    """Training on rounds of more than 1,024 rows once took four times as long as training on the cache."""
    monkeypatch.setattr("pipeline.store.schema.ROW_GROUP_VALUES", 100)
    monkeypatch.setattr("pipeline.store.training_rows.KEPT_ROWS", 1)
    params = params_of(teacher, ".refreshes=1", ".samples=2", ".validation=0", "optimisation.steps=20")
    rounds = {"prompts": cache / "prompts.parquet", "rounds": tmp_path / "rounds"}
    paths = Paths(cache / "selection", student, store=str(tmp_path / "store"), **rounds)
    rows, read = Distillation.open(params, 0, paths).training(tmp_path / "run").rows, []
    rows[0]
    own = rows._loaded[0].rows
    load = own._source.load
    own._source = SimpleNamespace(load=lambda group: read.append(group) or load(group))
    for step in range(20):
        rows.__getitems__(range(4 * step, 4 * step + 4))
    groups, epochs = len(set(own.groups)), 80 / len(rows._loaded[0].places)
    assert groups > 10 and epochs >= 1
    assert len(read) < 1.3 * groups * epochs


# Off-policy


def test_without_rounds_their_folder_is_empty_but_for_what_is_not_ours(cache, teacher, student, tmp_path):
    assert list(distilled(cache, teacher, student, tmp_path, "optimisation.steps=1").folder.iterdir()) == []
    made = distilled(cache, teacher, student, tmp_path, ".refreshes=1", ".validation=0", "optimisation.steps=1")
    assert SAMPLES in {path.name for path in made.folder.iterdir()}
    (made.folder / "notes.txt").write_text("mine")
    (made.folder / "notes").mkdir()
    made = distilled(cache, teacher, student, tmp_path, "optimisation.steps=1")
    assert {path.name for path in made.folder.iterdir()} == {"notes.txt", "notes"}


def test_without_a_plain_student_its_earlier_rounds_are_removed(cache, teacher, student, tmp_path):
    made = distilled(cache, teacher, student, tmp_path, ".refreshes=1", ".validation=0", "optimisation.steps=1")
    (made.folder / "notes.txt").write_text("mine")
    leave_out(tmp_path / "student", tmp_path / "metrics", made.folder)
    assert [path.name for path in made.folder.iterdir()] == ["notes.txt"]

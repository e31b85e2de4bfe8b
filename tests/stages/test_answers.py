"""What holds for the teacher's answers to the test prompts: asked once, kept like all it says, known to the store."""

import pytest

from pipeline.cli.dry_run import dry_run
from pipeline.errors import UserError
from pipeline.store.requests import open_store
from pipeline.store.selection import Selection
from pipeline.upkeep.collect import garbage, in_use
from pipeline.upkeep.verify import verify_selection, verify_store
from stages.generate import generate
from tests.conftest import make_params, make_prompts
from tests.stages.test_generate import Recorder, contents, stub_params


@pytest.fixture
def prompts(tmp_path):
    return make_prompts(tmp_path / "prompts.parquet", train=4, validation=2, test=5)


def settings(teacher, *more: str):
    return stub_params(teacher, "evaluate.sampled_prompts=3", "evaluate.samples=2", *more)


def test_they_are_asked_once_and_fewer_of_them_are_served(teacher, prompts, tmp_path):
    engine = Recorder(teacher)
    first = generate(settings(teacher), prompts, tmp_path / "a", engine=engine, answers=tmp_path / "answers")
    own = 4 * 2 + 2 + 2 + 2 * 2  # samples of the training and held-out prompts, references, corruptions
    assert first.made == own + 5 + 3 * 2
    selection = Selection(tmp_path / "answers")
    assert {name: part["rows"] for name, part in selection.parts.items()} == {"greedy": 5, "sampled": 6}
    assert {part["request"]["sampling"]["temperature"] for part in selection.parts.values()} == {0.0, 1.0}
    assert [row.sample for row in selection.rows("sampled")] == [0, 1] * 3
    again = Recorder(teacher)
    generate(settings(teacher), prompts, tmp_path / "b", engine=again, answers=tmp_path / "again")
    fewer = settings(teacher, "evaluate.samples=2", "evaluate.sampled_prompts=2")
    generate(fewer, prompts, tmp_path / "c", engine=again, answers=tmp_path / "fewer")
    assert again.sampled == again.scored == [] and contents(tmp_path / "answers") == contents(tmp_path / "again")
    assert Selection(tmp_path / "fewer").parts["sampled"]["rows"] == 4


def test_what_is_trained_on_does_not_depend_on_them(teacher, prompts, tmp_path):
    generate(settings(teacher), prompts, tmp_path / "a", engine=Recorder(teacher), answers=tmp_path / "answers")
    generate(settings(teacher), prompts, tmp_path / "b", tmp_path / "other", engine=Recorder(teacher))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_without_a_folder_for_them_test_prompts_are_not_asked(teacher, prompts, tmp_path):
    engine = Recorder(teacher)
    generate(settings(teacher), prompts, tmp_path / "a", engine=engine)
    assert len(engine.sampled) == 4 * 2 + 2
    assert dry_run(settings(teacher), prompts).missing == 0
    assert dry_run(settings(teacher), prompts, answers=True).missing == 5 + 3 * 2


def test_the_store_knows_that_they_are_used(teacher, prompts, tmp_path, own_store):
    generate(settings(teacher), prompts, tmp_path / "a", engine=Recorder(teacher), answers=tmp_path / "answers")
    storage = open_store()
    used = in_use(storage)
    assert {user.selection for user in used.kept} == {str(tmp_path / "a"), str(tmp_path / "answers")}
    assert list(garbage(storage, used)) == [] == list(verify_store(storage, "", True, lambda: None))
    assert list(verify_selection(tmp_path / "answers", None, True)) == []
    forgotten = [user for user in used.kept if user.selection == str(tmp_path / "answers")]
    assert list(garbage(storage, in_use(storage, forget=forgotten)))


def test_where_no_teacher_runs_there_are_none(teacher, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "w1 w2"}\n{"prompt": "w3", "split": "test", "references": ["w4"]}\n')
    (tmp_path / "r.jsonl").write_text('{"prompt": "w1 w2", "response": "w3"}\n')
    params = make_params(teacher, "generate.engine=text", f"generate.responses={tmp_path / 'r.jsonl'}")
    generate(params, path, tmp_path / "a", answers=tmp_path / "answers")
    assert Selection(tmp_path / "answers").parts == {}


def test_a_folder_of_somebody_else_is_refused_before_any_work(teacher, prompts, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    engine = Recorder(teacher)
    with pytest.raises(UserError, match="--answers"):
        generate(settings(teacher), prompts, tmp_path / "a", engine=engine, answers=tmp_path / "notes")
    assert engine.sampled == [] and not (tmp_path / "a").exists()

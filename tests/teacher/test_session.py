"""What holds for a session: planning is a value, one engine serves many orders, and closing frees it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.engines.stub import StubEngine
from pipeline.errors import UserError
from pipeline.prompts import Prompt, PromptFormat, prompt_id
from pipeline.store.storage import Storage
from pipeline.store.users import users_of
from pipeline.teacher import session as module
from pipeline.teacher.items import read_as_models_do, to_draw
from pipeline.teacher.orders import Order
from pipeline.teacher.session import Session
from pipeline.teacher.summary import parts_of
from pipeline.teacher.teacher import Teacher, sampling_request
from tests.conftest import make_params


@pytest.fixture
def params(teacher):
    return make_params(teacher, "generate.engine=stub", "generate.rows_per_shard=2")


@pytest.fixture
def asked(params) -> Teacher:
    return Teacher.of(params.generate)


@pytest.fixture
def opened(monkeypatch) -> Counter:
    """How often engines were opened and closed, and for sequences of how many tokens."""
    counts: Counter = Counter()

    def open_engine(name, folder, loading):
        counts["opened"] += 1
        counts["tokens"] = loading.context
        return Counting.load(folder, loading)

    class Counting(StubEngine):
        def close(self) -> None:
            counts["closed"] += 1

    monkeypatch.setattr(module, "open_engine", open_engine)
    return counts


def order_of(params, teacher: Teacher, words: str, count: int = 1, selection: Path | None = None, tokens: int = 6):
    texts = words.split()
    prompts = [Prompt(prompt_id(text), text, (), "train") for text in texts]
    read, _ = read_as_models_do(prompts, PromptFormat.of(params), teacher.tokenizer)
    request = sampling_request(params.model_copy(update={"max_tokens": tokens}), teacher, 1.0)
    return Order(request, list(to_draw("train", read, request, count)), teacher.k, teacher.support, selection)


def test_planning_asks_nothing_and_changes_nothing(params, asked, tmp_path, opened):
    storage, order = Storage(tmp_path / "store"), order_of(params, asked, "w1 w2 w3", 2)
    (plan,) = Session(asked, storage).plan([order])
    assert [len(rows) for rows in (plan.cached, plan.missing, plan.rescore, plan.skipped)] == [0, 6, 0, 0]
    assert not (tmp_path / "store").exists() and not opened
    with Session(asked, storage) as session:
        answered = session.answer([order])
    assert plan.missing == plan.to_make and len(plan.missing) == 6, "a plan is a value"
    assert len(answered.plans[0].cached) == 6 and (answered.found, answered.made) == (0, 6)


def test_one_engine_serves_many_orders_and_is_closed_at_the_end(params, asked, tmp_path, opened):
    with Session(asked, Storage(tmp_path / "store")) as session:
        first = session.answer([order_of(params, asked, "w1 w2"), order_of(params, asked, "w1", tokens=9)])
        second = session.answer([order_of(params, asked, "w1 w2 w3", 2)])
        assert opened["opened"] == 1 and opened["closed"] == 0
    assert (first.found, first.made) == (0, 3) and (second.found, second.made) == (2, 4)
    assert opened["closed"] == 1


def test_an_order_with_longer_sequences_opens_the_engine_anew(params, asked, tmp_path, opened):
    with Session(asked, Storage(tmp_path / "store")) as session:
        session.answer([order_of(params, asked, "w1")])
        short = opened["tokens"]
        session.answer([order_of(params, asked, "w1", tokens=20)])
        assert (opened["opened"], opened["closed"]) == (2, 1) and opened["tokens"] == short + 14


def test_what_the_store_holds_opens_no_engine(params, asked, tmp_path, opened):
    storage, order = Storage(tmp_path / "store"), order_of(params, asked, "w1 w2")
    with Session(asked, storage) as session:
        session.answer([order])
    with Session(asked, storage) as session:
        assert session.answer([order]).found == 2
    assert opened["opened"] == 1


def test_an_engine_that_was_given_is_not_closed(params, asked, tmp_path, opened):
    engine = StubEngine.load(asked.source, asked.loading)
    engine.close = lambda: pytest.fail("closed")
    with Session(asked, Storage(tmp_path / "store"), engine) as session:
        assert session.answer([order_of(params, asked, "w1")]).made == 1
    assert not opened


def test_the_engine_is_closed_when_the_block_fails_and_what_was_made_is_kept(params, asked, tmp_path, monkeypatch):
    closed = []

    class Dying(StubEngine):
        def sample(self, asks, *arguments, **options):
            for number, answer in enumerate(super().sample(asks, *arguments, **options)):
                if number == 3:
                    raise RuntimeError("out of power")
                yield answer

        def close(self):
            closed.append(True)

    monkeypatch.setattr(module, "open_engine", lambda name, folder, loading: Dying.load(folder, loading))
    storage, order = Storage(tmp_path / "store"), order_of(params, asked, "w1 w2 w3 w4 w5")
    with (
        pytest.raises(UserError, match="the teacher's engine failed: RuntimeError: out of power"),
        Session(asked, storage) as session,
    ):
        session.answer([order])
    assert closed == [True]
    (plan,) = Session(asked, storage).plan([order])
    assert len(plan.cached) == 3 and len(plan.missing) == 2


def test_the_store_is_told_of_a_selection_before_it_is_asked_for_and_after(params, asked, tmp_path):
    storage, out = Storage(tmp_path / "store"), tmp_path / "out"
    order = order_of(params, asked, "w1 w2", selection=out)
    with Session(asked, storage) as session:
        session.answer([order, replace(order, items=(), selection=tmp_path / "empty")])
        (user,) = users_of(storage)[0]
        assert (user.selection, user.complete, user.requests) == (str(out), False, (order.request.identity,))
        session.record_use([order])
    (user,) = users_of(storage)[0]
    assert user.complete


def test_parts_hold_the_cached_rows_but_for_those_left_out(params, asked, tmp_path):
    order = order_of(params, asked, "w1 w2", 2)
    with Session(asked, Storage(tmp_path / "store")) as session:
        plans = session.answer([order]).plans
    left_out = order.items[0].key
    (part,) = parts_of(plans, {left_out}).values()
    assert part.rows == 3 and left_out not in part.locations
    assert plans[0].rejected("train", lambda response, references: True) == set()
    assert len(plans[0].rejected("train", lambda response, references: False)) == 4


def test_a_student_is_asked_like_a_teacher_under_its_own_name(params, asked, student):
    other = asked.student(student, batch_size=16)
    assert other.role == "student" and other.k == 0 and other.identity != asked.identity
    assert (other.stops, other.tokenizer) == (asked.stops, asked.tokenizer) and other.loading.batch_size == 16

"""Rounds that are kept: the student's samples and the teacher's word on them, in the store and in the run folder.

Student and teacher are loaded when a round is made, and closed before training goes on. What a killed run has drawn and
scored is in the store; a round is whole once its `measures.json` is there, and is not made again.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import console
from pipeline.errors import UserError
from pipeline.files import read_json, write_atomically, write_json_atomically, writing_to
from pipeline.learning.rewards import FILE
from pipeline.learning.rounds import OwnSamples, Round
from pipeline.store.manifest import MANIFEST, is_left_behind
from pipeline.store.schema import Row
from pipeline.store.selection import Selection
from pipeline.store.selection_files import join_selections, write_selection
from pipeline.store.storage import Storage
from pipeline.store.training_rows import TeacherRows
from pipeline.teacher.items import Item
from pipeline.teacher.orders import Order, Plan
from pipeline.teacher.session import Answered, Session
from pipeline.teacher.teacher import Teacher, scoring_request
from stages.distill.answering import Answering, Draw, held_out_part, own_part
from stages.distill.extras import SampleExtras
from stages.distill.measures import measured, say
from stages.distill.rollouts import Rollouts, mixture_of
from stages.distill.student import TrainedStudent

SAMPLES = "samples.parquet"  # beside the rows of rounds: each sample, and how likely it was for its student
_SAMPLES = pa.schema([
    ("round", pa.int32()), ("part", pa.string()), ("prompt_id", pa.string()), ("sample", pa.int16()),
    ("key", pa.string()), ("logprobs", pa.list_(pa.float32())),
])  # fmt: skip
_MEASURES = "measures.json"


@dataclass
class _Drawing:
    """What is asked of a student, or of its mixture with the teacher."""

    speaker: Teacher
    orders: Sequence[Order]
    rollouts: Rollouts | None = None  # the mixture's engine

    def answered(self, storage: Storage) -> Answered:
        """The samples, out of the store or drawn."""
        open_rollouts = closing(self.rollouts) if self.rollouts else nullcontext()
        with open_rollouts, Session(self.speaker, storage, self.rollouts) as session:
            return session.answer(self.orders)


@dataclass
class StoredRounds:
    """Makes and reads the rounds of one training."""

    answering: Answering
    storage: Storage
    folder: Path  # of the rounds, in the run folder
    out: Path  # of the selection of all rounds
    student: TrainedStudent
    teachers: Sequence[Row]  # the teacher's held-out samples
    topk: bool  # whether the loss reads the teacher's kept tokens
    extras: SampleExtras

    def own(self, round_: Round) -> OwnSamples:
        """A round's samples; they are made where they are not there."""
        self.make(round_.number, round_.start)
        folder, part = self.place(round_.number), own_part(round_.number)
        rows = TeacherRows(selection := Selection(folder), part, self.topk, text=False)
        rows.keep_pool(self.answering.params.distill.optimisation.batch_size)
        samples = read_samples(folder, part)
        place = {key: number for number, key in enumerate(rows.keys)}
        places = np.array([place[key] for key, _ in samples])
        counts = Counter(key for key, _ in samples)
        extras = self.extras.read(folder, list(selection.rows(part, topk=False)), dict(samples), counts)
        return OwnSamples(rows, places, rows.groups[places], extras)

    def place(self, number: int) -> Path:
        return self.folder / f"{number:04d}"

    def make(self, number: int, step: int) -> None:
        """Draw, score, measure and keep a round of the student at `step`; after the last, held-out samples alone."""
        if not (self.place(number) / _MEASURES).is_file():
            with torch.random.fork_rng():  # what is made here does not show in dropout
                self._make(number, step)

    def _make(self, number: int, step: int) -> None:
        answering, folder, settings = self.answering, self.place(number), self.answering.settings
        teacher, count = answering.teacher, len(answering.schedule)
        last = number == count
        console.say(f"after the last round: {len(answering.held_out):,} held-out prompts" if last else (
            f"round {number + 1} of {count}: the student answers {len(answering.prompts_of(number)):,} prompts"
        ))  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.student.save(folder / "model")
        name = "student after the last round" if last else f"student of round {number + 1}"
        student = teacher.student(folder / "model", settings.batch_size, settings.engine, name)
        drawings = self._drawings(student, number)
        drawn, seconds_drawing = _timed(lambda: [drawing.answered(self.storage) for drawing in drawings])
        plans = [plan for answered in drawn for plan in answered.plans]
        spoken = {plan.order.items[0].part: list(_spoken(plan)) for plan in plans if plan.order.items}
        said = [pair for part in (own_part(number), held_out_part(number)) for pair in spoken.get(part, ())]
        items = [item for item, _ in said]
        order = Order(scoring_request(answering.params, teacher), items, teacher.k, teacher.support, self.out)
        with Session(teacher, self.storage) as session:
            scored, seconds_scoring = _timed(lambda: session.answer([order]))
        (plan,) = scored.plans
        parts = plan.parts()
        if not last and own_part(number) not in parts:
            raise UserError(f"round {number + 1}: no sample of the student could be scored: see the warnings above")
        _keep_samples(folder, number, [pair for pair in said if pair[0].key in plan.locations])
        write_selection(folder, parts, teacher.description, teacher.k, scored.left_out, True, support=teacher.support)
        selection = Selection(folder)
        if not last:
            self.extras.write(folder, list(selection.rows(own_part(number), topk=False)))
        found = {
            "round": number, "step": step,
            "samples_found": sum(each.found for each in drawn), "samples_drawn": sum(each.made for each in drawn),
            "rows_found": scored.found, "rows_scored": scored.made, "tokens_scored": scored.tokens,
            "seconds_drawing": seconds_drawing, "seconds_scoring": seconds_scoring,
        }  # fmt: skip
        greedy = {item.prompt.id: row.response for item, row in spoken.get("greedy", ())}
        own = self._own(number, selection)
        measures = measured(answering, self.student.model, self.teachers, own, greedy)
        write_json_atomically(folder / _MEASURES, found | measures)
        for drawing in drawings:  # the round has what it needs
            Session(drawing.speaker, self.storage).forget_use(drawing.orders)
            shutil.rmtree(drawing.orders[0].selection, ignore_errors=True)
        shutil.rmtree(folder / "model")
        say(found, measures)

    def _drawings(self, student: Teacher, number: int) -> list["_Drawing"]:
        """What is drawn, and of whom: samples to learn from of the mixture with the teacher, where there is one."""
        alpha, teacher, folder = self.answering.settings.mixture, self.answering.teacher, self.place(number)
        draws = [draw for draw in self.answering.draws(student, number) if draw.items]

        def orders(draws: Sequence[Draw], place: str) -> list[Order]:
            # `cache gc` keeps what is drawn for this place, which is empty, until the round is made
            return [Order(d.request, d.items, student.k, student.support, folder / place) for d in draws]

        if not (alpha and number < len(self.answering.schedule)):
            return [_Drawing(student, orders(draws, "drawn"))]
        mixture, rollouts = mixture_of(student, teacher, alpha), Rollouts(student, teacher, alpha)
        drawings = [_Drawing(mixture, orders(draws[:1], "rollouts"), rollouts)]
        return drawings + ([_Drawing(student, orders(draws[1:], "drawn"))] if draws[1:] else [])

    def _own(self, number: int, selection: Selection) -> list[tuple[Row, np.ndarray]]:
        """The round's held-out samples, with the student's log-probabilities."""
        part = held_out_part(number)
        if part not in selection.parts:
            return []
        old = dict(read_samples(self.place(number), part))
        return [(row, old[row.key]) for row in selection.rows(part)]

    def finish(self, step: int) -> list[dict]:
        """Measure the student of a step, and write the selection of all rounds; returns measures and costs of each."""
        count = len(self.answering.schedule)
        if self.answering.held_out:
            self.make(count, step)
        numbers = [number for number in range(count + 1) if (self.place(number) / _MEASURES).is_file()]
        folders = [self.place(number) for number in numbers]
        join_selections(self.out, folders)
        tables = [pq.read_table(folder / SAMPLES) for folder in folders]
        _write_table(self.out, pa.concat_tables(tables))
        self.extras.join(self.out, folders)
        request = scoring_request(self.answering.params, self.answering.teacher).identity
        Session(self.answering.teacher, self.storage).record_user(self.out, [request])
        return [read_json(folder / _MEASURES) for folder in folders]


def leave_no_rounds(out: Path) -> None:
    """An empty folder in the place of rounds, where there are none; what an earlier run wrote there is removed."""
    with writing_to(out):
        mine = [path for path in out.iterdir() if path.name in (SAMPLES, FILE) or is_left_behind(path)]
        for path in sorted(mine, key=lambda path: path.name == MANIFEST):  # by which they are known as ours
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_samples(folder: Path, part: str) -> list[tuple[str, np.ndarray]]:
    """Key and the student's own log-probabilities, float32 [T], of each sample of a part, in the order of drawing."""
    table = pq.read_table(folder / SAMPLES, filters=[("part", "=", part)])
    pairs = zip(table.column("key").to_pylist(), table.column("logprobs").to_pylist(), strict=True)
    return [(key, np.asarray(values, np.float32)) for key, values in pairs]


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.monotonic()
    return call(), time.monotonic() - begun


def _spoken(plan: Plan) -> Iterable[tuple[Item, Row]]:
    """What the student said, as responses to be scored, with its own rows of them, in the order it was asked in."""
    return ((item.answered(row.response_ids), row) for item, row in plan.rows())


def _keep_samples(folder: Path, number: int, samples: Sequence[tuple[Item, Row]]) -> None:
    rows = [(number, item.part, item.prompt.id, item.sample, item.key, row.logprobs) for item, row in samples]
    columns = list(zip(*rows, strict=True)) or [[] for _ in _SAMPLES]
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, _SAMPLES, strict=True)]
    _write_table(folder, pa.table(arrays, schema=_SAMPLES))


def _write_table(folder: Path, table: pa.Table) -> None:
    write_atomically(folder, lambda path: pq.write_table(table, path, compression="zstd"), SAMPLES)

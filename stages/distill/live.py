"""Rounds with the teacher in memory: GKD as it is published, where the student is asked anew at every step.

Samples and rows are those of `scores: store`, bit by bit, but nothing is stored: what was not in a checkpoint yet is
asked again after a kill. With `scores: dense` the teacher runs in the loss, and a row is tokens alone.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import console
from pipeline.engines.base import Answer, Ask, Failure
from pipeline.engines.hf import HfEngine
from pipeline.engines.mixture import MixtureEngine
from pipeline.errors import UserError
from pipeline.files import read_json, write_atomically, write_json_atomically
from pipeline.learning.closeness import LogitSource
from pipeline.learning.rounds import OwnSamples, Round
from pipeline.store.schema import SCHEMA, Columns, Row, footer, value_fault, write_row_groups
from pipeline.store.selection_files import groups_of, write_selection
from pipeline.teacher.items import Item
from pipeline.teacher.teacher import scoring_request
from pipeline.teacher.writing import row_of
from stages.distill.answering import Answering, Draw
from stages.distill.extras import SampleExtras
from stages.distill.measures import evaluating, measured, say
from stages.distill.rollouts import answers_of
from stages.distill.student import TrainedStudent

_MORE = [pa.field("old", pa.list_(pa.float32())), pa.field("drawn", pa.list_(pa.int32()))]


class LiveSample(NamedTuple):
    """A distinct response of the student."""

    row: Row
    old: np.ndarray  # float32 [T], the student's own log-probabilities
    drawn: np.ndarray  # int, its places in the order of drawing: as many as it was drawn times


@dataclass
class LiveRounds:
    """Makes the rounds of one training."""

    answering: Answering
    folder: Path  # in the run folder: rounds that several steps learn from, for a killed run, and all measures
    out: Path  # of the selection of all rounds, which holds none
    student: TrainedStudent
    teacher: LogitSource
    teachers: Sequence[Row]  # its held-out samples
    extras: SampleExtras
    spent: dict[str, float] = field(default_factory=dict)  # since the last measures

    @property
    def _sparse(self) -> bool:
        """Whether training reads what the teacher says of samples; with a dense divergence it only does of rewards."""
        return self.answering.settings.scores == "live" or self.extras.settings.objective == "minillm"

    def own(self, round_: Round) -> OwnSamples:
        """A round's samples, by the student as it is, or as a killed run kept them."""
        with torch.random.fork_rng():  # what is made here does not show in dropout
            if self._is_due(round_):
                self._measure(round_.number, round_.start)
            samples = self._kept(round_) or self._make(round_)
            rows = [sample.row for sample in samples]
            old = {sample.row.key: sample.old for sample in samples}
            counts = {sample.row.key: len(sample.drawn) for sample in samples}
            extras = self.extras.of(rows, old, counts, self.extras.rewards_of(rows))
        places = np.repeat(np.arange(len(rows)), list(counts.values()))
        places = places[np.argsort(np.concatenate([sample.drawn for sample in samples]))]
        return OwnSamples(rows, places, groups_of(rows)[places], extras)  # shuffled as those of a stored round are

    def _make(self, round_: Round) -> list[LiveSample]:
        draw = self.answering.own_draw(self.answering.teacher, round_.number)
        samples = self._scored(self._drawn(draw, self.answering.settings.mixture))
        if not samples:
            raise UserError(f"round {round_.number + 1}: no sample of the student could be scored by the teacher")
        if round_.stop - round_.start > 1 or self.answering.settings.replay:
            self._write(self._rows_file(round_), samples)
        return samples

    def _drawn(self, draw: Draw, alpha: float = 0.0) -> list[tuple[Item, Answer]]:
        """What the student says, or its mixture with the teacher, as responses to be scored."""
        student, size = self.student.model, self.answering.settings.batch_size
        asks, sampling, begun = [item.ask() for item in draw.items], draw.request.sampling, time.monotonic()
        with evaluating(student):
            if alpha:
                vocabulary = self.answering.teacher.loading.vocabulary
                engine = MixtureEngine(student, self.teacher.model, alpha, size, vocabulary)
                drawn = answers_of(engine.sample(asks, sampling))
            else:
                drawn = HfEngine(student, size).sample(asks, sampling, 0)
            answers = dict(_whole(drawn, "student"))
        self._spend(seconds_drawing=time.monotonic() - begun, samples_drawn=len(answers))
        pairs = ((item, answers[item.key]) for item in draw.items if item.key in answers)
        return [(item.answered(answer.response_ids), answer) for item, answer in pairs]

    def _scored(self, said: Sequence[tuple[Item, Answer]], sparse: bool = False) -> list[LiveSample]:
        """The distinct ones of them. sparse: with the teacher's kept tokens, also for the dense loss."""
        teacher, distinct, drawn = self.answering.teacher, {}, {}
        for number, (item, answer) in enumerate(said):
            distinct.setdefault(item.key, (item, answer))
            drawn.setdefault(item.key, []).append(number)
        if not (sparse or self._sparse):
            bare = {
                key: replace(Row.bare(i.prompt_ids, i.response_ids, a.finish), key=key, origin="student")
                for key, (i, a) in distinct.items()
            }
            return [LiveSample(row, distinct[key][1].logprobs, np.array(drawn[key])) for key, row in bare.items()]
        engine = HfEngine(self.teacher.model, teacher.loading.batch_size, teacher.loading.vocabulary)
        asks = [Ask(key, item.prompt_ids, response_ids=item.response_ids) for key, (item, _) in distinct.items()]
        begun = time.monotonic()
        words = dict(_whole(engine.score(asks, teacher.k, teacher.stops, support=teacher.support), "teacher"))
        tokens = sum(len(ask.response_ids) for ask in asks)
        self._spend(seconds_scoring=time.monotonic() - begun, rows_scored=len(words), tokens_scored=tokens)
        return [
            LiveSample(row_of(item, words[key]), answer.logprobs, np.array(drawn[key]))
            for key, (item, answer) in distinct.items()
            if key in words
        ]

    def _spend(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.spent[name] = self.spent.get(name, 0) + amount

    def _rows_file(self, round_: Round) -> Path:
        return self.folder / f"{round_.number:04d}.parquet"

    def _write(self, path: Path, samples: Sequence[LiveSample]) -> None:
        rows = [
            SimpleNamespace(**{name: getattr(s.row, name) for name in SCHEMA.names}, old=s.old, drawn=s.drawn)
            for s in samples
        ]
        teacher, request = self.answering.teacher, scoring_request(self.answering.params, self.answering.teacher)
        about = footer(teacher.description, request.describe(), rows[0].topk_ids.shape[1], teacher.support)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path.parent, lambda file: write_row_groups(file, [rows], about, _MORE), path.name)

    def _kept(self, round_: Round) -> list[LiveSample]:
        """What a killed run wrote of a round; nothing of one that a single step learns from."""
        if not (path := self._rows_file(round_)).is_file():
            return []
        columns = Columns(pq.read_table(path))
        values = [columns.values(number) for number in range(len(columns))]
        more = [(each.pop("old"), each.pop("drawn")) for each in values]
        return [LiveSample(Row(**each), *pair) for each, pair in zip(values, more, strict=True)]

    def _is_due(self, round_: Round) -> bool:
        """Whether the student is to be measured: at its start, and no more often than its held-out loss is."""
        due = max(self._measured, default=-math.inf) + self.answering.params.distill.evaluate_every
        return bool(self.answering.held_out) and round_.start >= due

    @cached_property
    def _measured(self) -> set[int]:
        """Steps whose student was measured, those of a killed run among them."""
        return {measures["step"] for measures in self._measures()}

    def _measures(self) -> list[dict]:
        return [read_json(path) for path in sorted(self.folder.glob("measures-*.json"))]

    def _measure(self, number: int, step: int) -> None:
        spent, self.spent = self.spent, {}
        _, held_out, greedy = self.answering.draws(self.answering.teacher, number)
        decode = self.answering.teacher.tokenizer.decode
        texts = {i.prompt.id: decode(a.response_ids, skip_special_tokens=True) for i, a in self._drawn(greedy)}
        own = [
            (replace(sample.row, response=decode(sample.row.response_ids, skip_special_tokens=True)), sample.old)
            for sample in self._scored(self._drawn(held_out), sparse=True)
        ]
        measures = measured(self.answering, self.student.model, self.teachers, own, texts)
        found = {"round": number, "step": step, "samples_found": 0, "rows_found": 0} | {
            name: spent.get(name, 0) + self.spent.get(name, 0)
            for name in ("samples_drawn", "rows_scored", "tokens_scored", "seconds_drawing", "seconds_scoring")
        }
        self.spent = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self.folder / f"measures-{number:06d}.json", found | measures)
        self._measured.add(step)
        say(found, measures)

    def finish(self, step: int) -> list[dict]:
        """Measure the student of a step, and write a selection without rows; returns all measures, with their costs."""
        if step not in self._measured:
            self._measure(len(self.answering.schedule), step)
        teacher = self.answering.teacher
        write_selection(self.out, {}, teacher.description, teacher.k, 0, True, support=teacher.support)
        return self._measures()


def _whole(answers, who: str):
    """Key and answer of what could be made; the others are named."""
    for answer in answers:
        reason = answer.reason if isinstance(answer, Failure) else value_fault(answer)
        if reason:
            console.warn(f"a sample is left out by the {who}: {reason}")
        else:
            yield answer.key, answer

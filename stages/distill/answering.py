"""Who is asked what in every round of the student's own samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.learning.rounds import Round
from pipeline.params import OnPolicy, Params
from pipeline.prompts import PromptFormat, read_prompts
from pipeline.store.identity import Request, Sampling
from pipeline.teacher.items import Item, ReadPrompt, of_split, read_as_models_do, to_draw
from pipeline.teacher.teacher import Teacher, sampling_request


def own_part(number: int) -> str:
    """The part of a round's samples that are learned from."""
    return f"round{number:04d}"


def held_out_part(number: int) -> str:
    """The part of a round's samples of held-out prompts."""
    return f"heldout{number:04d}"


@dataclass(frozen=True)
class Draw:
    """Samples that are wanted of a student."""

    request: Request
    items: Sequence[Item]

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling


@dataclass(frozen=True)
class Answering:
    """The prompts, the teacher, and the rounds."""

    params: Params
    teacher: Teacher
    prompts: Sequence[ReadPrompt]
    held_out: Sequence[ReadPrompt]
    schedule: Sequence[Round]

    @classmethod
    def of(cls, params: Params, prompts: Path, cached: Mapping, schedule: Sequence[Round]) -> "Answering":
        """cached: the teacher whose rows are learned from.

        Raises UserError where there are no prompts to answer, or the teacher is another one.
        """
        settings, teacher = params.distill.rounds, Teacher.of(params.generate)
        if teacher.identity != cached["identity"]:
            raise UserError(
                f"{params.generate.teacher} is teacher {teacher.identity}, and the cache is of teacher "
                f"{cached['identity']}: distill.on_policy needs the teacher of the cache"
            )
        splits = read_prompts(prompts, ("train", "validation", "test", "student"))
        read, _ = read_as_models_do(splits, PromptFormat.of(params), teacher.tokenizer)
        asked = of_split(read, settings.split)
        if not asked:
            hint = ": set prepare.student" if settings.split == "student" else ""
            raise UserError(f"{prompts} has no prompts of the split {settings.split}, which the student answers{hint}")
        held_out = [each for each in of_split(read, "validation") if each.prompt.references]
        return cls(params, teacher, asked, held_out[: settings.validation], schedule)

    @property
    def settings(self) -> OnPolicy:
        return self.params.distill.rounds

    def prompts_of(self, number: int) -> Sequence[ReadPrompt]:
        """The prompts of a round, in the order of their file."""
        return [self.prompts[place] for place in sorted(self._asked[number])]

    @cached_property
    def _asked(self) -> list[list[int]]:
        """Places of each round's prompts: the next ones of an endless order that has all of them once per epoch.

        What is left of an epoch comes last in the next one, so that no round has a prompt twice.
        """
        total, epoch, waiting, asked = len(self.prompts), 0, np.empty(0, int), []
        for count in map(self._count, self.schedule):
            if len(waiting) < count:
                order = np.random.default_rng([self.params.seed, 4, epoch]).permutation(total)
                left = np.isin(order, waiting)
                epoch, waiting = epoch + 1, np.concatenate([waiting, order[~left], order[left]])
            asked.append(waiting[:count].tolist())
            waiting = waiting[count:]
        return asked

    def _count(self, round_: Round) -> int:
        """Prompts of a round: no more than its steps can learn from."""
        rows = (round_.stop - round_.start) * self.params.distill.optimisation.batch_size * self.settings.share
        learned = max(math.ceil(rows / self.settings.samples), 1)
        return min(self.settings.prompts or learned, learned, len(self.prompts))

    def own_draw(self, student: Teacher, number: int) -> Draw:
        """The samples to learn from; none after the last round."""
        settings, asked = self.settings, self.prompts_of(number) if number < len(self.schedule) else ()
        return self._draw(own_part(number), student, number, asked, settings.temperature, settings.samples)

    def draws(self, student: Teacher, number: int) -> tuple[Draw, Draw, Draw]:
        """What the student is asked: samples to learn from (none after the last round), held-out ones, greedy ones."""
        return (
            self.own_draw(student, number),
            self._draw(held_out_part(number), student, number, self.held_out, 1.0),
            self._draw("greedy", student, number, self.held_out, 0.0),
        )

    def _draw(
        self,
        part: str,
        student: Teacher,
        number: int,
        prompts: Sequence[ReadPrompt],
        temperature: float,
        count: int = 1,
    ) -> Draw:
        """The samples of one part, by other random numbers than those of any other round."""
        request, longest = sampling_request(self.params, student, temperature), self.params.max_tokens
        if part == own_part(number) and self.settings.horizon:
            longest = min(self.settings.horizon, longest)
        seed = int(digest([self.params.seed, "round", number])[:8], 16)
        request = replace(request, seed=seed, sampling=replace(request.sampling, max_tokens=longest))
        return Draw(request, list(to_draw(part, prompts, request, count)))

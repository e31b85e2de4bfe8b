"""The single rows that an experiment needs of a teacher, and how they follow from its prompts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import console
from pipeline.engines.base import Ask
from pipeline.prompts import Prompt, PromptFormat, encode_response
from pipeline.store.identity import Request, sample_key, sample_seed, score_key
from pipeline.teacher.corruption import corruptions


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt as models read it."""

    prompt: Prompt
    text: str  # rendered
    ids: np.ndarray  # int32 [P]


@dataclass(frozen=True, slots=True)
class Item:
    """One row that is wanted."""

    part: str  # of the selection: train, validation, scored
    prompt: Prompt
    text: str  # the rendered prompt
    prompt_ids: np.ndarray
    sample: int
    key: str
    origin: str = "teacher"
    response_ids: np.ndarray | None = None  # given where it is to be scored

    def ask(self) -> Ask:
        return Ask(self.key, self.prompt_ids, sample_seed(self.key), self.response_ids)

    def answered(self, response: np.ndarray) -> "Item":
        """What a student said to it, to be scored."""
        read = ReadPrompt(self.prompt, self.text, self.prompt_ids)
        return to_score(self.part, read, self.sample, "student", response)


def read_as_models_do(prompts: Sequence[Prompt], form: PromptFormat, tokenizer) -> tuple[list[ReadPrompt], int]:
    """Prompts with the text and the token ids that the teacher reads, and how many were left out.

    A training prompt whose token ids are those of a held-out one (of validation or test: unknown words, spaces) is left
    out, since their samples would be the same ones. A prompt of `student` is left out also where its token ids are
    those of a training prompt, which the teacher answers.
    """
    texts = form.texts(tokenizer, prompts)
    read = [ReadPrompt(*each) for each in zip(prompts, texts, form.encode_texts(tokenizer, texts), strict=True)]
    held_out = {each.ids.tobytes() for each in read if each.prompt.split in ("validation", "test")}
    training = {each.ids.tobytes() for each in of_split(read, "train")}
    taken = {"train": held_out, "student": held_out | training}
    kept = [each for each in read if each.ids.tobytes() not in taken.get(each.prompt.split, ())]
    left_out = Counter(each.prompt.split for each in read) - Counter(each.prompt.split for each in kept)
    if count := left_out["train"]:
        console.warn(
            f"{count:,} training prompts have the token ids of held-out prompts and are left out: the teacher could "
            "not tell them apart"
        )
    if count := left_out["student"]:
        console.warn(
            f"{count:,} prompts of the split student have the token ids of training or held-out prompts and are left "
            "out: the student could not tell them apart"
        )
    return kept, left_out.total()


def of_split(prompts: Iterable[ReadPrompt], split: str) -> list[ReadPrompt]:
    return [each for each in prompts if each.prompt.split == split]


def to_draw(part: str, prompts: Iterable[ReadPrompt], request: Request, count: int) -> Iterator[Item]:
    """`count` samples of each prompt."""
    for read in prompts:
        for sample in range(count):
            yield Item(part, read.prompt, read.text, read.ids, sample, sample_key(request, read.ids, sample))


def to_score(part: str, read: ReadPrompt, number: int, origin: str, response: np.ndarray) -> Item:
    """A given response."""
    return Item(part, read.prompt, read.text, read.ids, number, score_key(read.ids, response), origin, response)


def references(part: str, prompts: Iterable[ReadPrompt], tokenizer) -> Iterator[Item]:
    """The prompts' references, to be scored."""
    for read in prompts:
        for number, reference in enumerate(read.prompt.references):
            yield to_score(part, read, number, "reference", encode_response(tokenizer, reference))


def corrupted(part: str, prompts: Iterable[ReadPrompt], tokenizer, count: int, seed: int) -> Iterator[Item]:
    """Corrupted copies of each prompt's first reference, which depend on the prompt and the seed alone."""
    for read in prompts:
        right = [encode_response(tokenizer, reference) for reference in read.prompt.references]
        for number, wrong in enumerate(corruptions(right, count, [seed, *read.ids.tolist()]) if right else ()):
            yield to_score(part, read, number, "corrupted", wrong)

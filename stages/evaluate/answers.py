"""What a model answers to the test prompts: drawn from it, or read from the cache where `generate` has kept them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import console
from pipeline.engines import Ask
from pipeline.engines.base import Answer, needed
from pipeline.engines.hf import HfEngine
from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.params import Params
from pipeline.prompts import Prompt
from pipeline.store.identity import Sampling, sample_seed
from pipeline.store.schema import Row
from pipeline.store.selection import Selection


@dataclass(frozen=True)
class AnswerText:
    """One answer as text."""

    text: str
    tokens: int
    cut: bool  # at max_tokens, so it did not end by itself

    @classmethod
    def of(cls, answer: Answer | Row, text: str) -> "AnswerText":
        return cls(text, len(answer.response_ids), answer.finish == "length")


@dataclass(frozen=True)
class Answers:
    """What one model answers to the test prompts."""

    greedy: list[AnswerText]  # [test prompts]
    sampled: list[list[AnswerText]]  # [sampled prompts, the first ones][samples]


@dataclass(frozen=True)
class Asking:
    """A model that is asked. Its samples depend on the seed and the prompts' ids alone."""

    engine: HfEngine
    tokenizer: object
    params: Params
    stops: tuple[int, ...]

    def answers(self, prompts: Sequence[Prompt], ids: Sequence[np.ndarray], name: str) -> Answers:
        """To the test prompts, of token ids `ids`; name: the model's. Raises UserError where a row cannot be made."""
        settings, seed = self.params.evaluate, self.params.seed
        first, samples = prompts[: settings.sampled_prompts], range(settings.samples)
        greedy = [Ask(prompt.id, each) for prompt, each in zip(prompts, ids, strict=True)]
        drawn = [
            Ask(f"{prompt.id}/{sample}", each, sample_seed(digest([seed, prompt.id, sample])))
            for prompt, each in zip(first, ids, strict=False)
            for sample in samples
        ]
        greedy = self._run(greedy, 0.0, "greedy answers", name)
        drawn = self._run(drawn, settings.temperature, "sampled answers", name)
        return Answers(
            [self._text(greedy[prompt.id]) for prompt in prompts],
            [[self._text(drawn[f"{prompt.id}/{sample}"]) for sample in samples] for prompt in first],
        )

    def samples(self, prompts: Mapping[str, np.ndarray], name: str) -> dict[str, Answer]:
        """One sample, at temperature 1, to each of the held-out prompts (id -> token ids)."""
        asks = [Ask(key, ids, sample_seed(digest([self.params.seed, key, "own"]))) for key, ids in prompts.items()]
        return self._run(asks, 1.0, "held-out samples", name)

    def _run(self, asks: Sequence[Ask], temperature: float, what: str, name: str) -> dict[str, Answer]:
        sampling, answers = Sampling(temperature, 1.0, self.params.max_tokens, self.stops), {}
        with console.progress(f"{what} of {name}", len(asks)) as advance:
            for answer in needed(self.engine.sample(asks, sampling, k=1), f"the model {name}"):
                answers[answer.key] = answer
                advance()
        return answers

    def _text(self, answer: Answer) -> AnswerText:
        return AnswerText.of(answer, self.tokenizer.decode(answer.response_ids, skip_special_tokens=True))


def cached_answers(selection: Selection, params: Params, prompts: Sequence[Prompt]) -> Answers:
    """A teacher's answers to the test prompts, as `generate` has kept them.

    Raises UserError where the selection has not all of them, or they were drawn in another way.
    """
    settings = params.evaluate

    def read(part: str, temperature: float, prompts: Sequence[Prompt], count: int) -> list[list[AnswerText]]:
        sampling = selection.parts.get(part, {"request": {"sampling": {}}})["request"]["sampling"]
        known: dict[str, list[Row]] = {}
        if (sampling.get("temperature"), sampling.get("max_tokens")) == (temperature, params.max_tokens):
            for row in selection.rows(part, topk=False):
                known.setdefault(row.prompt_id, []).append(row)
        lacking = [prompt.id for prompt in prompts if len(known.get(prompt.id, ())) < count]
        if lacking:
            raise UserError(
                f"{selection.folder} lacks the teacher's {part} answers to {len(lacking):,} of {len(prompts):,} test "
                f"prompts (first: '{lacking[0]}'): run `xkd-pipeline generate` for these prompts and parameters; rows "
                "that it leaves out are named in skipped.jsonl"
            )
        return [[AnswerText.of(row, row.response) for row in known[prompt.id][:count]] for prompt in prompts]

    first = prompts[: settings.sampled_prompts]
    return Answers(
        [greedy for (greedy,) in read("greedy", 0.0, prompts, 1)],
        read("sampled", settings.temperature, first, settings.samples),
    )

"""What a task is: a seeded source of prompts with references, its vocabulary, and its metrics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from pipeline.tasks.metrics import Metric


@dataclass(frozen=True)
class Example:
    """One prompt and its acceptable answers, whitespace-separated tokens throughout."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Generator:
    """A source of built-in prompts. `version` changes whenever the same seed would give other examples."""

    example: Callable[[Random], Example]  # draws one example
    lexicon: Callable[[], list[str]]  # every token that an example can contain, sorted
    version: int = 1


@dataclass(frozen=True)
class Task:
    """A task. `version` changes whenever the same answers would get another score; its generator has another."""

    name: str
    version: int
    metrics: tuple[Metric, ...]  # the first one is the headline
    generator: Generator | None = None  # None: its prompts come from data sets
    checked: bool = False  # the headline metric says whether an answer is right or wrong

    def accepts(self, response: str, references: Sequence[str]) -> bool:
        """Whether a checked task's answer is right."""
        return bool(self.metrics[0].statistics([response], [references])[0, 0])

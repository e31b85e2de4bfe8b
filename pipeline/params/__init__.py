"""Every parameter with its default and its meaning: the one place. `params.yaml` is written from here."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.params.base import Count, Integer, Optimisation, Positive, Section, Temperature, Train
from pipeline.params.data import DataSet, Model, Prepare, Role, Teach, TeachBoth, TeachOptimisation
from pipeline.params.on_policy import OnPolicy
from pipeline.params.student import OBSERVING, TOKEN_OBJECTIVES, X_TERM, Distill, Lora, Residual, Reward
from pipeline.params.teacher import Generate, Score

__all__ = [
    "OBSERVING", "TOKEN_OBJECTIVES", "X_TERM",
    "DataSet", "Distill", "Evaluate", "Generate", "Lora", "Model", "OnPolicy", "Optimisation", "Params", "Prepare",
    "Report", "Residual", "Reward", "Role", "Score", "Section", "Teach", "TeachBoth", "TeachOptimisation",
    "Train",
]  # fmt: skip


class Evaluate(Section):
    kl: Literal["live", "cache"] = "live"
    """KL to the teacher: live runs it over held-out samples (exact), cache estimates it from the cached tokens."""
    samples: Annotated[Integer, Field(gt=1)] = 4
    """Sampled responses per prompt, for quality under sampling and for diversity."""
    sampled_prompts: Positive = 200
    """Test prompts that are also sampled, from the first."""
    temperature: Temperature = 1.0
    """Temperature of the sampled responses, at least 0.01."""
    stemmer: bool = True
    """ROUGE compares the stems of English words (Porter), as most published scores do; false for other languages."""
    bootstrap: Positive = 1000
    """Resamples for the intervals of divergences; those of metrics need none."""
    batch_size: Positive = 128
    """Sequences generated together."""


class Report(Section):
    samples: Count = 6
    """Test prompts whose answers are shown side by side: half drawn at random, half of those that fail."""
    rewarded_prompts: Count = 3
    """Held-out prompts whose responses are shown with the reward at every token."""


class Params(Section):
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    """Seed of everything: data, initial weights, batch order, teacher samples, bootstrap."""
    template: str = "{prompt} =>"
    """What the models read, made of the task's prompt."""
    chat: bool = False
    """Put the tokenizer's chat template around it, as one user message."""
    system: str = ""
    """System message of the chat; empty: none is given."""
    max_tokens: Positive = 48
    """Longest response in tokens: of the teacher, of the student's samples, and of every answer in evaluate."""
    train: Train = Train()
    """Teach, reward and distill alike; DVC does not track it."""
    prepare: Prepare = Prepare()
    teach: TeachBoth = TeachBoth()
    generate: Generate = Generate()
    score: Score = Score()
    reward: Reward = Reward()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    report: Report = Report()

    @model_validator(mode="after")
    def _template_has_a_prompt(self):
        if "{prompt}" not in self.template:
            raise ValueError(f"template {self.template!r} does not contain {{prompt}}")
        if self.system and not self.chat:
            raise ValueError("system is a message of a chat: set chat to true")
        return self

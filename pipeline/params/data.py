"""Parameters of prompts and of the two models that the pipeline makes."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.params.base import Count, Dropout, Optimisation, Positive, Section

Role = Literal["teacher", "student"]
Columns = Annotated[
    list[str], Field(min_length=1), BeforeValidator(lambda name: [name] if isinstance(name, str) else name)
]


class DataSet(Section):
    path: str = ""
    """Hub name, .jsonl, .csv or .parquet file, folder of these or of train.en and train.de; empty: a built-in task."""
    config: str = ""
    """Configuration of a hub data set, for instance main or de-en."""
    train_split: str = "train"
    """Its split for training (teach, train and student)."""
    validation_split: str = "validation"
    """Its held-out split; where there is none, prompts of the training split are held out."""
    test_split: str = "test"
    """Its split for the final scores."""
    prompt: str = "{prompt}"
    """Text of a prompt, made of columns; {a.b} looks inside a column, {a|b} is the first of these that a row has."""
    references: Columns = ["references"]
    """Columns of references, each a text or a list; a row may lack some of several."""
    remove: str = ""
    """Regular expression; what it matches is removed from references."""
    shots: Count = 0
    """Examples of the training split that are put before every prompt; they are used for nothing else."""
    shot: str = "{prompt}\n{reference}\n\n"
    """Form of one such example."""
    max_prompt_tokens: Count = 0
    """Longer prompts (rendered by template and chat template) are left out and counted; 0: no limit."""
    max_reference_tokens: Count = 0
    """Prompts whose first reference is longer are left out and counted; 0: no limit."""

    @field_validator("remove")
    @classmethod
    def _is_a_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @field_validator("shot")
    @classmethod
    def _shot_shows_both(cls, shot: str) -> str:
        if "{prompt}" not in shot or "{reference}" not in shot:
            raise ValueError("must contain {prompt} and {reference}")
        return shot


class Prepare(Section):
    task: Literal["arithmetic", "translation", "summarisation", "gsm8k"] = "arithmetic"
    """Metrics and, without a data set, the prompts; gsm8k (as in lm-eval) has no built-in prompts."""
    dataset: DataSet = DataSet()
    """A data set instead of the built-in prompts; the sizes below are then upper limits."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer; empty: one made of the built-in task's words."""
    teach: Count = 24000
    """Prompts with references that only the teacher learns from."""
    train: Positive = 2000
    """Prompts that the teacher answers for the student; their references make the student's starting point."""
    validation: Positive = 200
    """Held-out prompts for fitting decisions, the reward's audit and the divergence from the teacher."""
    test: Positive = 400
    """Prompts for the final scores."""
    student: Count = 0
    """Prompts for the student alone, which the teacher never answers; 0: none."""

    @model_validator(mode="after")
    def _source_fits(self):
        if self.dataset.path and not self.tokenizer:
            raise ValueError("dataset.path needs prepare.tokenizer: the folder or hub name of the teacher, usually")
        if not self.dataset.path and self.task == "gsm8k":
            raise ValueError("task gsm8k has no built-in prompts: set dataset.path")
        if not self.dataset.path and self.teach == 0:
            raise ValueError("teach is 0, but the teacher of a built-in task needs prompts to learn from")
        return self


class Model(Section):
    width: Positive
    """Hidden size."""
    layers: Positive
    """Transformer blocks."""
    heads: Positive
    """Attention heads; width / heads should be 32, 48, 64, ... for vLLM on a CPU."""
    intermediate: Positive
    """Width of the feed-forward block."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self):
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be an even multiple of heads ({self.heads})")
        return self


class TeachOptimisation(Optimisation):
    steps: Count
    """Optimiser steps; 0: no training."""


class Teach(Section):
    base: str = ""
    """Model to start from (folder or hub name; a folder with only a config.json gives the shape); empty: a new one."""
    layers: Count = 0
    """Blocks of the base to keep, evenly spaced; 0: all."""
    model: Model
    """Size of a new model."""
    split: Literal["teach", "train"]
    """Split whose references are learned."""
    pairs: Positive
    """Number of its pairs that are learned, from the first."""
    dropout: Dropout = 0.0
    """Dropout during training, instead of the rates in its configuration, which is saved unchanged."""
    optimisation: TeachOptimisation
    save_every: Positive = 200
    """Steps between checkpoints that a killed run resumes from."""

    @model_validator(mode="after")
    def _layers_of_a_base(self):
        if self.layers and not self.base:
            raise ValueError("layers cuts a base model: set base, or model.layers for a new model")
        return self


class TeachBoth(Section):
    teacher: Teach = Teach(
        model=Model(width=96, layers=3, heads=3, intermediate=256),
        split="teach",
        pairs=24000,
        optimisation=TeachOptimisation(steps=500, batch_size=64, learning_rate=2.5e-3),
    )
    student: Teach = Teach(
        model=Model(width=48, layers=2, heads=1, intermediate=128),
        split="train",
        pairs=500,
        optimisation=TeachOptimisation(steps=500, batch_size=32, learning_rate=3e-3),
    )

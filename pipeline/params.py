"""Every parameter with its default and its meaning: the one place. `params.yaml` is written from here."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Role = Literal["teacher", "student"]


class Section(BaseModel):
    """A group of parameters: unknown keys are errors, so that a typo is never ignored."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class DataSet(Section):
    path: str = ""
    """Hub name, `datasets` folder, folder of files, or a .jsonl, .csv or .parquet file; empty: the built-in task."""
    config: str = ""
    """Configuration of a hub data set, for instance main or de-en."""
    train_split: str = "train"
    """Its split for training (teach and train)."""
    validation_split: str = "validation"
    """Its held-out split; where there is none, prompts of the training split are held out."""
    test_split: str = "test"
    """Its split for the final scores."""
    prompt: str = "{prompt}"
    """Text of a prompt, made of columns; {translation.en} looks inside a column, a list of texts is joined."""
    references: str = "references"
    """Column of the reference or references."""
    remove: str = ""
    """Regular expression of what is removed from references."""
    shots: Count = 0
    """Examples of the training split that are put in front of every prompt; they are used for nothing else."""
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
    """Metrics and, without a data set, the prompts; gsm8k (the last number counts) has no built-in prompts."""
    dataset: DataSet = DataSet()
    """A data set in place of the built-in prompts; the sizes below are then upper limits."""
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

    @model_validator(mode="after")
    def _source_fits(self):
        if self.dataset.path and not self.tokenizer:
            raise ValueError("dataset.path needs prepare.tokenizer: the folder or hub name of the teacher, usually")
        if not self.dataset.path and self.task == "gsm8k":
            raise ValueError("task gsm8k has no built-in prompts: set dataset.path")
        if not self.dataset.path and self.teach == 0:
            raise ValueError("teach is 0: a built-in task needs prompts that its teacher learns from")
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


class Optimisation(Section):
    steps: Positive
    """Optimiser steps."""
    batch_size: Positive
    """Sequences a step."""
    learning_rate: PositiveFloat
    """Peak learning rate of AdamW, decayed by a cosine."""
    accumulation: Positive = 1
    """Micro-batches that a step's batch is split into, to save memory; the result is the same."""

    @model_validator(mode="after")
    def _splits_evenly(self):
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulation} equal micro-batches"
            )
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
    """How many of its pairs, from the first."""
    optimisation: TeachOptimisation

    @model_validator(mode="after")
    def _layers_of_a_base(self):
        if self.layers and not self.base:
            raise ValueError("layers cuts a base: set base, or model.layers for a new model")
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


class Generate(Section):
    teacher: str = "data/models/teacher"
    """Folder or hub name of the teacher."""
    engine: Literal["auto", "vllm", "hf", "stub", "text"] = "auto"
    """What runs the teacher; auto is vllm where it is installed, else hf; text runs none and keeps `responses`."""
    responses: str = ""
    """File (.jsonl or .parquet) of prompt and response made elsewhere: scored by the teacher in place of sampling."""
    accept: Literal["all", "correct"] = "all"
    """Training responses to select: all, or those that the task's checker finds correct (rejection sampling)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the teacher's weights; auto is the one they are stored in."""
    samples: Annotated[int, Field(gt=0, le=32767)] = 2
    """Responses a training prompt."""
    validation_samples: Annotated[int, Field(gt=0, le=32767)] = 1
    """Responses a held-out prompt."""
    corrupted: Count = 2
    """Corrupted copies of each held-out prompt's first reference, scored for the reward's audit."""
    k: Positive = 16
    """Most likely tokens kept at every position."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling."""
    rows_per_shard: Positive = 256
    """Samples a stored file; a killed run loses at most as many."""
    max_skipped: Count = 0
    """Rows that may be left out (too long, failed) before the stage counts as failed."""
    materialize: bool = True
    """Copy the selected rows into data/teacher, so that `dvc push` shares them; else read them from the store."""

    @model_validator(mode="after")
    def _text_needs_responses(self):
        if self.engine == "text" and not self.responses:
            raise ValueError("engine text runs no teacher: set responses to a file of prompts and responses")
        return self

    @model_validator(mode="after")
    def _greedy_is_one_sample(self):
        if self.temperature == 0 and max(self.samples, self.validation_samples) > 1:
            raise ValueError("temperature 0 is greedy, so all samples would be equal: set samples to 1 as well")
        return self


class Residual(Section):
    q_source: Literal["logits", "logprobs"]
    """Q-values: the raw logits (need the cache's lse) or their log-softmax."""
    gamma: Annotated[float, Field(gt=0, le=1)]
    """Discount."""
    terminal: Literal["drop", "zero"]
    """The last step: left out, or with a next value of zero."""


class Reward(Section):
    sarsa: Residual = Residual(q_source="logits", gamma=1.0, terminal="drop")
    """Residuals of the posterior that distillation reads (TD form `sarsa`)."""
    soft: Residual = Residual(q_source="logprobs", gamma=1.0, terminal="zero")
    """Residuals of the posterior that is audited and ranked with (TD form `soft`); by default it includes EOS."""
    sigma_min: PositiveFloat = 0.3
    """Floor of the posterior's deviation, in units of the residuals' own deviation c."""
    phi_kl: Annotated[list[NonNegativeFloat], Field(min_length=1)] = [0.03, 0.1, 0.3]
    """Candidate weights of KL(q || prior); the one with the best held-out likelihood is kept."""
    patience: Positive = 3
    """Held-out evaluations without improvement before a fit stops."""
    evaluate_every: Positive = 25
    """Steps between held-out evaluations."""
    optimisation: Optimisation = Optimisation(steps=300, batch_size=32, learning_rate=2e-3)
    bootstrap: Positive = 1000
    """Resamples for the audit's intervals."""


class Lora(Section):
    rank: Count = 0
    """Rank of the adapters on all linear layers of the blocks; 0: all weights are trained."""
    alpha: PositiveFloat = 16
    """Scale of the adapters, divided by the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters."""


class Distill(Section):
    objective: Literal["seqkd", "fkl", "rkl", "jsd"] = "fkl"
    """Distillation loss."""
    beta: Share = 0.5
    """Mixture weight of jsd (0 is fkl, 1 is rkl)."""
    tail: Literal["bucket"] = "bucket"
    """Use of the mass outside the teacher's top k: one extra outcome on both sides."""
    nll_weight: NonNegativeFloat = 0.0
    """Weight of the negative log-likelihood of the teacher's tokens, added to the loss."""
    reward: Literal["none", "frozen", "scratch", "zero"] = "frozen"
    """none is the plain loss; else the X- version: the fitted posterior, one learned along, or mu = 0, sigma = 1."""
    lam: NonNegativeFloat = 0.01
    """Weight of the TD consistency term."""
    kl_weight: NonNegativeFloat = 1.0
    """Weight of KL(q || prior); acts only with reward: scratch."""
    td: Literal["sarsa", "soft"] = "sarsa"
    """Form of the TD residual."""
    residual: Residual = Residual(q_source="logits", gamma=1.0, terminal="drop")
    """Must be what the reward was fitted with."""
    optimisation: Optimisation = Optimisation(steps=800, batch_size=32, learning_rate=3e-3)
    chunk: Positive = 4096
    """Response positions that go through the language-model head at once."""
    log_every: Positive = 20
    """Steps between logged points of the training curve."""
    evaluate_every: Positive = 100
    """Steps between held-out evaluations."""
    save_every: Positive = 100
    """Steps between checkpoints that a killed run resumes from."""
    seed: Count = 0
    """Added to the seed in this stage: another run on the same cached teacher and reward."""
    best: Literal["", "loss", "kd", "nll"] = ""
    """Keep the student with the lowest held-out value of this term; empty: the last one."""
    patience: Count = 0
    """Held-out evaluations without improvement of it before training stops; 0: train to the end."""
    lora: Lora = Lora()
    """Train low-rank adapters (LoRA, arXiv 2106.09685) and merge them into the student at the end."""
    report_to: list[str] = []
    """Trackers that follow the run (tensorboard, wandb, mlflow, dvclive, ...); each must be installed."""

    @model_validator(mode="after")
    def _best_is_watched(self):
        if self.patience and not self.best:
            raise ValueError("patience waits for the best held-out value: set best to loss, kd or nll as well")
        if self.best and self.save_every % self.evaluate_every:
            raise ValueError(
                f"best keeps checkpoints that were evaluated: save_every ({self.save_every}) must be a multiple of "
                f"evaluate_every ({self.evaluate_every})"
            )
        if self.best == "kd" and self.objective == "seqkd":
            raise ValueError("objective seqkd has no term kd: set best to loss or nll")
        return self

    @model_validator(mode="after")
    def _bounded_below(self):
        if self.reward == "scratch" and self.lam > self.kl_weight:
            raise ValueError(
                f"lam ({self.lam}) above kl_weight ({self.kl_weight}) with reward: scratch rewards a vanishing sigma "
                "without bound (a token's loss goes as (lam - kl_weight) * log sigma): lower lam or raise kl_weight"
            )
        return self


class Evaluate(Section):
    samples: Annotated[int, Field(gt=1)] = 4
    """Sampled responses a prompt, for quality under sampling and for diversity."""
    sampled_prompts: Positive = 200
    """Test prompts that are also sampled, from the first."""
    temperature: PositiveFloat = 1.0
    """Temperature of the sampled responses."""
    bootstrap: Positive = 1000
    """Resamples for the intervals."""
    batch_size: Positive = 128
    """Sequences generated together."""


class Report(Section):
    samples: Count = 6
    """Test prompts whose answers are shown side by side."""
    rewarded_prompts: Count = 3
    """Held-out prompts whose responses are shown with the reward at every token."""


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything: data, initial weights, batch order, teacher samples, bootstrap."""
    template: str = "{prompt} =>"
    """What the models read, made of the task's prompt."""
    chat: bool = False
    """Put the tokenizer's chat template around it, as one user message."""
    system: str = ""
    """System message of the chat; empty: none is given."""
    max_tokens: Positive = 48
    """Longest response, in tokens."""
    prepare: Prepare = Prepare()
    teach: TeachBoth = TeachBoth()
    generate: Generate = Generate()
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

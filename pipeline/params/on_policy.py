"""Parameters of learning from the student's own samples."""

from typing import Literal

from pydantic import model_validator

from pipeline.params.base import Count, Positive, Section, Share, Temperature


class OnPolicy(Section):
    """Off while both `refreshes` and `every` are 0."""

    refreshes: Count = 0
    """Times that the student answers prompts anew, spread evenly over the steps, from the first; 0: see every."""
    every: Count = 0
    """Steps from one refresh to the next, instead of a number of refreshes; 0 with refreshes 0: no student samples."""
    prompts: Count = 0
    """Prompts per refresh, other ones each time while there are any; 0: all, or as many as its steps learn from."""
    split: Literal["train", "student"] = "train"
    """Prompts that the student answers: those of the teacher's samples, or fresh ones (prepare.student)."""
    samples: Positive = 1
    """Samples of the student per prompt and refresh."""
    share: Share | Literal["auto"] = "auto"
    """Probability that a row is a student's sample, else of the data (GKD's lambda); auto: 1, gkd and minillm 0.5."""
    temperature: Temperature = 1.0
    """Temperature of the student's samples, at least 0.01; opd and minillm need 1."""
    mixture: Share | Literal["auto"] = "auto"
    """Share of the teacher in the distribution that minillm's samples are drawn from; auto: 0.2."""
    replay: Count = 0
    """Earlier refreshes whose samples are learned from as well."""
    horizon: Count = 0
    """Tokens of a student's sample that are drawn and learned from; 0: up to max_tokens."""
    scores: Literal["auto", "store", "live", "dense"] = "auto"
    """The teacher's word: kept in the store, or of a teacher in memory, on its kept tokens (live) or all (dense)."""
    engine: Literal["hf", "vllm", "ray"] = "hf"
    """What draws the student's samples with scores: store; generate.engine scores them."""
    validation: Count = 100
    """Held-out prompts that the student answers at each refresh, to be measured on; 0: it is not measured."""
    batch_size: Positive = 128
    """Student samples drawn together with the engine hf."""

    @property
    def on(self) -> bool:
        return bool(self.refreshes or self.every)

    @model_validator(mode="after")
    def _one_rhythm(self):
        if self.refreshes and self.every:
            raise ValueError(
                f"refreshes ({self.refreshes}) and every ({self.every}) both say when the student answers anew: set "
                "one of them to 0"
            )
        if self.on and self.share == 0:
            raise ValueError("share: 0 learns from no sample of the student: set refreshes and every to 0")
        return self

"""Types that every section of the parameters uses."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of parameters: unknown keys are errors, so that a typo is never ignored."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


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

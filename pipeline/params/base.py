"""Types that every section of the parameters uses."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LEAST_TEMPERATURE = 0.01  # vllm raises smaller positive values to this


def _not_a_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _temperature(value: float) -> float:
    if value < LEAST_TEMPERATURE:
        raise ValueError(
            f"must be at least {LEAST_TEMPERATURE}: smaller ones are as good as greedy, and engines do not agree on "
            "what they mean"
        )
    return value


# Numbers of every section are of these types: true is not 1, values must be finite, and -0.0 becomes 0.
Integer = Annotated[int, BeforeValidator(_not_a_switch)]
Float = Annotated[
    float, BeforeValidator(_not_a_switch), Field(allow_inf_nan=False), AfterValidator(lambda value: value + 0.0)
]
Positive = Annotated[Integer, Field(gt=0)]
Count = Annotated[Integer, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Temperature = Annotated[Float, AfterValidator(_temperature)]
TemperatureOrGreedy = Annotated[Float, AfterValidator(lambda value: _temperature(value) if value else value)]
Dropout = Annotated[Float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of parameters: unknown keys are errors, so that a typo is never ignored."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Optimisation(Section):
    steps: Positive
    """Optimiser steps."""
    batch_size: Positive
    """Sequences per step."""
    learning_rate: PositiveFloat
    """Peak learning rate of AdamW, decayed by a cosine."""
    accumulation: Positive = 1
    """Micro-batches per step, to save memory; the result is the same."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: the models compute in bfloat16 (mixed precision); weights, optimiser, head and losses stay in float32."""

    @model_validator(mode="after")
    def _splits_evenly(self):
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulation} equal micro-batches"
            )
        return self


class Train(Section):
    """How whatever is trained is trained: no effect on the result, apart from the rounding of sums."""

    processes: Positive = 1
    """Processes that train one model together, a GPU each or else cores of their own; each takes a part of a batch."""
    gradient_checkpointing: bool = False
    """Keep what a block gets and not what it computes, which is computed again: less memory, a third more time."""

"""Parameters of what is asked of the teacher."""

import math
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.layout import Layout
from pipeline.params.base import Count, Float, Integer, Positive, Section, Temperature, TemperatureOrGreedy

# Arguments of vLLM's `LLM` that say how it runs and not what it answers.
EngineOption = Literal[
    "block_size", "cpu_offload_gb", "disable_custom_all_reduce", "enable_expert_parallel", "enable_prefix_caching",
    "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_batched_tokens",
    "max_num_seqs", "max_parallel_loading_workers", "num_gpu_blocks_override", "safetensors_load_strategy",
]  # fmt: skip
_SWITCHES = {"disable_custom_all_reduce", "enable_expert_parallel", "enable_prefix_caching", "enforce_eager"}
_TEXTS = {"safetensors_load_strategy"}


def _option(name: str, value: bool | int | float | str) -> bool | int | float | str:
    """The value of an engine option. Raises ValueError where it is of the wrong type."""
    if name in _SWITCHES or name in _TEXTS:
        if not isinstance(value, bool if name in _SWITCHES else str):
            raise ValueError(f"{name} must be {'true or false' if name in _SWITCHES else 'a text'}, not {value!r}")
        return value
    if isinstance(value, str):  # for YAML, 1e9 is a text
        with suppress(ValueError):
            value = int(float(value)) if float(value).is_integer() else float(value)
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return value


class Generate(Section):
    teacher: str = str(Layout().teacher)
    """Folder or hub name of the teacher."""
    engine: Literal["auto", "vllm", "hf", "ray", "stub", "text"] = "auto"
    """What runs the teacher: auto (vllm if installed, else hf), ray (copies of one), text (none; keeps `responses`)."""
    replicas: Positive = 2
    """Copies of the engine that ray runs, each with its share of the CPUs or its own GPUs."""
    replica_engine: Literal["auto", "vllm", "hf", "stub"] = "auto"
    """The engine that ray runs copies of."""
    tensor_parallel: Positive = 1
    """GPUs that share every layer of the teacher (vllm)."""
    pipeline_parallel: Positive = 1
    """Groups of layers on GPUs of their own, one after the other (vllm); a copy needs the product of both sizes."""
    quantization: str = ""
    """How vllm quantizes the teacher: fp8, bitsandbytes, ...; empty: not beyond how the weights are stored."""
    engine_options: dict[EngineOption, bool | int | float | str] = {}
    """Arguments for vLLM that change no answer, such as {gpu_memory_utilization: 0.8, max_num_seqs: 256}."""
    responses: str = ""
    """File (.jsonl or .parquet) of prompts and responses made elsewhere: scored by the teacher instead of sampling."""
    accept: Literal["all", "correct"] = "all"
    """Training responses to select: all, or those that the task's checker finds correct (rejection sampling)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the teacher's weights; auto: the one they are stored in."""
    samples: Annotated[Integer, Field(gt=0, le=32767)] = 2
    """Responses per training prompt."""
    validation_samples: Annotated[Integer, Field(gt=0, le=32767)] = 1
    """Responses per held-out prompt."""
    corrupted: Count = 2
    """Corrupted copies of the first reference per held-out prompt, scored for the reward's audit."""
    k: Count = 16
    """Tokens kept per position; 0: none, only the log-probability of the response's own."""
    support: Literal["sampled", "topk"] = "sampled"
    """Which tokens are kept: a draw that stands for all of them without bias, or the most likely ones."""
    temperature: Annotated[TemperatureOrGreedy, Field(le=2)] = 1.0
    """Sampling temperature, at least 0.01; 0 is greedy."""
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling."""
    rows_per_shard: Positive = 256
    """Samples per stored file; a killed run loses at most as many, and what the engine is working on."""
    max_skipped: Count = 0
    """Rows that may be left out (too long, failed) before the stage counts as failed."""
    materialize: bool = True
    """Copy the selected rows into data/teacher, so that `dvc push` shares them; false: read them from the store."""

    @field_validator("engine_options")
    @classmethod
    def _options_are_of_their_kind(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {name: _option(name, value) for name, value in options.items()}

    @model_validator(mode="after")
    def _fits_together(self):
        if self.engine == "text" and not self.responses:
            raise ValueError("engine text runs no teacher: set responses to a file of prompts and responses")
        if self.support == "sampled" and self.k == 0:
            raise ValueError("support sampled keeps at least one token per position: set k, or support to topk")
        if self.temperature == 0 and max(self.samples, self.validation_samples) > 1:
            raise ValueError("temperature 0 is greedy, so all samples would be equal: set samples to 1 as well")
        return self


class Score(Section):
    """References of the training prompts are always scored."""

    samples: Count = 1
    """Samples of the student's starting point per training prompt, as negatives for the reward's fit."""
    corrupted: Count = 1
    """Corrupted copies of the first reference per training prompt, as negatives too."""
    prompts: Count = 1000
    """Number of training prompts that get negatives, from the first; 0: all."""
    validation_samples: Count = 8
    """Samples of the student per held-out prompt; the reward's audit must rank the right over the wrong ones."""
    temperature: Temperature = 1.0
    """Temperature of the student's samples, at least 0.01."""
    batch_size: Positive = 128
    """Student samples generated together."""

"""What asking a teacher takes, on paper: a model's memory from its configuration, bytes in the store, GPU-hours."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.store.requests import Location
from pipeline.store.schema import response_lengths

GIB = 2**30
SEQUENCES = 64  # answered together: fewer leave a GPU waiting
USABLE = 0.9  # of a GPU's memory, for weights and cache; the rest is for activations and logits


@dataclass(frozen=True)
class ModelMemory:
    """What a model takes on GPUs."""

    parameters: int
    weights: int  # bytes
    cache: int  # bytes of keys and values per token

    @classmethod
    def of(cls, config, dtype: str) -> "ModelMemory":
        """From a configuration alone: the model is built without memory, so the count is exact for any architecture.

        Every layer is taken to keep keys and values of its own for every token: sliding windows, latent or linear
        attention keep less. An encoder-decoder model keeps the decoder's: its own of the response's tokens, the
        cross-attention's of the prompt's.

        Raises UserError where transformers has no language model of that configuration.
        """
        import torch

        from pipeline.models.loading import lm_class

        try:
            with torch.device("meta"):
                model = lm_class(config).from_config(config, trust_remote_code=False)
        except (ValueError, KeyError) as error:
            raise UserError(f"no language model of type {config.model_type} can be built: {error}") from error
        bytes_per_number = getattr(torch, dtype).itemsize
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cached = _cached_numbers(config.get_text_config())
        return cls(parameters, parameters * bytes_per_number, cached * bytes_per_number)

    def fewest_gpus(self, length: int, memory: float) -> int:
        """How many GPUs of `memory` GiB hold one copy with the cache of SEQUENCES sequences of `length` tokens.

        A power of two, into which a model's heads can be divided.
        """
        needed, gpus = self.weights + SEQUENCES * length * self.cache, 1
        while gpus * memory * GIB * USABLE < needed:
            gpus *= 2
        return gpus


def _cached_numbers(config) -> int:
    """Numbers that the attention keeps of one token, in all (decoder) layers."""
    if not hasattr(config, "num_attention_heads"):
        return 0  # a state-space model keeps a state of fixed size
    layers, heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    if config.is_encoder_decoder:
        layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or layers
        heads = getattr(config, "decoder_attention_heads", None) or heads
    heads = heads or config.num_attention_heads
    return 2 * layers * heads * (width or config.hidden_size // config.num_attention_heads)


# Bytes per token of SmolLM2's answers to GSM8K, their ids spread over a vocabulary of 152,064 (docs/cost.md): as text
# alone, with no tokens of the teacher kept, and the straight lines in k.
_TEXT, _NO_TOKENS = 5.4, 12.3
_LINES = {"sampled": (16.5, 3.87), "topk": (18.0, 3.72)}


def bytes_per_token(k: int, support: str | None) -> float:
    """Bytes that a response token takes in the store with k tokens per position, prompts and text included.

    support: sampled or topk; None for text alone. As `tests/benchmarks/bytes_per_token.py` measured.
    """
    if support is None or k == 0:
        return _TEXT if support is None else _NO_TOKENS
    start, slope = _LINES[support]
    return start + slope * k


@dataclass(frozen=True)
class Held:
    """What the shards of one request hold."""

    lengths: Mapping[str, int]  # key -> response tokens
    bytes_per_token: float | None  # of that k and support; None where nothing is held

    @classmethod
    def of(cls, index: Mapping[str, Iterable[Location]], k: int, support: str | None) -> "Held":
        """Of an index of the store; shards of another k or support are scaled."""
        lengths: dict[str, int] = {}
        size, tokens = 0.0, 0
        shards = {location.shard: location for locations in index.values() for location in locations}
        for shard, location in shards.items():
            in_shard = response_lengths(shard)
            lengths |= in_shard
            scale = bytes_per_token(k, support) / bytes_per_token(location.k, location.support)
            size += shard.stat().st_size * scale
            tokens += sum(in_shard.values())
        return cls(lengths, size / tokens if tokens else None)

    @property
    def mean(self) -> float | None:
        """Mean length of a response; None where nothing is held."""
        return sum(self.lengths.values()) / len(self.lengths) if self.lengths else None


@dataclass(frozen=True)
class Need:
    """What is to be made."""

    responses: float
    prompt_tokens: float
    response_tokens: float
    store: float  # bytes

    def __add__(self, other: "Need") -> "Need":
        return Need(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def gpu_hours(self, rate: float) -> float:
        """At `rate` response tokens per second and GPU."""
        return self.response_tokens / rate / 3600

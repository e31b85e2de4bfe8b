"""Loading models from a folder, a hub name, or a link to either.

Weights are safetensors only, and no code that comes with a model is run. A link is a folder with a `link.json`: a
model of gigabytes is used where it lies, and DVC still tracks which one it is.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, in_one_line
from pipeline.files import read_json, write_json_atomically
from pipeline.models.saving import replacing_model
from pipeline.models.weights import require_complete, weight_files, weight_names

_LINK = "link.json"


def link_model(folder: Path, source: str | Path, weights: str) -> None:
    """Make `folder` stand for the model `source` (folder or hub name), whose weights have the digest `weights`."""
    where = str(Path(source).resolve()) if Path(source).is_dir() else str(source)
    if where == os.path.realpath(folder):
        raise UserError(f"{folder} is the base itself, which would be replaced by a link: choose another --out")
    with replacing_model(folder) as made:
        write_json_atomically(made / _LINK, {"source": where, "weights": weights})


def read_link(source: str | Path) -> dict:
    """The `source` that a link stands for and the digest of its `weights`; for anything else itself and None."""
    link = Path(source) / _LINK
    if not os.path.lexists(link):
        return {"source": source, "weights": None}
    entries = read_json(link)
    if not isinstance(entries, dict) or not all(isinstance(entries.get(key), str) for key in ("source", "weights")):
        raise UserError(f"{link} does not say which model it stands for (source, weights): make the link again")
    return entries


def resolve(source: str | Path) -> str | Path:
    """What a link stands for; anything else is itself."""
    return read_link(source)["source"]


def source_of(source: str | Path) -> str:
    """A model's name for people, also of what a link stands for: hub name, or the last part of a folder's path."""
    named = resolve(source)
    return Path(named).name if named != source and Path(named).is_dir() else str(named)


def has_weights(source: str | Path) -> bool:
    """False for a folder that holds a configuration alone; a hub name is taken to have weights.

    Raises UserError as `weight_names` does.
    """
    folder = Path(resolve(source))
    return not folder.is_dir() or bool(weight_names(folder))


def load_config(source: str | Path):
    """The configuration of a folder or hub name. Raises UserError where it cannot be read or has no vocabulary."""
    from transformers import AutoConfig

    config = load_pretrained(AutoConfig, source, "model")
    text = config.get_text_config()
    for name in ("vocab_size", "max_position_embeddings"):
        value = getattr(text, name, None)
        absent = value is None and name != "vocab_size"
        if not absent and (type(value) is not int or value < 1):
            raise UserError(f"the config.json of {resolve(source)} has {name} {value!r}, expected a number above 0")
    return config


def best_device() -> str:
    """Where models run: the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def lm_class(config):
    """The transformers class that makes a language model of a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_lm(source: str | Path, dtype: str = "float32"):
    """A causal or an encoder-decoder language model in evaluation mode; `dtype` as in `generate.dtype`.

    Raises UserError where its weights are not exactly those of its configuration.
    """
    from transformers import GenerationConfig

    folder = local_folder(source)
    weight_files(folder)
    read_generation_config(folder)  # from_pretrained ignores a broken one
    config = load_config(folder)
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, info = load_pretrained(lm_class(config), folder, "model", **options)
    require_complete(info, folder)
    start = None
    if model.config.is_encoder_decoder:
        _require_plain_decoding(model.generation_config, source)
        start = model.generation_config.decoder_start_token_id
        start = getattr(model.config, "decoder_start_token_id", start)
        if type(start) is not int:
            raise UserError(f"the config.json of {source} has decoder_start_token_id {start!r}, expected a token id")
        model.config.decoder_start_token_id = start
    # Nothing hidden in a model's own generation_config may change how it is sampled here.
    model.generation_config = GenerationConfig(decoder_start_token_id=start)
    return model.eval()


def require_loadable(source: str | Path) -> None:
    """Raises UserError where `load_lm` would, for engines that load by themselves; reads no weights.

    Quantized weights are left to the engine: transformers may not be able to read them.
    """
    folder = local_folder(source)
    weight_files(folder)
    config = load_config(folder)
    if getattr(config, "quantization_config", None) is None:
        options = {"device_map": "meta", "use_safetensors": True, "output_loading_info": True}
        require_complete(load_pretrained(lm_class(config), folder, "model", **options)[1], folder)


def _require_plain_decoding(generation_config, source: str | Path) -> None:
    """Raises UserError where a model's answers do not follow its own probabilities."""
    for name in ("forced_bos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
        if getattr(generation_config, name, None) is not None:
            raise UserError(
                f"{source} forces or forbids tokens in its answers ({name}), as BART, mBART, M2M100, NLLB and Marian "
                "do: use a model that does not, such as one of the T5 or Pegasus families"
            )


def load_pretrained(auto_class, source: str | Path, what: str, **options) -> Any:
    """`auto_class.from_pretrained` with clear errors. A Path is a folder; text may also be a hub name."""
    source = resolve(source)
    local, text = Path(source), str(source)
    may_be_hub_name = isinstance(source, str) and text.count("/") == 1 and text[0] not in "./~"
    if not local.is_dir() and not may_be_hub_name:
        raise UserError(
            f"no {what} at {source}" + (": not a folder, and not a hub name" if isinstance(source, str) else "")
        )
    where = "" if local.is_dir() else " (no folder of that name, so it was looked up on the hub)"
    with in_one_line(f"cannot load the {what} of {source}{where}"):
        return auto_class.from_pretrained(str(source), trust_remote_code=False, **options)


def read_generation_config(folder: Path) -> dict:
    """What a model's generation_config.json says; empty where it has none. Raises UserError where it is broken."""
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return {}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds a {type(settings).__name__}, expected settings")
    return settings


def stop_token_ids(source: str | Path, tokenizer) -> tuple[int, ...]:
    """Ids of tokens that end a response: the tokenizer's EOS and those of the model's generation_config.

    Raises UserError for an `eos_token_id` outside the model's vocabulary.
    """
    folder = local_folder(source, weights=False)
    eos = read_generation_config(folder).get("eos_token_id")
    tokens = eos if isinstance(eos, list) else [] if eos is None else [eos]
    size = load_config(folder).get_text_config().vocab_size if tokens else 0
    for token in tokens:
        if type(token) is not int or not 0 <= token < size:
            raise UserError(
                f"{folder / 'generation_config.json'} has eos_token_id {token!r}, expected ids from 0 to {size - 1}"
            )
    return tuple(sorted({tokenizer.eos_token_id, *tokens}))


@dataclass(frozen=True)
class Context:
    """Most tokens a model can attend to, None if unknown: of prompt and response together, or of `each` of them."""

    tokens: int | None
    each: bool = False

    @classmethod
    def of(cls, config) -> "Context":
        """From a configuration. An encoder reads the prompt, and its decoder only the response."""
        tokens = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(tokens, bool(config.is_encoder_decoder))

    def holds(self, prompt: int, response: int) -> bool:
        """Whether a prompt and a response of so many tokens fit."""
        return self.tokens is None or (max(prompt, response) if self.each else prompt + response) <= self.tokens


def local_folder(source: str | Path, weights: bool = True) -> Path:
    """The folder of a model; a hub name is downloaded (configuration, tokenizer and, with `weights`, the weights)."""
    source = resolve(source)
    if Path(source).is_dir():
        return Path(source)
    load_config(source)  # a clear error if it is neither a folder nor on the hub
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]
    if weights:
        patterns.append("*.safetensors")
    # Mistral's second copy of the weights, which transformers does not load.
    return Path(snapshot_download(str(source), allow_patterns=patterns, ignore_patterns=["consolidated*"]))


def require_context(config, lengths: Iterable[tuple[int, int]], what: str) -> None:
    """Raises UserError where tokens of a (prompt, response) do not fit into a model's context."""
    context = Context.of(config)
    beyond = [(prompt, response) for prompt, response in lengths if not context.holds(prompt, response)]
    if beyond:
        prompt, response = max(beyond, key=sum)
        raise UserError(
            f"{what} reads at most {context.tokens} tokens, and the longest sequence has {prompt} + {response}: use a "
            "model with a longer context, shorter prompts or a lower max_tokens"
        )

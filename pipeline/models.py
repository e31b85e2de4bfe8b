"""Models and tokenizers: building tiny ones, loading, and knowing whether two are the same.

Weights are safetensors only, and no code that comes with a model is run.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.shards.files import digest, sha256_file, writing_to

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
_NOT_IDENTITY = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "id2label", "label2id"}


def word_tokenizer(words: list[str]):
    """A word-level tokenizer of whitespace-separated `words`, with BOS before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([PAD, BOS, EOS, UNK, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD, BOS, EOS, UNK])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tokenizer_identity(tokenizer) -> str:
    """Digest of what a fast tokenizer does to text, and of its special tokens; padding and truncation apart."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer: a tokenizer.json is needed")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    return digest({"state": state, "eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id})


def load_tokenizer(source: str | Path):
    """The fast tokenizer of a folder or hub name."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, source, "tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: str | Path):
    """The configuration of a folder or hub name."""
    from transformers import AutoConfig

    return _load(AutoConfig, source, "model")


def load_causal_lm(source: str | Path, dtype: str = "float32"):
    """A causal language model in evaluation mode; `dtype` as in `generate.dtype`."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = load_config(source)
    if config.is_encoder_decoder:
        raise UserError(f"{source} is an encoder-decoder model; only causal models are supported")
    model = _load(AutoModelForCausalLM, source, "model", dtype=dtype, use_safetensors=True)
    # Nothing hidden in a model's own generation_config may change how it is sampled here.
    model.generation_config = GenerationConfig()
    return model.eval()


def _load(auto_class, source: str | Path, what: str, **options) -> Any:
    """A Path is a folder; text may also be a hub name."""
    local, text = Path(source), str(source)
    may_be_hub_name = isinstance(source, str) and text.count("/") == 1 and text[0] not in "./~"
    if not local.is_dir() and not may_be_hub_name:
        raise UserError(
            f"no {what} at {source}" + (": not a folder, and not a hub name" if isinstance(source, str) else "")
        )
    try:
        return auto_class.from_pretrained(str(source), trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        where = "" if local.is_dir() else " (no folder of that name here, so it was looked for on the hub)"
        raise UserError(f"cannot load the {what} of {source}{where}: {reason}") from error


def stop_token_ids(source: str | Path, tokenizer) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's EOS and those of the model's generation_config."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    try:
        eos = GenerationConfig.from_pretrained(str(source)).eos_token_id
    except OSError:  # a model without a generation_config.json
        eos = None
    ids.update([eos] if isinstance(eos, int) else eos or [])
    return tuple(sorted(ids))


def context_length(config) -> int | None:
    """Most tokens that the model can attend to, where its configuration says."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class ModelSize:
    """Shape of a tiny Llama-like model."""

    width: int
    layers: int
    heads: int
    intermediate: int


def build_causal_lm(size: ModelSize, tokenizer, context: int, seed: int):
    """A new Llama-like model with tied embeddings (RMSNorm, RoPE, SwiGLU), weights drawn with `seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=size.width**-0.5 / 2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


_MODEL_FILES = (".safetensors", ".json", ".md", ".jinja", ".txt", ".model")


def require_replaceable(folder: Path) -> None:
    """Raises UserError unless `folder` is missing, empty, or holds a model and nothing else: it will be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder for a model: choose another --out")
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if (folder / name).is_dir() or not name.endswith(_MODEL_FILES)]
    if names and (others or "config.json" not in names):
        raise UserError(
            f"{folder} holds other things than a model ({', '.join((others or names)[:3])}, ...), which would go: "
            "choose another --out"
        )


def save_model(folder: Path, model, tokenizer, card: str, stops: tuple[int, ...] | None = None) -> None:
    """A plain Hugging Face folder: safetensors, configuration, tokenizer, model card; whole or absent.

    stops: tokens that end a response, by default the tokenizer's EOS.
    """
    require_replaceable(folder)
    model.generation_config.eos_token_id = list(stops or (tokenizer.eos_token_id,))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with writing_to(folder.parent):
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            temporary.chmod(0o755)
            for file in temporary.iterdir():  # safetensors makes its files private
                file.chmod(0o644)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def require_context(config, longest: int, what: str) -> None:
    """Raises UserError where `longest` tokens do not fit into a model's context."""
    context = context_length(config)
    if context is not None and longest > context:
        raise UserError(
            f"{what} reads at most {context} tokens, and the longest sequence has {longest}: use a model with a longer "
            "context, shorter prompts or a lower max_tokens"
        )


def weights_digest(folder: Path) -> str:
    """Digest of the weight files of a local folder, whatever their names and number of names.

    Raises UserError where there are none: other formats than safetensors are refused.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors weights (other formats are not loaded)")
    return digest(sorted(sha256_file(file) for file in files))


def local_folder(source: str | Path) -> Path:
    """The folder of a model, which a hub name is downloaded to (weights, configuration, tokenizer)."""
    if Path(source).is_dir():
        return Path(source)
    load_config(source)  # a clear error for what is neither a folder nor on the hub
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            str(source), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
        )
    )


def describe_model(source: str | Path, dtype: str) -> dict:
    """What identifies a teacher, and where it came from.

    `identity` is a digest of weights, configuration (without paths and versions), tokenizer and dtype: the same
    weights at another path or under another name are the same teacher. `name`, `commit` and `licence` are provenance.
    """
    folder = local_folder(source)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    if dtype == "auto":
        dtype = str(config.dtype).removeprefix("torch.") if config.dtype is not None else "float32"
    # The file, not the loaded object: that also holds the defaults of the installed transformers.
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in stored.items() if key not in _NOT_IDENTITY}
    identity = digest(
        {
            "weights": weights_digest(folder),
            "config": settings,
            "tokenizer": tokenizer_identity(tokenizer),
            "dtype": dtype,
        }
    )
    from_hub = not Path(source).is_dir()
    return {
        "identity": identity[:16],
        "tokenizer": tokenizer_identity(tokenizer)[:16],
        "vocab_size": config.get_text_config().vocab_size,
        "dtype": dtype,
        "licence": _licence(folder),
        "name": str(source) if from_hub else None,
        "commit": folder.name if from_hub else None,
    }


def _licence(folder: Path) -> str | None:
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except ValueError:  # a card whose front matter is not YAML says nothing about the licence
        return None
    return metadata.get("license")


def require_same_tokenizer(teacher_identity: str, student_tokenizer, student: str | Path) -> None:
    """Raises UserError unless the cached teacher's tokenizer is the student's."""
    found = tokenizer_identity(student_tokenizer)[:16]
    if found != teacher_identity:
        raise UserError(
            f"the tokenizer of {student} ({found}) is not the teacher's ({teacher_identity}): token ids would mean "
            "different things. Use a student of the teacher's family, or build one with the teacher's tokenizer"
        )

"""What identifies a teacher, and where it came from."""

import json
from pathlib import Path

from pipeline.errors import UserError
from pipeline.models.loading import load_config, local_folder, read_link
from pipeline.models.tokenizers import load_tokenizer, tokenizer_identity
from pipeline.shards.files import digest, sha256_file

_NOT_IDENTITY = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "id2label", "label2id"}


def weights_digest(folder: Path) -> str:
    """Digest of the weight files of a local folder, whatever their names and number of names.

    Raises UserError where there are none: other formats than safetensors are refused.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors weights (other formats are not loaded)")
    return digest(sorted(sha256_file(file) for file in files))


def describe_model(source: str | Path, dtype: str, quantization: str = "") -> dict:
    """What identifies a teacher, and where it came from.

    `identity` is a digest of weights, configuration (without paths and versions), tokenizer, dtype and quantization:
    the same weights at another path or under another name are the same teacher. `name`, `commit` and `licence` are
    provenance.
    """
    link = read_link(source)
    source, folder = link["source"], local_folder(source)
    weights = weights_digest(folder)
    if link["weights"] not in (None, weights):
        raise UserError(
            f"the weights of {source} have changed since it was made the teacher: dvc repro -f teach@teacher"
        )
    config, tokenizer = load_config(folder), tokenizer_identity(load_tokenizer(folder))
    dtype = number_type(config, dtype)
    # The file, not the loaded object: that also holds the defaults of the installed transformers.
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in stored.items() if key not in _NOT_IDENTITY}
    quantized = {"quantization": quantization} if quantization else {}
    identity = digest({"weights": weights, "config": settings, "tokenizer": tokenizer, "dtype": dtype} | quantized)
    from_hub = not Path(source).is_dir()
    return {
        "identity": identity[:16],
        "tokenizer": tokenizer[:16],
        "vocab_size": config.get_text_config().vocab_size,
        "dtype": dtype,
        "licence": licence_of(folder),
        "name": str(source) if from_hub else None,
        "commit": folder.name if from_hub else None,
    } | quantized


def number_type(config, dtype: str) -> str:
    """`generate.dtype`, where auto is the type that the configuration says the weights are stored in."""
    if dtype != "auto":
        return dtype
    return str(config.dtype).removeprefix("torch.") if config.dtype is not None else "float32"


def licence_of(folder: Path) -> str | None:
    """The licence that a model's card states, if any."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except ValueError:  # a card whose front matter is not YAML says nothing about the licence
        return None
    return metadata.get("license")

"""What identifies a teacher, and where it came from."""

from pathlib import Path

import yaml

from pipeline import console
from pipeline.errors import UserError, printable
from pipeline.files import digest, read_json, read_text, sha256_file
from pipeline.models.loading import load_config, local_folder, read_link
from pipeline.models.tokenizers import load_tokenizer, tokenizer_identity
from pipeline.models.weights import unread_files, weight_files

_NOT_IDENTITY = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "id2label", "label2id"}
_CARD_CHARACTERS = 2**16  # of a model card that are read


def weights_digest(folder: Path) -> str:
    """Digest of the weight files of a local folder that loading reads, whatever their names and number.

    Raises UserError as `weight_files` does.
    """
    return _digest_of(weight_files(folder))


def _digest_of(files: list[Path]) -> str:
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
    # The file, not the loaded object, which also holds the defaults of the installed transformers.
    settings = {key: value for key, value in read_json(folder / "config.json").items() if key not in _NOT_IDENTITY}
    quantized = {"quantization": quantization} if quantization else {}

    def identity_of(weights: str) -> str:
        return digest({"weights": weights, "config": settings, "tokenizer": tokenizer, "dtype": dtype} | quantized)[:16]

    if unread := unread_files(folder):
        former = identity_of(_digest_of([*weight_files(folder), *unread]))
        console.warn(
            f"{', '.join(file.name for file in unread)} in {folder} is not read by loading and not part of the "
            f"teacher's identity, which is {identity_of(weights)}: rows that an earlier version stored as {former} are "
            "not used"
        )
    from_hub = not Path(source).is_dir()
    return {
        "identity": identity_of(weights),
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
    """The licence in the front matter of a model's card, if any: a text, or several joined by commas.

    The front matter is parsed but no objects are made: dates stay text, tags do nothing, aliases are not followed.
    """
    try:
        card = read_text(folder / "README.md", "replace", _CARD_CHARACTERS)
        _, front, _ = card.split("---", 2)
        root = yaml.compose(front, yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # such a card says nothing about the licence
        return None
    entries = root.value if isinstance(root, yaml.MappingNode) else ()
    stated = [value for key, value in entries if key.value == "license"]
    nodes = stated[0].value if stated and isinstance(stated[0], yaml.SequenceNode) else stated
    texts = [node.value for node in nodes if isinstance(node, yaml.ScalarNode) and node.value]
    return " ".join(printable(", ".join(texts)).split())[:200] or None

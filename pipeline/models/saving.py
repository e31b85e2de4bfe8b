"""Saving model folders: whole or absent, and never over files that are not ours."""

from pathlib import Path

from pipeline.outputs import replacing, require_own_folder

_MODEL = "a model"


def require_own_model(folder: Path) -> None:
    """Raises UserError unless a model may be saved there: `folder` is missing, empty or holds one that we saved."""
    require_own_folder(folder, _MODEL)


def replacing_model(folder: Path):
    """A new folder to fill, which then takes the place of `folder`."""
    return replacing(folder, _MODEL)


def save_note(folder: Path, note: str) -> None:
    """Replace a model folder with a README that says why there is no model."""
    with replacing_model(folder) as made:
        (made / "README.md").write_text(note + "\n", encoding="utf-8")


def save_model(folder: Path, model, tokenizer, card: str, stops: tuple[int, ...] | None = None) -> None:
    """A plain Hugging Face folder: safetensors, configuration, tokenizer, model card; whole or absent.

    stops: ids of tokens that end a response, by default the tokenizer's EOS.
    """
    with replacing_model(folder) as made:
        model.generation_config.eos_token_id = list(stops or (tokenizer.eos_token_id,))
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "README.md").write_text(card, encoding="utf-8")

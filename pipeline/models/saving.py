"""Model folders: whole or absent, and never in the place of other things."""

import shutil
import tempfile
from pathlib import Path

from pipeline.errors import UserError
from pipeline.shards.files import writing_to

_MODEL_FILES = (".safetensors", ".json", ".md", ".jinja", ".txt", ".model")


def require_replaceable(folder: Path) -> None:
    """Raises UserError unless `folder` is missing, empty, or holds a model and nothing else: it will be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder for a model: choose another --out")
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if (folder / name).is_dir() or not name.endswith(_MODEL_FILES)]
    if names and (others or not {"config.json", "link.json"} & set(names)):
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

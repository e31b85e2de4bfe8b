"""The student that is trained, as rounds need it: the model itself, and a folder of it as it is."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.models import save_model


@dataclass(frozen=True)
class TrainedStudent:
    """The model in the trainer's hands, and the PEFT model around it where it gets adapters."""

    model: torch.nn.Module
    adapted: object | None
    tokenizer: object
    stops: tuple[int, ...]

    def whole(self) -> torch.nn.Module:
        """The model with its adapters merged, which can be done once: what was trained ends here."""
        return self.model if self.adapted is None else self.adapted.merge_and_unload()

    def save(self, folder: Path, card: str = "") -> None:
        """Save the model as it is; training goes on unchanged."""
        model = self.model if self.adapted is None else copy.deepcopy(self.adapted).merge_and_unload()
        save_model(folder, model, self.tokenizer, card, self.stops)

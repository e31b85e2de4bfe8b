"""Warnings about prompts as models read them, printed before a teacher is asked."""

from collections.abc import Sequence

import numpy as np

from pipeline import console
from pipeline.prompts import Prompt, PromptFormat


def warn_of_prompts(
    form: PromptFormat, tokenizer, prompts: Sequence[Prompt], read: Sequence[np.ndarray] | None = None
) -> None:
    """Warn of a chat template that prints the date, and of prompts with unknown tokens. read: their token ids."""
    if form.prints_the_date(tokenizer):
        console.warn(
            f"the chat template of {tokenizer.name_or_path} prints the date: tomorrow's prompts will differ, and "
            "what is stored will not be found. Write a fixed date into the template"
        )
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return  # without an unknown token of its own it can encode any text
    read = form.encode(tokenizer, prompts) if read is None else read
    affected = [prompt.id for prompt, ids in zip(prompts, read, strict=True) if unknown in ids]
    if affected:
        console.warn(
            f"{len(affected):,} of {len(prompts):,} prompts have text that the tokenizer does not know: models read "
            f"{tokenizer.unk_token} instead. The first is '{affected[0]}'"
        )

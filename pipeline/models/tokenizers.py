"""Tokenizers: a word-level one for the built-in tasks, loading, and knowing whether two are the same."""

import json
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.models.loading import load_pretrained

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


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
    """Digest of what a fast tokenizer does to text, and of its special tokens, without padding and truncation."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer: a tokenizer.json is needed")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    return digest({"state": state, "eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id})


def load_tokenizer(source: str | Path):
    """The fast tokenizer of a folder or hub name."""
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, source, "tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_same_tokenizer(teacher_identity: str, student_tokenizer, student: str | Path) -> None:
    """Raises UserError unless the cached teacher's tokenizer is the student's."""
    identity = tokenizer_identity(student_tokenizer)[:16]
    if identity != teacher_identity:
        raise UserError(
            f"the tokenizer of {student} ({identity}) is not the teacher's ({teacher_identity}): token ids would mean "
            "different things. Use a student of the teacher's family, or build one with the teacher's tokenizer"
        )

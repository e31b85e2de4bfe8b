"""Prompt files: what the models are asked, with references. One way in, one way out."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.params import Params
from pipeline.shards.files import digest, write_atomically

TEMPLATE_VERSION = 1  # changes whenever the same template would render other text
_MADE_BY = {b"made_by": b"xkd-pipeline"}  # in the footer of our prompt files
SPLITS = ("teach", "train", "validation", "test")


@dataclass(frozen=True)
class Prompt:
    """One prompt, not yet rendered by the template."""

    id: str
    prompt: str
    references: tuple[str, ...]
    split: str


def prompt_id(text: str) -> str:
    """An id that depends on the text alone."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render(template: str, prompt: str) -> str:
    """`template` with the prompt in it. Plain replacement: braces in a prompt mean nothing."""
    return template.replace("{prompt}", prompt)


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt becomes what a model reads: a template, and for chat models their chat template around it."""

    template: str
    chat: bool = False
    system: str = ""  # the system message; empty: none is given, and the chat template may add its own

    @classmethod
    def of(cls, params: Params) -> "PromptFormat":
        return cls(params.template, params.chat, params.system)

    def text(self, tokenizer, prompt: str) -> str:
        """The text that the model reads. Raises UserError where a chat template is wanted and there is none."""
        text = render(self.template, prompt)
        if not self.chat:
            return text
        if not tokenizer.chat_template:
            raise UserError("chat is true, but the tokenizer has no chat template: set chat to false")
        messages = [{"role": "user", "content": text}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def encode(self, tokenizer, prompts: Sequence[str]) -> list[np.ndarray]:
        """Token ids, int32 each; special tokens are the tokenizer's own, or those of the chat template."""
        return self.encode_texts(tokenizer, [self.text(tokenizer, prompt) for prompt in prompts])

    def encode_texts(self, tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for texts that `text` made."""
        if not texts:
            return []
        return [np.asarray(ids, np.int32) for ids in tokenizer(texts, add_special_tokens=not self.chat)["input_ids"]]

    def chat_identity(self, tokenizer) -> str | None:
        """Digest of chat template and system message; None without."""
        return digest([tokenizer.chat_template, self.system])[:16] if self.chat else None


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a Parquet file with columns id, prompt, references, split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"id": p.id, "prompt": p.prompt, "references": list(p.references), "split": p.split} for p in prompts]
    schema = pa.schema(
        {"id": pa.string(), "prompt": pa.string(), "references": pa.list_(pa.string()), "split": pa.string()},
        metadata=_MADE_BY,
    )
    table = pa.Table.from_pylist(rows, schema)
    write_atomically(path.parent, lambda temporary: pq.write_table(table, temporary, compression="zstd"), path.name)


def is_prompt_file(path: Path) -> bool:
    """Whether `write_prompts` wrote it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return _MADE_BY.items() <= (pq.read_schema(path).metadata or {}).items()
    except (pa.ArrowException, OSError):
        return False


def read_prompts(path: Path, splits: Sequence[str] | None = None) -> list[Prompt]:
    """Read a Parquet or JSONL prompt file, in file order, optionally some splits only.

    Column `prompt` is required; `id` defaults to a hash of the prompt, `references` to none, `split` to train.
    Raises UserError that names the file and the row of a missing column, an empty prompt or a repeated id.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no prompt file at {path}")
    rows = _read_rows(path)
    if not rows:
        raise UserError(f"{path} holds no prompts")
    prompts: list[Prompt] = []
    ids: dict[str, int] = {}
    texts: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        prompt = _parse(row, path, number)
        if prompt.id in ids:
            raise UserError(f"{path}: row {number} repeats id '{prompt.id}' of row {ids[prompt.id]}: ids must differ")
        if prompt.prompt in texts:
            raise UserError(
                f"{path}: row {number} repeats the prompt of row {texts[prompt.prompt]}: its samples would be the same "
                "ones. Keep one of the rows, and ask for more samples if more are wanted"
            )
        ids[prompt.id] = texts[prompt.prompt] = number
        if splits is None or prompt.split in splits:
            prompts.append(prompt)
    return prompts


@dataclass(frozen=True)
class GivenResponse:
    """A response by another tool."""

    response: str
    ends: bool  # by itself; false where its tool cut it off


def read_responses(path: Path) -> dict[str, list[GivenResponse]]:
    """Prompt text -> responses of a Parquet or JSONL file, in file order; equal ones of a prompt count once.

    Columns `prompt` (before any template) and `response` are required; `finish` may be stop or length. Raises
    UserError that names the file and the row of what is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file of responses at {path}")
    found: dict[str, list[GivenResponse]] = {}
    for number, row in enumerate(_read_rows(path), start=1):
        for column in ("prompt", "response"):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise UserError(f"{path}: row {number} has no text in column '{column}'")
        finish = row.get("finish") or "stop"
        if finish not in ("stop", "length"):
            raise UserError(f"{path}: row {number} has finish '{finish}'; known: stop, length")
        given = GivenResponse(row["response"], finish == "stop")
        if given not in found.setdefault(row["prompt"], []):
            found[row["prompt"]].append(given)
    return found


def _read_rows(path: Path) -> list[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        try:
            return pq.read_table(path).to_pylist()
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} is not a Parquet file: {error}") from None
    if path.suffix not in (".jsonl", ".json"):
        raise UserError(f"{path}: prompts are read from .parquet or .jsonl files")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: row {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number} is not a JSON object")
            rows.append(row)
    return rows


def _parse(row: dict, path: Path, number: int) -> Prompt:
    if "prompt" not in row:
        raise UserError(f"{path}: row {number} has no column 'prompt'; found {', '.join(map(str, row)) or 'nothing'}")
    text = row["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{path}: row {number} has an empty prompt: remove the row or fill it in")
    references = row.get("references") or []
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise UserError(f"{path}: row {number}: 'references' must be a list of strings")
    split = row.get("split") or "train"
    if split not in SPLITS:
        raise UserError(f"{path}: row {number} has split '{split}'; known: {', '.join(SPLITS)}")
    identity = prompt_id(text) if row.get("id") is None else str(row["id"])
    return Prompt(identity, text, tuple(references), split)


def encode_response(tokenizer, text: str, ends: bool = True) -> np.ndarray:
    """Token ids of a response: no leading special tokens; EOS at the end where it ends by itself; int32."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.asarray([*ids, tokenizer.eos_token_id] if ends else ids, np.int32)

"""Prompt files: what the models are asked, with references; reading, writing and rendering."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import UserError, in_one_line, is_printable, printable, shown
from pipeline.files import digest, parse_json, write_atomically
from pipeline.params import Params
from pipeline.prompts.chat import Chat, prints_the_date, render_chats

TEMPLATE_VERSION = 1  # changes whenever the same template would render other text
_MADE_BY = {b"made_by": b"xkd-pipeline"}  # in the footer of our prompt files
SPLITS = ("teach", "train", "validation", "test", "student")


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
    system: str = ""  # the system message; empty: none, and the chat template may add its own

    @classmethod
    def of(cls, params: Params) -> "PromptFormat":
        return cls(params.template, params.chat, params.system)

    def texts(self, tokenizer, prompts: Sequence[Prompt]) -> list[str]:
        """The texts that the model reads. Raises UserError where `chat` is true and no chat template works."""
        texts = [render(self.template, prompt.prompt) for prompt in prompts]
        if not self.chat:
            return texts
        self._require_template(tokenizer)
        return render_chats(tokenizer, [self._chat(text) for text in texts], [prompt.id for prompt in prompts])

    def _chat(self, text: str) -> Chat:
        lead = [{"role": "system", "content": self.system}] if self.system else []
        return [*lead, {"role": "user", "content": text}]

    def prints_the_date(self, tokenizer) -> bool:
        """Whether prompts differ from day to day because the chat template prints the date."""
        if self.chat:
            self._require_template(tokenizer)
        return self.chat and prints_the_date(tokenizer, self._chat(self.template))

    def encode(self, tokenizer, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Token ids, int32 each; special tokens are the tokenizer's own, or those of the chat template."""
        return self.encode_texts(tokenizer, self.texts(tokenizer, prompts))

    def encode_texts(self, tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for texts that `texts` made."""
        if not texts:
            return []
        return [np.asarray(ids, np.int32) for ids in tokenizer(texts, add_special_tokens=not self.chat)["input_ids"]]

    def chat_identity(self, tokenizer) -> str | None:
        """Digest of chat template and system message; None without a chat."""
        if not self.chat:
            return None
        self._require_template(tokenizer)
        return digest([tokenizer.chat_template, self.system])[:16]

    @staticmethod
    def _require_template(tokenizer) -> None:
        """Raises UserError where there is no readable chat template: a text, or texts by name."""
        template = tokenizer.chat_template
        if not template:
            raise UserError("chat is true, but the tokenizer has no chat template: set chat to false")
        texts = [*template, *template.values()] if isinstance(template, dict) else [template]
        if not all(isinstance(text, str) and is_printable(text) for text in texts):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} is not a text of valid Unicode: mend it, or set chat "
                "to false"
            )


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a Parquet file with columns id, prompt, references, split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {"id": pa.string(), "prompt": pa.string(), "references": pa.list_(pa.string()), "split": pa.string()},
        metadata=_MADE_BY,
    )
    table = pa.Table.from_pylist([vars(prompt) for prompt in prompts], schema)
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
    rows = _read_rows(path, "prompt file")
    if not rows:
        raise UserError(f"{path} holds no prompts")
    prompts: list[Prompt] = []
    ids: dict[str, int] = {}
    texts: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        prompt = _parse(row, path, number)
        if prompt.id in ids:
            raise UserError(
                f"{path}: row {number} repeats id '{shown(prompt.id)}' of row {ids[prompt.id]}: ids must differ"
            )
        if prompt.prompt in texts:
            raise UserError(
                f"{path}: row {number} repeats the prompt of row {texts[prompt.prompt]}, so its samples would be the "
                "same. Keep one of the rows, and raise generate.samples for more samples"
            )
        ids[prompt.id] = texts[prompt.prompt] = number
        if splits is None or prompt.split in splits:
            prompts.append(prompt)
    return prompts


@dataclass(frozen=True)
class GivenResponse:
    """A response that was made elsewhere."""

    response: str
    ends: bool  # by itself; false where it was cut off


def read_responses(path: Path) -> dict[str, list[GivenResponse]]:
    """Prompt text -> responses of a Parquet or JSONL file, in file order; equal responses to a prompt count once.

    Columns `prompt` (before any template) and `response` are required; `finish` may be stop or length. Raises
    UserError that names the file and the row where something is missing.
    """
    responses: dict[str, list[GivenResponse]] = {}
    for number, row in enumerate(_read_rows(path, "file of responses"), start=1):
        prompt, text = (_text(row, column, path, number) for column in ("prompt", "response"))
        finish = row.get("finish") or "stop"
        if finish not in ("stop", "length"):
            raise UserError(f"{path}: row {number} has finish '{shown(finish)}'; known: stop, length")
        response = GivenResponse(text, finish == "stop")
        if response not in responses.setdefault(prompt, []):
            responses[prompt].append(response)
    return responses


def _read_rows(path: Path, what: str) -> list[dict]:
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"no {what} at {path}")
    if path.suffix == ".parquet":
        with in_one_line(f"{path} is not a Parquet file, or a damaged one"):
            table = pq.read_table(path)
            table.validate(full=True)  # names the column of text that is not UTF-8
            return table.to_pylist()
    if path.suffix not in (".jsonl", ".json"):
        raise UserError(f"{path}: prompts are read from .parquet or .jsonl files")
    with in_one_line(f"{path} cannot be read as UTF-8 text"):
        lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = parse_json(line, f"{path}: row {number}")
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number} is not a JSON object")
            rows.append(row)
    return rows


def _text(row: dict, column: str, path: Path, number: int) -> str:
    """The text in a column. Raises UserError where it is missing or empty."""
    if column not in row:
        raise UserError(f"{path}: row {number} has no column '{column}'; found {shown(', '.join(row)) or 'nothing'}")
    text = row[column]
    _require_text(text, path, number, column)
    if not text.strip():
        raise UserError(f"{path}: row {number} has an empty {column}: remove the row or fill it in")
    return text


def _require_text(text: object, path: Path, number: int, column: str) -> None:
    """Raises UserError for a value that is not a text, or not valid Unicode."""
    if not isinstance(text, str):
        value = "null" if text is None else f"{shown(repr(text))} ({type(text).__name__})"
        raise UserError(f"{path}: row {number}: '{column}' must be text, found {value}")
    if not is_printable(text):
        raise UserError(
            f"{path}: row {number} has half a surrogate pair in '{column}': {shown(text)}. It is not valid Unicode: "
            "write the whole character, or leave it out"
        )


def _parse(row: dict, path: Path, number: int) -> Prompt:
    text = _text(row, "prompt", path, number)
    value = row.get("references")
    references = value if isinstance(value, list) else [] if value in (None, "") else [value]
    for reference in references:
        _require_text(reference, path, number, "references")
    split = row.get("split") or "train"
    if split not in SPLITS:
        raise UserError(f"{path}: row {number} has split '{shown(split)}'; known: {', '.join(SPLITS)}")
    # An id is only a name: one that is not valid Unicode is kept with escapes, so that its row is not lost.
    identity = prompt_id(text) if row.get("id") is None else printable(str(row["id"]))
    return Prompt(identity, text, tuple(references), split)


def encode_response(tokenizer, text: str, ends: bool = True) -> np.ndarray:
    """Token ids of a response: no leading special tokens; EOS at the end if it ends by itself; int32."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.asarray([*ids, tokenizer.eos_token_id] if ends else ids, np.int32)

"""A held-out prompt's responses with the reward's mean and deviation at every token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.errors import in_one_line
from pipeline.store.schema import Row
from pipeline.store.selection import Selection

_ORDER = {"reference": 0, "teacher": 1, "student": 2, "corrupted": 3}
_SPREAD = 2.0  # deviations of mu at which a token's colour is full


@dataclass(frozen=True)
class Token:
    """One token of a response."""

    text: str
    mu: float
    sigma: float
    shade: float  # -1 (low reward) .. 1 (high), relative to the responses shown


@dataclass(frozen=True)
class Rewarded:
    """One response under the reward."""

    origin: str
    tokens: list[Token]

    @property
    def mean(self) -> float:
        return float(np.mean([token.mu for token in self.tokens]))


def rewarded_prompts(
    selection: Selection, rewards: Path, tokenizer, prompts: int
) -> Iterator[tuple[str, list[Rewarded]]]:
    """The text of the first held-out prompts, each with one response of every origin that has rewards."""
    with in_one_line(f"{rewards} holds no rewards"):
        table = pq.read_table(rewards)
        columns = [table.column(name).to_pylist() for name in ("key", "mu", "log_sigma")]
    by_key = {key: (np.array(mu), np.exp(log_sigma)) for key, mu, log_sigma in zip(*columns, strict=True)}
    parts = [name for name in ("validation", "scored") if name in selection.parts]
    by_prompt: dict[str, dict[str, Row]] = {}
    for row in (row for name in parts for row in selection.rows(name)):
        if row.key in by_key:
            by_prompt.setdefault(row.prompt_id, {}).setdefault(row.origin, row)
    # Prompts with the most kinds of responses say most.
    chosen = sorted(by_prompt.values(), key=len, reverse=True)[:prompts]
    values = np.concatenate([by_key[row.key][0] for rows in chosen for row in rows.values()] or [np.zeros(1)])
    centre, spread = float(np.median(values)), float(values.std()) or 1.0
    for rows in chosen:
        ordered = sorted(rows.values(), key=lambda row: _ORDER.get(row.origin, 9))
        yield (
            ordered[0].prompt,
            [Rewarded(row.origin, list(_tokens(row, *by_key[row.key], tokenizer, centre, spread))) for row in ordered],
        )


def _tokens(
    row: Row, mu: Sequence[float], sigma: Sequence[float], tokenizer, centre: float, spread: float
) -> Iterator[Token]:
    texts = _pieces(row.response_ids, tokenizer)
    for text, m, s in zip(texts, mu, sigma, strict=True):
        yield Token(text, float(m), float(s), float(np.clip((m - centre) / (_SPREAD * spread), -1, 1)))


def _pieces(ids: np.ndarray, tokenizer) -> list[str]:
    """The text that each token adds: differences of decoded prefixes, so that spaces are where they belong."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        after = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append(after[len(before) :] if after.startswith(before) else after[-1:])
        before = after
    return pieces

"""Identities of requests, and keys of rows: they follow from what was asked of whom.

An identity is a digest of what decides the answer and of nothing else: no paths, names, versions, counts, k or support.
"""

import hashlib
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.files import digest

# `schema_version` in every request's identity: a constant since version 1 of the schema, whatever newer files look
# like, so that rows keep the identities and keys that they were stored under.
_IN_IDENTITIES = 1


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """What is asked of a teacher. `kind` is sample (responses are drawn) or score (responses are given)."""

    kind: str
    template: str
    template_version: int
    seed: int = 0
    sampling: Sampling | None = None
    chat: str | None = None  # digest of the chat template and system message, where there is one

    def describe(self) -> dict:
        """Plain values for JSON; what its identity is the digest of."""
        description = asdict(self) | {"schema_version": _IN_IDENTITIES}
        if self.chat is None:
            del description["chat"]
        if self.kind == "score":  # a score does not depend on how responses are drawn
            description = {key: value for key, value in description.items() if key not in ("seed", "sampling")}
        return description

    @property
    def identity(self) -> str:
        return digest(self.describe())[:16]


def sample_key(request: Request, prompt_ids: np.ndarray, sample: int) -> str:
    """Key of one drawn response: prompt token ids, sampling identity, sample index."""
    return key_of_sample(request.identity, prompt_ids, sample)


def key_of_sample(request: str, prompt_ids: np.ndarray, sample: int) -> str:
    """`sample_key` where only the request's identity is known."""
    return _key(b"sample", request.encode(), _bytes(prompt_ids), str(sample).encode())


def score_key(prompt_ids: np.ndarray, response_ids: np.ndarray) -> str:
    """Key of one given response: prompt token ids and response token ids."""
    return _key(b"score", _bytes(prompt_ids), _bytes(response_ids))


def sample_seed(key: str) -> int:
    """The seed of one sample, from its key: independent of order, neighbours and interruptions."""
    return int.from_bytes(hashlib.sha256(b"seed" + key.encode()).digest()[:8], "little") >> 1


def _bytes(ids: np.ndarray) -> bytes:
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


def _key(*parts: bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.hexdigest()[:32]

"""Wrong answers made from right ones: what a reward must rank below the reference."""

from collections.abc import Sequence

import numpy as np

EDITS = ("replace", "delete", "repeat", "swap")
_ATTEMPTS = 50  # to make different corruptions of one response


def corrupt(response_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Change one or two places: replace a token by another of the response, delete, repeat, or swap neighbours.

    response_ids int32 [T], the last of which (EOS) is kept. None where the response is too short to change. Its own
    tokens are the most plausible wrong ones, and make a corruption independent of all other prompts.
    """
    body, end, pool = list(response_ids[:-1]), response_ids[-1:], response_ids[:-1]
    if len(body) < 2:
        return None
    for _ in range(rng.integers(1, 3)):
        body = _edit(body, str(rng.choice(EDITS)), pool, rng)
    return np.concatenate([np.asarray(body, np.int32), end])


def _edit(body: list[int], edit: str, pool: np.ndarray, rng: np.random.Generator) -> list[int]:
    place = int(rng.integers(len(body) - 1 if edit == "swap" else len(body)))
    if edit == "replace":
        return [*body[:place], int(rng.choice(pool)), *body[place + 1 :]]
    if edit == "delete" and len(body) > 2:
        return body[:place] + body[place + 1 :]
    if edit == "repeat" or place + 1 == len(body):
        return [*body[: place + 1], *body[place:]]
    return [*body[:place], body[place + 1], body[place], *body[place + 2 :]]


def corruptions(references: Sequence[np.ndarray], n: int, seed: int | Sequence[int]) -> list[np.ndarray]:
    """Up to `n` different corruptions of the first reference, none of which is itself a reference."""
    rng = np.random.default_rng(seed)
    known = {tuple(reference) for reference in references}
    edited = []
    for _ in range(_ATTEMPTS):
        if len(edited) == n:
            break
        wrong = corrupt(references[0], rng)
        if wrong is not None and tuple(wrong) not in known:
            known.add(tuple(wrong))
            edited.append(wrong)
    return edited

"""Word problems of two or three steps with worked solutions: `7 + 5 = 12 . 12 - 3 = 9 . # 9`.

Every number is one token up to LIMIT, so that a tiny model can learn the sums in minutes.
"""

from collections.abc import Sequence
from random import Random

from pipeline.tasks.base import Example

LIMIT = 40
LENGTHS = (2, 2, 3)  # steps of a story, one of these
NAMES = ("tom", "anna", "ben", "lisa", "max", "eva")
THINGS = ("apples", "coins", "books", "cards", "pens", "eggs")
GAINS = ("buys {b} more", "finds {b} more", "gets {b} from {other}")
LOSSES = ("gives {b} to {other}", "loses {b}", "sells {b}")
GROWTH = {2: "doubles them", 3: "triples them"}
DISTRACTORS = ("{other} has {d} {thing2} .", "the bag has {d} {thing2} .")
QUESTIONS = ("how many {thing} does {name} have now ?", "how many {thing} are left ?")


def example(rng: Random, lengths: Sequence[int] = LENGTHS) -> Example:
    """Draw a story of one of these numbers of steps; every intermediate value stays within 0..LIMIT."""
    name, other = rng.sample(NAMES, 2)
    thing, thing2 = rng.sample(THINGS, 2)
    value = rng.randint(2, LIMIT // 2)
    sentences = [f"{name} has {value} {thing} ."]
    steps = []
    for _ in range(rng.choice(lengths)):
        clause, symbol, b, value_after = _step(rng, value, other)
        sentences.append(f"{name} {clause} .")
        steps.append(f"{value} {symbol} {b} = {value_after} .")
        value = value_after
    if rng.random() < 0.3:
        distractor = rng.choice(DISTRACTORS).format(other=other, d=rng.randint(2, LIMIT), thing2=thing2)
        sentences.insert(rng.randint(1, len(sentences) - 1), distractor)
    sentences.append(rng.choice(QUESTIONS).format(thing=thing, name=name))
    return Example(" ".join(sentences), (" ".join([*steps, "#", str(value)]),))


def _step(rng: Random, value: int, other: str) -> tuple[str, str, int, int]:
    """One operation on `value`: (clause, symbol, operand, result)."""
    factors = [f for f in GROWTH if 0 < value * f <= LIMIT]
    kinds = {"gain": value < LIMIT, "loss": value > 0, "growth": factors}
    kind = rng.choice([kind for kind, is_possible in kinds.items() if is_possible])
    if kind == "growth":
        b = rng.choice(factors)
        return GROWTH[b], "*", b, value * b
    if kind == "gain":
        b = rng.randint(1, min(LIMIT - value, 20))
        return rng.choice(GAINS).format(b=b, other=other), "+", b, value + b
    b = rng.randint(1, min(value, 20))
    return rng.choice(LOSSES).format(b=b, other=other), "-", b, value - b


def lexicon() -> list[str]:
    """All tokens of all templates, names, things and numbers."""
    templates = [*GAINS, *LOSSES, *GROWTH.values(), *DISTRACTORS, *QUESTIONS, "has + - * = . #"]
    words = {word for template in templates for word in template.split() if not word.startswith("{")}
    return sorted(words | set(NAMES) | set(THINGS) | {str(n) for n in range(LIMIT + 1)})


def extract(response: str) -> str | None:
    """The answer: the one token after the last `#`, or None."""
    _, mark, after = response.rpartition("#")
    answer = after.split()
    return answer[0] if mark and len(answer) == 1 else None

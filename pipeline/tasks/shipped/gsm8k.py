"""Grade-school word problems (GSM8K, Cobbe et al. 2021, arXiv 2110.14168), judged as published scores are.

The two rules of lm-evaluation-harness (task gsm8k, version 3.0): `strict`, the number after the first `#### `, and
`flexible`, the last thing in the text that looks like a number. Both compare texts: 18.00 is not 18.
"""

import re

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r".*#### ", re.DOTALL), re.compile(r"\.$"))


def strict(response: str) -> str | None:
    """The number after the first `#### `, the form that the references have and a student is to learn; or None."""
    number = _STRICT.search(response)
    return target(number[1]) if number else None


def flexible(response: str) -> str | None:
    """The last number of the response, whatever its form; or None."""
    numbers = _FLEXIBLE.findall(response)
    return target(numbers[-1]) if numbers else None


def target(reference: str) -> str:
    """What follows the last `#### `, or the whole text; without commas, dollar signs and a full stop at its end."""
    for pattern in _IGNORED:
        reference = pattern.sub("", reference)
    return reference

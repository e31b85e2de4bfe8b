"""Grade-school word problems (GSM8K, Cobbe et al. 2021, arXiv 2110.14168): the answer is a number at the end."""

import re
from decimal import Decimal

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def extract(response: str) -> str | None:
    """The number after the last `####`, else the last number of the text, in one form (1,200.0 is 1200); or None."""
    _, mark, after = response.rpartition("####")
    numbers = _NUMBER.findall(after)
    if not numbers:
        return None
    number = Decimal((numbers[0] if mark else numbers[-1]).replace(",", ""))
    return f"{number.normalize():f}" if number else "0"

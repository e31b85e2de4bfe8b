"""Writes docs/parameters.md from the schema: `python -m pipeline.params.page > docs/parameters.md`."""

from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from pipeline.params import Params
from pipeline.params.base import Section
from pipeline.params.file import to_text

_HEAD = """# Parameters

Every parameter with its default, for `params.yaml`, `--set KEY=VALUE` and `dvc exp run -S KEY=VALUE` alike. Written
from the schema (`python -m pipeline.params.page`). What the larger choices mean: [experiments.md](experiments.md)
and [data-sets.md](data-sets.md).
"""


def page() -> str:
    """The page: a table of the parameters outside sections, then one table per section."""
    params = Params()
    tables: dict[str, list[str]] = {"": []}  # by heading
    for name in Params.model_fields:
        heading = f"\n## {name}\n" if isinstance(getattr(params, name), Section) else ""
        tables.setdefault(heading, []).extend(_lines(params, name, ""))
    head = ["", "| parameter | default | meaning |", "|---|---|---|"]
    return _HEAD + "".join(heading + "\n".join([*head, *lines]) + "\n" for heading, lines in tables.items())


def _lines(section: Section, name: str, prefix: str) -> Iterator[str]:
    field, value = type(section).model_fields[name], getattr(section, name)
    if isinstance(value, Section):
        for each in type(value).model_fields:
            yield from _lines(value, each, f"{prefix}{name}.")
        return
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    said = " ".join((field.description or "").split())
    listed = f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""
    yield f"| `{prefix}{name}` | `{_cell(to_text(value))}` | {_cell(said)}{listed} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(page(), end="")

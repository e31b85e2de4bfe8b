"""Writes docs/parameters.md from the schema: `python -m pipeline.params.page > docs/parameters.md`."""

from collections.abc import Iterator
from typing import Literal, get_args, get_origin

import yaml

from pipeline.params import Params
from pipeline.params.base import Section

_HEAD = """# Parameters

Every parameter with its default, for `params.yaml`, `--set KEY=VALUE` and `dvc exp run -S KEY=VALUE` alike. Written
from the schema (`python -m pipeline.params.page`). What the larger choices mean: [experiments.md](experiments.md)
and [data-sets.md](data-sets.md).
"""


def page() -> str:
    """The page: a table of the parameters outside sections, then one table per section."""
    params = Params()
    alone = [line for name in Params.model_fields if not _is_section(params, name) for line in _lines(params, name, "")]
    tables = [("", alone)]
    for name in Params.model_fields:
        if _is_section(params, name):
            section = getattr(params, name)
            lines = [line for each in type(section).model_fields for line in _lines(section, each, f"{name}.")]
            tables.append((f"\n## {name}\n", lines))
    head = ["", "| parameter | default | meaning |", "|---|---|---|"]
    return _HEAD + "".join(title + "\n".join([*head, *lines]) + "\n" for title, lines in tables)


def _is_section(section: Section, name: str) -> bool:
    return isinstance(getattr(section, name), Section)


def _lines(section: Section, name: str, prefix: str) -> Iterator[str]:
    field, value = type(section).model_fields[name], getattr(section, name)
    if isinstance(value, Section):
        for each in type(value).model_fields:
            yield from _lines(value, each, f"{prefix}{name}.")
        return
    default = yaml.safe_dump(value, default_flow_style=True, width=10_000).replace("\n...", "").strip()
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    said = " ".join((field.description or "").split())
    listed = f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""
    yield f"| `{prefix}{name}` | `{_cell(default)}` | {_cell(said)}{listed} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(page(), end="")

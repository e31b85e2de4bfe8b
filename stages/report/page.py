"""What a page is made of, and its rendering: everything that comes from data is escaped."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

GENERATOR = '<meta name="generator" content="xkd-pipeline">'  # by which a page of ours is known


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column is left-aligned."""

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    prose: bool = False  # cells are sentences: they are broken into lines


@dataclass(frozen=True)
class Figure:
    """An image as a data URI; the caption is its text for those who do not see it."""

    source: str
    caption: str


@dataclass(frozen=True)
class Sample:
    """One prompt with what the references and the models say, and why it is shown."""

    prompt: str
    answers: list[tuple[str, str, str]]  # whose, what it says, and how that is marked
    why: str


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


@dataclass
class Section:
    """A part of the page, in this order."""

    id: str
    title: str
    texts: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    rewarded: list[tuple[str, list[Rewarded]]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    blocks: list[tuple[str, str]] = field(default_factory=list)  # titles, and texts that are folded away


def render_page(title: str, subtitle: str, cards: list[tuple[str, str]], sections: list[Section]) -> str:
    """One HTML page without scripts; its own policy forbids to load anything. cards: headline numbers and labels."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2")
    parts = {"title": title, "subtitle": subtitle, "cards": cards, "sections": sections}
    return page.render(generator=Markup(GENERATOR), **parts)

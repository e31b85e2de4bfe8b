"""Figures as SVG data URIs: nothing is loaded from elsewhere, and nothing in them runs."""

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure

COLOURS = ("#3366aa", "#dd7733", "#338855", "#aa4477", "#777777", "#997700")
_STYLE = {
    "svg.hashsalt": "xkd",
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names of models are not formulas
}


def _draw(width: float, height: float, paint) -> str:
    """The data URI of what `paint(axes)` draws."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plane(paint, x_label: str, y_label: str) -> str:
    """The data URI of what `paint(axes)` draws between two named axes, with a legend."""

    def named(axes) -> None:
        paint(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)

    return _draw(5.2, 3.1, named)


def lines(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str) -> str:
    """Named curves (x, y)."""

    def paint(axes) -> None:
        for colour, (name, (x, y)) in zip(COLOURS, curves.items(), strict=False):
            axes.plot(x, y, color=colour, label=name, linewidth=1.6, marker="o" if len(x) < 12 else None, markersize=4)

    return _plane(paint, x_label, y_label)


def intervals(values: Mapping[str, Mapping[str, float]], x_label: str) -> str:
    """Named estimates with their intervals: {name: {value, low, high}}."""

    def paint(axes) -> None:
        for row, interval in enumerate(values.values()):
            colour = COLOURS[row % len(COLOURS)]
            axes.plot([interval["low"], interval["high"]], [row, row], color=colour, linewidth=2)
            axes.plot([interval["value"]], [row], color=colour, marker="o", markersize=7)
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlabel(x_label)
        axes.grid(axis="x", alpha=0.25)

    return _draw(5.2, 0.8 + 0.42 * len(values), paint)


def trade_off(points: Mapping[str, tuple[float, float]], x_label: str, y_label: str) -> str:
    """Named points in a plane."""

    def paint(axes) -> None:
        for colour, (name, (x, y)) in zip(COLOURS * len(points), points.items(), strict=False):
            axes.plot([x], [y], color=colour, marker="o", markersize=8, linestyle="", label=name)
        axes.margins(0.2)

    return _plane(paint, x_label, y_label)


def band(responses: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str) -> str:
    """Named curves mu with a band of one sigma around each, over the tokens of a response."""

    def paint(axes) -> None:
        for colour, (name, (mu, sigma)) in zip(COLOURS, responses.items(), strict=False):
            steps = range(1, len(mu) + 1)
            low, high = ([m + sign * s for m, s in zip(mu, sigma, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(steps, mu, color=colour, label=name, linewidth=1.4)

    return _plane(paint, x_label, y_label)

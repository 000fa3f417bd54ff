"""Figures are drawn here as SVG: small multiples of lines with axes, units and 95 % intervals, on light and dark pages.

The background is transparent and every colour is a mid-tone, so that a plot is readable on white and on black. No two
lines of a figure are alike: each has its colour, its marker and its dashes. Title and description stand in the SVG for
people who do not see it. The same figures give the same bytes: no date, no random ids.

matplotlib (the extra `eval`) is imported when a figure is drawn, not before.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from xml.sax.saxutils import escape

from kvbank.console.output import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#767676"  # contrast 4.5 to white, 4.6 to black
_COLOURS = ("#3a7bd5", "#d9650d", "#2f9e5f", "#cf4a86", "#8f63d8", "#0f97a7", "#a87a16")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_DASHES = ("solid", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)), (0, (9, 3)))
_PANEL_WIDTH, _PLOT_HEIGHT, _LINE_HEIGHT, _TITLE_LETTER = 3.6, 2.9, 0.19, 0.092  # inches
_DODGE = 0.016  # of the x axis, between lines with intervals
# Text stays text; a dollar sign in a name is no formula; ids follow from the content.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvbank",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


class Point(NamedTuple):
    """A point of a line, and how far the 95 % interval of y reaches below and above it: 0 where there is none."""

    x: float
    y: float
    below: float = 0.0
    above: float = 0.0

    @classmethod
    def around(cls, x: float, mean: float, width: float) -> Self:
        """Return the point of a mean. width: half of its interval, which is as long on both sides."""
        return cls(x, mean, width, width)

    @classmethod
    def of_share(cls, x: float, share: Mapping[str, float]) -> Self:
        """Return the point of a share, as `interval.Share.document` tells it, whose interval is uneven.

        All of 30 are drawn at 1, with an interval that reaches down to .89 and ends at 1.
        """
        y = share["share"]
        return cls(x, y, max(y - share["low"], 0.0), max(share["high"] - y, 0.0))

    def __str__(self) -> str:
        if self.below != self.above:
            return f"{self.y:.3g} ({self.y - self.below:.2g} to {self.y + self.above:.2g}) at {self.x:,g}"
        return f"{self.y:.3g}" + (f" ± {self.above:.2g}" if self.above else "") + f" at {self.x:,g}"


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a panel."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a figure. levels: horizontal lines by name."""

    title: str
    series: Sequence[Series]
    levels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels with the same axes.

    x_label, y_label: quantity and unit. doubling, y_doubling: x (y) is shown on a scale of doublings. description: what
    the figure shows, for people who do not see it; the values are added to it.
    """

    title: str
    description: str
    x_label: str
    y_label: str
    panels: Sequence[Panel]
    doubling: bool = True
    y_doubling: bool = False


def draw(figure: Figure) -> str:
    """Return a figure as SVG. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    names = list(dict.fromkeys(own.name for panel in figure.panels for own in panel.series))
    styles = dict(zip(names, _styles(), strict=False))
    entries = max(len(panel.series) + len(panel.levels) for panel in figure.panels)
    width = _PANEL_WIDTH * len(figure.panels) + 0.4
    title = textwrap.wrap(printable(figure.title), int(width / _TITLE_LETTER))
    with mpl.rc_context(_STYLE):
        canvas = Canvas(figsize=(width, _PLOT_HEIGHT + _LINE_HEIGHT * (entries + len(title))), layout="constrained")
        canvas.suptitle("\n".join(title), fontsize=11)
        plots = canvas.subplots(1, len(figure.panels), sharex=True, sharey=True, squeeze=False)[0]
        for plot, panel in zip(plots, figure.panels, strict=True):
            _fill(plot, panel, styles, figure)
        plots[0].set_ylabel(figure.y_label)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _named(out.getvalue(), figure)


def _styles() -> Iterator[dict[str, Any]]:
    """Yield styles of lines; the first 280 differ in colour, marker or dashes, neighbours in all three."""
    for colour, marker, dashes in zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_DASHES), strict=False):
        yield {"color": colour, "marker": marker, "linestyle": dashes}


def _fill(plot: Axes, panel: Panel, styles: Mapping[str, Mapping[str, Any]], figure: Figure) -> None:
    """Draw the lines, intervals, levels, ticks and legend of one panel."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    xs = sorted({x for own in figure.panels for series in own.series for x, *_ in series.points})
    if figure.doubling:
        plot.set_xscale("log", base=2)
    for index, own in enumerate(panel.series):
        x, y, below, above = zip(*sorted(own.points), strict=True)
        uncertain = any((*below, *above))
        shift = _DODGE * (index - (len(panel.series) - 1) / 2) if uncertain else 0.0
        plot.errorbar(
            [_shifted(value, shift, xs, figure.doubling) for value in x],
            y,
            yerr=(below, above) if uncertain else None,
            label=printable(own.name),
            linewidth=1.4,
            markersize=4.5,
            elinewidth=1.0,
            capsize=2,
            **styles[own.name],
        )
    for name, level in panel.levels.items():
        plot.axhline(level, label=printable(name), color=_INK, linewidth=1, linestyle=(0, (2, 2)))
    plot.set_title(printable(panel.title))
    plot.set_xlabel(figure.x_label)
    plot.xaxis.set_major_locator(FixedLocator(xs))
    plot.xaxis.set_minor_locator(NullLocator())
    plot.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if figure.y_doubling:
        plot.set_yscale("log", base=2)
        plot.yaxis.set_major_locator(LogLocator(base=2))
        plot.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    plot.grid(axis="y", color=_INK, alpha=0.25, linewidth=0.6)
    plot.spines[["top", "right"]].set_visible(False)
    if panel.series or panel.levels:
        plot.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, handlelength=3.6)


def _shifted(x: float, shift: float, xs: Sequence[float], doubling: bool) -> float:
    """Return x moved by a share of the axis, so that intervals at the same x stand side by side."""
    if doubling:
        return float(x * (xs[-1] / xs[0]) ** shift)
    return x + shift * (xs[-1] - xs[0])


def _named(svg: str, figure: Figure) -> str:
    """Return the SVG with title and description, which a screen reader says in the place of the picture."""
    words = f"<title>{escape(printable(figure.title))}</title>\n<desc>{escape(printable(_described(figure)))}</desc>\n"
    head, tag, rest = svg.partition("<svg ")
    attributes, end, body = rest.partition(">")
    return f'{head}{tag}role="img" {attributes}{end}\n{words}{body.lstrip()}'


def _described(figure: Figure) -> str:
    """Return the description with the values of every line."""
    values = []
    for panel in figure.panels:
        for own in panel.series:
            values.append(f"{panel.title}, {own.name}: {', '.join(map(str, own.points))}.")
        values += [f"{panel.title}, {name}: {level:.3g}." for name, level in panel.levels.items()]
    return " ".join([f"{figure.description} Across: {figure.x_label}. Up: {figure.y_label}.", *values])

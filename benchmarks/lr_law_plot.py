"""The plot of lr_law_fit.py, as SVG: loss against alpha · rate in every cell, and measured against predicted optima."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, TOP, GAP = 380, 320, 60, 40, 90
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#8b4513")  # Okabe-Ito, and two
TOP_PER_CENT = 40.0


@dataclass(frozen=True, slots=True)
class Line:
    """One cell: alpha · rate, per cent of loss above its lowest, its optimum, and the law's without this cell."""

    name: str
    group: str
    rates: Sequence[float]
    above: Sequence[float]
    optimum: float
    law: float


@dataclass(frozen=True, slots=True)
class Axes:
    """A panel; `low` and `high` are the ends of its logarithmic x axis, of y what `y` maps from 0 to 1."""

    x0: float
    low: float
    high: float

    def x(self, rate: float) -> float:
        return self.x0 + WIDTH * math.log(rate / self.low) / math.log(self.high / self.low)


def draw(lines: Sequence[Line]) -> str:
    """The whole picture."""
    groups = list(dict.fromkeys(line.group for line in lines))
    colour = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}
    rates = [rate for line in lines for rate in line.rates]
    left = Axes(LEFT, min(rates) / 1.3, max(rates) * 1.3)
    found = [value for line in lines for value in (line.optimum, line.law)]
    right = Axes(LEFT + WIDTH + GAP, min(found) / 1.4, max(found) * 1.4)
    parts = [*_frame(left, "alpha · rate", "% of loss above the cell's lowest"), *_per_cents(left)]
    parts += _frame(right, "optimum by the law fitted without the cell", "measured optimum, alpha · rate")
    parts += _squares(right)
    for line in lines:
        parts += _curve(left, line, colour[line.group])
        x, y = right.x(line.law), _log_y(right, line.optimum)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour[line.group]}">')
        parts.append(f"<title>{escape(line.name)}</title></circle>")
    for i, group in enumerate(groups):
        y = TOP + 16 + 15 * i
        parts.append(f'<circle cx="{right.x0 + 14}" cy="{y - 4}" r="4.5" fill="{colour[group]}"/>')
        parts.append(_text(right.x0 + 24, y, group, "start"))
    width, height = 2 * WIDTH + LEFT + GAP + 20, HEIGHT + TOP + 50
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
    return head + 'font-size="11"><rect width="100%" height="100%" fill="white"/>' + "\n".join(parts) + "</svg>\n"


def _curve(axes: Axes, line: Line, colour: str) -> list[str]:
    points = [(axes.x(rate), _per_cent_y(above)) for rate, above in zip(line.rates, line.above, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>' for x, y in points]
    title = f"<title>{escape(line.name)}</title>"
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3">{title}</polyline>', *marks]


def _per_cent_y(above: float) -> float:
    """Square roots, so that both the basin and what lies far above it are seen."""
    return TOP + HEIGHT * (1 - math.sqrt(min(above, TOP_PER_CENT) / TOP_PER_CENT))


def _log_y(axes: Axes, rate: float) -> float:
    return TOP + HEIGHT * (1 - math.log(rate / axes.low) / math.log(axes.high / axes.low))


def _frame(axes: Axes, x_title: str, y_title: str) -> list[str]:
    parts = [f'<rect x="{axes.x0}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>']
    for rate in _ticks(axes):
        x = axes.x(rate)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + HEIGHT}" y2="{TOP + HEIGHT + 4}" stroke="#888"/>')
        parts.append(_text(x, TOP + HEIGHT + 17, f"{rate:g}"))
    parts.append(_text(axes.x0 + WIDTH / 2, TOP + HEIGHT + 36, x_title))
    middle = TOP + HEIGHT / 2
    parts.append(
        f'<g transform="translate({axes.x0 - 42} {middle}) rotate(-90)">{_text(0, 0, y_title)}</g>'  # upwards
    )
    return parts


def _ticks(axes: Axes) -> list[float]:
    return [0.001 * 2.0**k for k in range(-2, 12) if axes.low <= 0.001 * 2.0**k <= axes.high]


def _per_cents(axes: Axes) -> list[str]:
    return [_text(axes.x0 - 6, _per_cent_y(v) + 4, f"{v:g}", "end") for v in (0, 1, 2, 5, 10, 20, 40)]


def _squares(axes: Axes) -> list[str]:
    """The diagonal, with a factor of 1.5 to either side, and ticks of y."""
    parts = []
    for factor, dash in ((1.0, ""), (1.5, "4 3"), (1 / 1.5, "4 3")):
        x = np.clip([axes.low, axes.high], axes.low * max(1, 1 / factor), axes.high * min(1, 1 / factor))
        ends = [(axes.x(v), _log_y(axes, v * factor)) for v in x]
        parts.append(
            f'<line x1="{ends[0][0]:.1f}" y1="{ends[0][1]:.1f}" x2="{ends[1][0]:.1f}" y2="{ends[1][1]:.1f}" '
            f'stroke="#888" stroke-dasharray="{dash}"/>'
        )
    return parts + [_text(axes.x0 - 6, _log_y(axes, rate) + 4, f"{rate:g}", "end") for rate in _ticks(axes)]


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222">{escape(words)}</text>'

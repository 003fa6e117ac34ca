"""The trade-off of a sweep, to be seen: in a terminal, and as an SVG file. No plotting package is needed."""

from collections.abc import Sequence
from html import escape

from welltuned.finished.sweep import Sweep

_LEVELS = " ▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 560, 300, 64, 28, 44


def sweep_rows(found: Sweep) -> list[str]:
    """A line of blocks for each loss, one block a strength; higher is worse."""
    rows = [f"held out  {_blocks([one.held_out.loss for one in found.strengths])}"]
    kept = [one.keep.loss for one in found.strengths if one.keep is not None]
    if kept:
        rows.append(f"to keep   {_blocks(kept)}")
    names = "  ".join(f"{one.by:g}".ljust(4) for one in found.strengths)
    return [*rows, f"          {names}"]


def _blocks(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "  ".join(_LEVELS[1 + round((v - low) / span * (len(_LEVELS) - 2))] * 4 for v in values)


def sweep_svg(found: Sweep) -> str:
    """Both losses over the strength, each with its standard errors and an axis of its own."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    xs = [one.by for one in found.strengths]
    held = [(one.held_out.loss, one.held_out.standard_error) for one in found.strengths]
    parts += _curve(xs, held, "#1f5fbf", f"loss on {found.rows}", left=True)
    kept = [(one.keep.loss, one.keep.standard_error) for one in found.strengths if one.keep is not None]
    if kept:
        parts += _curve(xs, kept, "#bf5f1f", f"loss on {found.keep}", left=False)
    for x in xs:
        parts.append(f'<text x="{_x(x, xs):.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{x:g}</text>')
    at = _x(found.chosen, xs)
    parts.append(
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#999" stroke-dasharray="4 3"/>'
    )
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">strength (1: as trained)</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(value: float, xs: Sequence[float]) -> float:
    low, high = min(xs), max(xs)
    return _LEFT + (value - low) / ((high - low) or 1.0) * (_WIDTH - 2 * _LEFT)


def _curve(
    xs: Sequence[float], values: Sequence[tuple[float, float]], colour: str, name: str, *, left: bool
) -> list[str]:
    errors = [error if error == error else 0.0 for _, error in values]
    low = min(v - e for (v, _), e in zip(values, errors, strict=True))
    high = max(v + e for (v, _), e in zip(values, errors, strict=True))
    span = (high - low) or 1.0

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / span * (_HEIGHT - _BOTTOM - _TOP)

    points = [(_x(x, xs), y(v)) for x, (v, _) in zip(xs, values, strict=True)]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    out = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for (px, py), (value, _), error in zip(points, values, errors, strict=True):
        up, down = y(value + error), y(value - error)
        out.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{up:.1f}" y2="{down:.1f}" stroke="{colour}"/>')
        out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>')
    side, anchor = (_LEFT - 8, "end") if left else (_WIDTH - _LEFT + 8, "start")
    for value in (low, high):
        out.append(f'<text x="{side}" y="{y(value):.1f}" text-anchor="{anchor}" fill="{colour}">{value:.3f}</text>')
    at, where = (_LEFT, "start") if left else (_WIDTH - _LEFT, "end")
    return [*out, f'<text x="{at}" y="16" text-anchor="{where}" fill="{colour}">{escape(name)}</text>']

"""The plot of target_modules.py, as SVG: held-out loss against the rate, and each arm at its best rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 260, 60, 40, 60
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


@dataclass(frozen=True, slots=True)
class Arm:
    """`points`: (alpha · rate, loss). `error`: of the difference to all linear layers; 0 or None for those."""

    name: str
    parameters: int
    points: Sequence[tuple[float, float]]
    loss: float
    error: float | None


def draw(arms: Sequence[Arm], title: str) -> str:
    """The whole picture: two panels with one vertical axis."""
    xs = [x for arm in arms for x, _ in arm.points]
    ys = [y for arm in arms for _, y in arm.points] + [arm.loss + (arm.error or 0) for arm in arms]
    ys += [arm.loss - (arm.error or 0) for arm in arms]
    low, high = min(ys), min(max(ys), 2 * min(ys))
    span = (high - low) or 1.0

    def y_of(loss: float) -> float:
        return TOP + HEIGHT - HEIGHT * min(1.0, (loss - low) / span)

    def x_of(rate: float) -> float:
        return LEFT + WIDTH * math.log(rate / min(xs)) / (math.log(max(xs) / min(xs)) or 1.0)

    width, height = LEFT + 2 * WIDTH + GAP + 20, TOP + HEIGHT + 50
    right = LEFT + WIDTH + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 18, f"held-out loss, {title}", "start"),
        _text(LEFT + WIDTH / 2, height - 8, "alpha · rate", "middle"),
        _text(right + WIDTH / 2, height - 8, "at its best rate, ± standard error of the difference to all", "middle"),
    ]
    for x0 in (LEFT, right):
        parts.append(f'<rect x="{x0}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>')
    for loss in (low, (low + high) / 2, high):
        parts.append(_text(LEFT - 6, y_of(loss) + 4, f"{loss:.3f}", "end"))
    for k in range(int(math.log2(max(xs) / min(xs)) + 1.001)):
        rate = min(xs) * 2**k
        parts.append(_text(x_of(rate), TOP + HEIGHT + 15, f"{rate:.3g}", "middle"))
    for i, arm in enumerate(arms):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in arm.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at = right + WIDTH * (i + 0.5) / len(arms)
        error = arm.error or 0.0
        top, bottom = y_of(arm.loss + error), y_of(arm.loss - error)
        parts.append(f'<line x1="{at}" x2="{at}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{at}" cy="{y_of(arm.loss):.1f}" r="4.5" fill="{colour}"/>')
        parts.append(_text(at, TOP + HEIGHT + 15, arm.name, "middle"))
        parts.append(_text(at, TOP + HEIGHT + 28, f"{arm.parameters / 1e6:.1f}M", "middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'

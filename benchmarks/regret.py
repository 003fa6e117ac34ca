"""How much loss a rule for the learning rate costs, on a published sweep of 35 models (benchmarks/data).

    python benchmarks/regret.py

**Regret**, in per cent, of a rule in a cell (one model at one LoRA rank): the held-out loss at the rule's rate over the
cell's lowest, less one. Between measured rates the loss is interpolated in ln(rate): the parabola through the best
measured rate and its two neighbours (where the best lies at an end of the grid: through the three rates at that end)
inside their span, straight lines outside it. The cell's lowest loss is that of the same curve, found by a fine grid. A
rate that the source ran twice counts with the mean of both. A rate outside a cell's measured rates has no regret: the
cell is left out for that rule, and counted.

**Cells**: as the sweep's readers do, rank 16 and above with at least three rates (the summary `r16`); all ranks are the
summary `all`; `shared` are those of rank 16 and above in which every rule has a regret, the formula for Llama and Qwen
included.

**Ours** is the law of `advice/learning_rate.py`: ln rate = c(family) + p ln(parameters / 8e9) + q ln(r / 16), and for
less than 4e9 parameters + s ln(4e9 / parameters). For every model its constants are fitted again without that model's
cells (leave one model out), by maximum likelihood with normal errors in ln(rate). A cell whose best rate is inside its
grid gives the parabola's vertex. One whose best rate is the highest gives an interval: from halfway (in logarithms)
down to the rate before to halfway up to the next of the sweep's rates, which diverged or was not run. `ours, no family`
has one c for all. `ours, as shipped` are the constants of rules.yaml, fitted on all cells and on those of lr_law.py: no
test of anything but that they still fit.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from welltuned.advice.learning_rate import RateSetting, family_of, lora_rate
from welltuned.advice.rules import number

HERE = Path(__file__).parent
SWEEP, MODELS = HERE / "data" / "tinker_sft_sweep.csv", HERE / "data" / "tinker_sft_models.csv"
RESULT = HERE / "results" / "regret.json"
KNEE = number("rate_knee")  # parameters below which the rate falls faster with size
HIGHEST = 3e-3  # the sweep's highest rate, which diverged almost everywhere
FIXED = (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)
FAMILIES = ("llama", "qwen3", "qwen3.5+", "other")
Curve = Callable[[float], float]


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One model at one rank: ln(rate) ascending, and held-out losses."""

    model: str
    model_type: str
    parameters: int
    hidden_size: int
    mixture: bool
    rank: int
    x: np.ndarray
    loss: np.ndarray

    @property
    def family(self) -> str:
        return family_of(self.model_type) or "other"


def read_cells() -> list[Cell]:
    """Cells with at least three rates; what was run twice is averaged."""
    with MODELS.open(encoding="utf-8") as file:
        models = {row["model"]: row for row in csv.DictReader(file)}
    runs: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    with SWEEP.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            runs[row["model"], int(row["rank"])][float(row["learning_rate"])].append(float(row["test_nll"]))
    cells = []
    for (model, rank), losses in runs.items():
        if len(losses) < 3:
            continue
        rates, about = sorted(losses), models[model]
        cells.append(
            Cell(
                model=model,
                model_type=about["model_type"],
                parameters=int(about["parameters"]),
                hidden_size=int(about["hidden_size"]),
                mixture=about["mixture"] == "yes",
                rank=rank,
                x=np.log(rates),
                loss=np.array([np.mean(losses[rate]) for rate in rates]),
            )
        )
    return cells


def repeated_runs() -> dict[str, Any]:
    """By how much two runs of the same cell and rate differ, in per cent: the floor under every regret."""
    runs = defaultdict(list)
    with SWEEP.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            runs[row["model"], row["rank"], row["learning_rate"]].append(float(row["test_nll"]))
    apart = [100 * (max(losses) / min(losses) - 1) for losses in runs.values() if len(losses) > 1]
    return {"pairs": len(apart), "median": _round(np.median(apart)), "p90": _round(np.quantile(apart, 0.9))}


# ── interpolation and regret ─────────────────────────────────────────────────────────────────────────────────────────


def parabola(cell: Cell) -> tuple[np.ndarray, slice]:
    """Coefficients of the parabola through the best rate and its neighbours, and which points those are."""
    best = min(max(int(np.argmin(cell.loss)), 1), len(cell.x) - 2)
    span = slice(best - 1, best + 2)
    return np.polyfit(cell.x[span], cell.loss[span], 2), span


def curve(cell: Cell) -> Curve:
    """The loss at any ln(rate) within the grid: the parabola around the best, straight lines elsewhere."""
    coefficients, span = parabola(cell)
    low, high = cell.x[span][0], cell.x[span][-1]

    def loss(x: float) -> float:
        return float(np.polyval(coefficients, x) if low <= x <= high else np.interp(x, cell.x, cell.loss))

    return loss


def straight(cell: Cell) -> Curve:
    """Straight lines between measured rates, which flatter rates on the grid: how much the interpolation matters."""
    return lambda x: float(np.interp(x, cell.x, cell.loss))


def smooth(cell: Cell) -> Curve:
    """Cubics through all points, with the slopes of the parabola through each point and its neighbours."""
    slopes = []
    for i in range(len(cell.x)):
        middle = min(max(i, 1), len(cell.x) - 2)
        a, b, _ = np.polyfit(cell.x[middle - 1 : middle + 2], cell.loss[middle - 1 : middle + 2], 2)
        slopes.append(2 * a * cell.x[i] + b)

    def loss(x: float) -> float:
        i = int(np.clip(np.searchsorted(cell.x, x) - 1, 0, len(cell.x) - 2))
        width = cell.x[i + 1] - cell.x[i]
        t = (x - cell.x[i]) / width
        ends = (1 + 2 * t) * (1 - t) ** 2 * cell.loss[i] + t**2 * (3 - 2 * t) * cell.loss[i + 1]
        return float(ends + width * t * (1 - t) * ((1 - t) * slopes[i] - t * slopes[i + 1]))

    return loss


def regret(cell: Cell, rate: float, interpolate: Callable[[Cell], Curve] = curve) -> float | None:
    """Per cent of loss above the cell's lowest; None where the rate is outside what was measured."""
    x, slack = math.log(rate), 1e-9
    if not cell.x[0] - slack <= x <= cell.x[-1] + slack:
        return None
    loss, lowest = interpolated(cell, interpolate)
    return 100 * (loss(min(max(x, cell.x[0]), cell.x[-1])) / lowest - 1)


@cache
def interpolated(cell: Cell, interpolate: Callable[[Cell], Curve]) -> tuple[Curve, float]:
    """A cell's curve and its lowest loss."""
    loss = interpolate(cell)
    return loss, min(cell.loss.min(), min(loss(u) for u in np.linspace(cell.x[0], cell.x[-1], 401)))


# ── the law, fitted again ────────────────────────────────────────────────────────────────────────────────────────────


def optimum(cell: Cell) -> tuple[float, float]:
    """ln of the best rate as an interval; its ends are equal where the best is inside the grid."""
    best = int(np.argmin(cell.loss))
    if 0 < best < len(cell.x) - 1:
        a, b, _ = parabola(cell)[0]
        vertex = -b / (2 * a)
        return vertex, vertex
    assert best, f"{cell.model}: the lowest rate is the best"
    top = cell.x[-1]
    following = math.log(HIGHEST if top > math.log(9e-4) else 1e-3)
    return (top + cell.x[-2]) / 2, (top + following) / 2


def features(cell: Cell, by_family: bool) -> list[float]:
    size = math.log(cell.parameters / number("rate_size"))
    small = max(0.0, math.log(KNEE / cell.parameters))
    rank = math.log(cell.rank / number("rate_rank"))
    constants = [float(cell.family == family) for family in FAMILIES] if by_family else [1.0]
    return [*constants, size, small, rank]


def fit(cells: Sequence[Cell], by_family: bool = True) -> tuple[np.ndarray, float]:
    """Coefficients of the law and the deviation of errors in ln(rate)."""
    low, high = np.array([optimum(cell) for cell in cells]).T
    return censored_fit(np.array([features(cell, by_family) for cell in cells]), low, high)


def censored_fit(matrix: np.ndarray, low: np.ndarray, high: np.ndarray, rounds: int = 200) -> tuple[np.ndarray, float]:
    """Least squares of targets known to lie in [low, high], by expectation and maximisation."""
    target, deviation = (low + high) / 2, 0.2
    for _ in range(rounds):
        coefficients = np.linalg.lstsq(matrix, target, rcond=None)[0]
        expected = matrix @ coefficients
        squares = (target - expected) ** 2
        for i in np.flatnonzero(high > low):
            a, b = (low[i] - expected[i]) / deviation, (high[i] - expected[i]) / deviation
            mean, variance = truncated_normal(a, b)
            target[i] = min(max(expected[i] + deviation * mean, low[i]), high[i])
            squares[i] = (target[i] - expected[i]) ** 2 + deviation**2 * variance
        deviation = math.sqrt(squares.mean())
    return coefficients, deviation


def truncated_normal(a: float, b: float) -> tuple[float, float]:
    """Mean and variance of a standard normal between a and b."""

    def density(z: float) -> float:
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    mass = max((math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2, 1e-12)
    mean = (density(a) - density(b)) / mass
    return mean, max(0.0, 1 + (a * density(a) - b * density(b)) / mass - mean**2)


def left_out_rates(cells: Sequence[Cell], by_family: bool) -> dict[tuple[str, int], float]:
    """Every cell's rate by the law fitted without its model."""
    rates = {}
    for model in dict.fromkeys(cell.model for cell in cells):
        coefficients, _ = fit([cell for cell in cells if cell.model != model], by_family)
        for cell in cells:
            if cell.model == model:
                rates[cell.model, cell.rank] = math.exp(np.dot(features(cell, by_family), coefficients))
    return rates


def constants(cells: Sequence[Cell]) -> dict[str, float]:
    """The law's constants, fitted on all cells of the sweep; what is shipped rests on lr_law.py's cells too."""
    coefficients, deviation = fit(cells)
    families = {name: float(f"{math.exp(c):.3g}") for name, c in zip(FAMILIES, coefficients, strict=False)}
    names = ("size_exponent", "small_exponent", "rank_exponent")
    exponents = dict(zip(names, (_round(c) for c in coefficients[len(FAMILIES) :]), strict=True))
    return {**families, **exponents, "deviation": _round(deviation)}


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────

Rule = Callable[[Cell], float | None]


def published_formula(cell: Cell) -> float | None:
    """tinker-cookbook's (E028, E029): 5e-4 · (2000 / hidden)^p; it has no p for other families than Llama and Qwen."""
    exponent = {"llama": 0.781, "qwen3": 0.0775, "qwen3.5+": 0.0775}.get(cell.family)
    return None if exponent is None else 5e-4 * (2000 / cell.hidden_size) ** exponent


def shipped(cell: Cell) -> float:
    return lora_rate(
        RateSetting(
            family=cell.model_type,
            parameters=cell.parameters,
            batch=int(number("rate_batch")),
            updates=int(number("rate_updates")),
            r=cell.rank,
            alpha=number("rate_alpha"),
            mixture=cell.mixture,
        )
    ).value


def all_rules(cells: Sequence[Cell]) -> dict[str, Rule]:
    ours, pooled = left_out_rates(cells, by_family=True), left_out_rates(cells, by_family=False)
    rules: dict[str, Rule] = {f"{rate:.0e}".replace("e-0", "e-"): (lambda _, rate=rate: rate) for rate in FIXED}
    return {
        **rules,
        "tinker-cookbook's formula": published_formula,
        "ours": lambda cell: ours[cell.model, cell.rank],
        "ours, no family": lambda cell: pooled[cell.model, cell.rank],
        "ours, as shipped": shipped,
    }


def _round(value: float) -> float:
    return round(float(value), 4)


def summary(regrets: Mapping[Any, float | None]) -> dict[str, float | int]:
    found = [value for value in regrets.values() if value is not None]
    return {
        "cells": len(found),
        "unmeasured": len(regrets) - len(found),
        "mean": _round(np.mean(found)),
        "median": _round(np.median(found)),
        "p90": _round(np.quantile(found, 0.9)),
        "worst": _round(max(found)),
    }


def measure() -> dict[str, Any]:
    """The whole result: regret in per cent by rule and set of cells."""
    cells = read_cells()
    rules = all_rules(cells)

    def regrets(rule: Rule, some: Sequence[Cell], by: Callable[[Cell], Curve] = curve) -> dict[Any, float | None]:
        rates = {(cell.model, cell.rank): (cell, rule(cell)) for cell in some}
        return {key: None if rate is None else regret(cell, rate, by) for key, (cell, rate) in rates.items()}

    large = [cell for cell in cells if cell.rank >= 16]
    of_large = {name: regrets(rule, large) for name, rule in rules.items()}
    shared = [key for key in of_large["ours"] if all(found[key] is not None for found in of_large.values())]
    return {
        "unit": "per cent of held-out loss above the cell's lowest",
        "cells": {"all": len(cells), "r16": len(large), "shared": len(shared)},
        "repeated_runs": repeated_runs(),
        "fitted_on_all": constants(cells),
        "r16": {name: summary(found) for name, found in of_large.items()},
        "shared": {name: summary({key: found[key] for key in shared}) for name, found in of_large.items()},
        "all": {name: summary(regrets(rule, cells)) for name, rule in rules.items()},
        "other_interpolations": {
            by.__name__: {name: summary(regrets(rule, large, by))["mean"] for name, rule in rules.items()}
            for by in (straight, smooth)
        },
    }


def main() -> None:
    result = measure()
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, found in result["r16"].items():
        print(f"{name:28}{found['mean']:6.2f} % in {found['cells']} cells, p90 {found['p90']:.2f}")
    print(RESULT)


if __name__ == "__main__":
    main()

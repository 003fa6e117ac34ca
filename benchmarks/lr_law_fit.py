"""The law for short runs: fitted to lr_law.py's runs together with the published sweep, and tested on cells left out.

    python benchmarks/lr_law_fit.py        # writes results/lr_law.json and results/lr_law.svg

A cell's **optimum** is the vertex of the parabola in ln(alpha · rate) through its lowest loss and the two beside it.
Its error is the standard deviation of that vertex over bootstrap samples of the held-out rows (the same rows at every
rate). M001 to M007 and M009 to M011 of the evidence are two more cells, whose rows were not kept.

**The law** is the sweep's (regret.py) + a ln(alpha / 32) + b ln(batch / 128) + p ln(780 / updates).
All constants come from one regression on the sweep's optima and ours; the sweep's cells have none of the three terms.
Below `rate_knee` parameters the rate falls faster with size: where that begins is what fits best.

**Regret** is that of regret.py, in per cent of loss: of the law fitted without the cell that is judged (nor its repeat
with another seed), and of rates that others set by default. A default below the lowest measured rate counts with the
loss at that rate, which flatters it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regret as published
from common import RESULTS, write_result
from lr_law import read_runs
from lr_law_plot import Line, draw

from welltuned.advice.evidence import row
from welltuned.advice.learning_rate import RateSetting, lora_rate
from welltuned.advice.rules import number

PARAMETERS = 134_515_008
PEERS = {  # alpha · rate of defaults: E112, E118, E059 and E075, E119, E059 with alpha = 2r, E115
    "2e-5 at alpha 32": 6.4e-4,
    "1e-4 at alpha 16": 1.6e-3,
    "2e-4 at alpha 16": 3.2e-3,
    "3e-4 at alpha 16": 4.8e-3,
    "2e-4 at alpha 32": 6.4e-3,
    "1e-3 at alpha 16": 1.6e-2,
}
SAMPLES = 400


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One cell: ln(alpha · rate) ascending, losses, and the held-out losses summed by row [rates, rows] behind them."""

    name: str
    dataset: str
    updates: int
    batch: int
    r: int
    alpha: float
    x: np.ndarray
    loss: np.ndarray
    sums: np.ndarray | None
    counts: np.ndarray | None
    diverged: float | None
    start: float

    @property
    def as_cell(self) -> published.Cell:
        """At alpha 32, as the sweep's cells."""
        x = self.x - math.log(number("rate_alpha"))
        return published.Cell(self.name, "llama", PARAMETERS, 576, False, self.r, x, self.loss)

    @property
    def setting(self) -> RateSetting:
        return RateSetting(
            family="llama", parameters=PARAMETERS, batch=self.batch, updates=self.updates, r=self.r, alpha=self.alpha
        )

    @property
    def group(self) -> tuple[Any, ...]:
        """What is left out together: a cell and its repeats."""
        return self.dataset, self.updates, self.batch, self.r, self.alpha

    @property
    def bracketed(self) -> bool:
        return 0 < int(np.argmin(self.loss)) < len(self.x) - 1


def read_cells() -> list[Measured]:
    """Every bracketed cell that was measured, in the order of measurement; the two of the evidence first."""
    found = defaultdict(list)
    for run in read_runs():
        found[run["cell"]].append(run)
    cells = [
        _of_evidence(*about) for about in (("gsm8k", 40, 8, 16.0, range(1, 8)), ("tickets", 85, 4, 32.0, (9, 10, 11)))
    ]
    return [*cells, *(cell for runs in found.values() if (cell := _of_runs(runs)).bracketed)]


def _of_runs(runs: Sequence[dict[str, Any]]) -> Measured:
    about, finite = runs[0], sorted((r for r in runs if r["loss"] is not None), key=lambda r: r["alpha_rate"])
    return Measured(
        name=about["cell"],
        dataset=about["dataset"],
        updates=about["updates"],
        batch=about["batch"],
        r=about["r"],
        alpha=about["alpha"],
        x=np.log([r["alpha_rate"] for r in finite]),
        loss=np.array([r["loss"] for r in finite]),
        sums=np.array([r["held_out_sums"] for r in finite]),
        counts=np.array(about["held_out_tokens"]),
        diverged=min((r["alpha_rate"] for r in runs if r["diverged"]), default=None),
        start=about["start_loss"],
    )


def _of_evidence(dataset: str, updates: int, batch: int, alpha: float, ids: Sequence[int]) -> Measured:
    points = []
    for i in ids:
        match = re.fullmatch(r"(\S+): held-out loss (\S+)", row(f"M{i:03}").value)
        assert match
        points.append((math.log(float(match[1]) * alpha), float(match[2])))
    start = re.search(r"start ([\d.]+)", row(f"M{ids[0]:03}").setting)
    assert start
    x, loss = np.array(sorted(points)).T
    name = f"{dataset}/u{updates}/b{batch}/r16/a{alpha:g} (M{ids[0]:03} to M{ids[-1]:03})"
    return Measured(name, dataset, updates, batch, 16, alpha, x, loss, None, None, None, float(start[1]))


# ── optima ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def vertex(x: np.ndarray, loss: np.ndarray) -> float:
    """ln(alpha · rate) of the lowest point of the parabola through the lowest of three neighbours and those."""
    near = three(loss)
    a, b, _ = np.polyfit(x[near], loss[near], 2)
    return float(np.clip(-b / (2 * a), x[near][0], x[near][-1])) if a > 0 else float(x[np.argmin(loss)])


def three(loss: np.ndarray) -> slice:
    """The lowest loss and its neighbours; where it lies at an end, the three at that end."""
    middle = min(max(int(np.argmin(loss)), 1), len(loss) - 2)
    return slice(middle - 1, middle + 2)


def vertex_error(cell: Measured) -> float | None:
    """Over bootstrap samples of the held-out rows: what the choice of these rows may have moved the optimum by."""
    if cell.sums is None or cell.counts is None:
        return None
    generator, rows = np.random.default_rng(0), len(cell.counts)
    drawn = generator.integers(0, rows, (SAMPLES, rows))
    found = [vertex(cell.x, cell.sums[:, i].sum(1) / cell.counts[i].sum()) for i in drawn]
    return float(np.std(found))


# ── the law ──────────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = (*published.FAMILIES, "size_exponent", "small_exponent", "rank_exponent")
OURS = ("alpha_exponent", "batch_exponent", "updates_exponent")
POOLED = ("unknown", *NAMES[len(published.FAMILIES) :])
KNEES = (2e9, 3e9, 4e9, 6e9, 8e9, 1.2e10)


@dataclass(frozen=True, slots=True)
class Law:
    """Coefficients by name, their standard errors, and the deviation of an optimum from the law, all in ln(rate)."""

    by_family: bool
    coefficients: np.ndarray
    errors: np.ndarray
    deviation: float

    @property
    def constants(self) -> dict[str, float]:
        names = (*(NAMES if self.by_family else POOLED), *OURS)
        return dict(zip(names, self.coefficients, strict=True))


def terms(cell: Measured) -> list[float]:
    batch, updates = cell.batch / number("rate_batch"), number("rate_updates") / cell.updates
    return [math.log(cell.alpha / number("rate_alpha")), math.log(batch), math.log(updates)]


def features(cell: Measured, by_family: bool) -> list[float]:
    return [*published.features(cell.as_cell, by_family), *terms(cell)]


def fit(cells: Sequence[Measured], sweep: Sequence[published.Cell], by_family: bool = True) -> Law:
    """One censored regression of ln(rate) on the sweep's cells and ours."""
    matrix = [features(cell, by_family) for cell in cells]
    matrix += [[*published.features(cell, by_family), 0.0, 0.0, 0.0] for cell in sweep]
    optima = [(vertex(cell.x, cell.loss) - math.log(cell.alpha),) * 2 for cell in cells]
    low, high = np.array(optima + [published.optimum(cell) for cell in sweep]).T
    x = np.array(matrix)
    coefficients, deviation = published.censored_fit(x, low, high)
    errors = deviation * np.sqrt(np.diag(np.linalg.pinv(x.T @ x)))
    return Law(by_family, coefficients, errors, deviation)


def predicted(law: Law, cell: Measured) -> float:
    """ln(alpha · rate)."""
    return float(np.dot(features(cell, law.by_family), law.coefficients)) + math.log(cell.alpha)


def left_out(cells: Sequence[Measured], sweep: Sequence[published.Cell]) -> dict[str, float]:
    """ln(alpha · rate) of every cell by the law fitted without it and its repeats."""
    found = {}
    for group in dict.fromkeys(cell.group for cell in cells):
        law = fit([cell for cell in cells if cell.group != group], sweep)
        found |= {cell.name: predicted(law, cell) for cell in cells if cell.group == group}
    return found


def regret(cell: Measured, x: float) -> float:
    """Per cent of loss above the lowest at ln(alpha · rate); outside what was measured, at the nearest rate."""
    inside = float(np.clip(x, cell.x[0], cell.x[-1]))
    found = published.regret(cell.as_cell, math.exp(inside) / number("rate_alpha"))
    assert found is not None
    return found


# ── the result ───────────────────────────────────────────────────────────────────────────────────────────────────────


def described(cell: Measured) -> dict[str, Any]:
    error = vertex_error(cell)
    curvature = np.polyfit(cell.x[three(cell.loss)], cell.loss[three(cell.loss)], 2)[0] / cell.loss.min()
    return {
        "dataset": cell.dataset,
        "updates": cell.updates,
        "batch": cell.batch,
        "r": cell.r,
        "alpha": cell.alpha,
        "alpha_rates": [float(f"{v:.4g}") for v in np.exp(cell.x)],
        "losses": [float(v) for v in cell.loss],
        "start_loss": cell.start,
        "diverged_from": cell.diverged,
        "optimum": float(f"{math.exp(vertex(cell.x, cell.loss)):.3g}"),
        "optimum_error": None if error is None else _round(error),
        "per_cent_a_factor_of_2_off": _round(100 * curvature * math.log(2) ** 2),
    }


def judged(cells: Sequence[Measured], rates: Mapping[str, float]) -> dict[str, Any]:
    """Regret of rates (ln alpha · rate by cell), and how many of them were outside what was measured."""
    found = {cell.name: _round(regret(cell, rates[cell.name])) for cell in cells}
    outside = sum(not cell.x[0] - 1e-9 <= rates[cell.name] <= cell.x[-1] + 1e-9 for cell in cells)
    values = list(found.values())
    return {"mean": _round(np.mean(values)), "worst": max(values), "outside": outside, "cells": found}


def measure() -> dict[str, Any]:
    cells, sweep = read_cells(), published.read_cells()
    law, pooled, rates = fit(cells, sweep), fit(cells, sweep, by_family=False), left_out(cells, sweep)
    shipped = {cell.name: math.log(lora_rate(cell.setting).value * cell.alpha) for cell in cells}
    peers = {name: judged(cells, dict.fromkeys(rates, math.log(value))) for name, value in PEERS.items()}
    best_peer = min(peers, key=lambda name: peers[name]["mean"])
    ours = judged(cells, rates)
    apart = [vertex(cell.x, cell.loss) - rates[cell.name] for cell in cells]
    return {
        "what": __doc__.splitlines()[0],
        "unit": "alpha · rate; regret in per cent of held-out loss above the cell's lowest",
        "model": "SmolLM2-135M-Instruct",
        "cells": {cell.name: described(cell) for cell in cells},
        "constants": {name: _round(value) for name, value in law.constants.items()},
        "standard_errors": dict(zip(law.constants, (_round(error) for error in law.errors), strict=True)),
        "deviation": _round(law.deviation),
        "constants_without_family": {name: _round(value) for name, value in pooled.constants.items()},
        "left_out": {**ours, "predicted": {name: float(f"{math.exp(x):.3g}") for name, x in rates.items()}},
        "left_out_deviation": _round(math.sqrt(np.mean(np.square(apart)))),
        "as_shipped": judged(cells, shipped),
        "peers": peers,
        "best_peer": best_peer,
        "share_of_best_peers_regret": _round(ours["mean"] / peers[best_peer]["mean"]),
    }


def knees() -> dict[str, float]:
    """Deviation from the law, fitted with its knee elsewhere: where the sweep and our cells want it."""
    cells, sweep = read_cells(), published.read_cells()
    with_knee = {}
    for knee in KNEES:
        published.KNEE = knee
        with_knee[f"{knee:.1e}"] = _round(fit(cells, sweep).deviation)
    published.KNEE = number("rate_knee")
    return with_knee


def _round(value: float) -> float:
    return round(float(value), 4)


def plotted(result: Mapping[str, Any]) -> str:
    lines = [
        Line(
            name=name,
            group=f"{cell['dataset']}, {cell['updates']} updates of {cell['batch']}",
            rates=cell["alpha_rates"],
            above=[100 * (loss / min(cell["losses"]) - 1) for loss in cell["losses"]],
            optimum=cell["optimum"],
            law=result["left_out"]["predicted"][name],
        )
        for name, cell in result["cells"].items()
    ]
    return draw(lines)


def main() -> None:
    result = measure()
    write_result("lr_law", {**result, "deviation_by_knee": knees()})
    (RESULTS / "lr_law.svg").write_text(plotted(result), encoding="utf-8")
    for name, cell in result["cells"].items():
        law, lost = result["left_out"]["predicted"][name], result["left_out"]["cells"][name]
        print(f"{name:45} optimum {cell['optimum']:.4f}, law without it {law:.4f}: {lost:.2f} %")
    print(result["constants"], result["constants_without_family"], "deviation", result["deviation"])
    print({name: found["mean"] for name, found in result["peers"].items()}, "ours", result["left_out"]["mean"])


if __name__ == "__main__":
    main()

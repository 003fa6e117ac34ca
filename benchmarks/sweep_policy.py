"""What the decisions of a search cost and bring, without training: on made-up curves, and on grids that were measured.

    python benchmarks/sweep_policy.py [--name NAME] [--seeds N] [--prices 0.002,0.0005] [--grids NAMES]

Every search here is `welltuned sweep`'s own: the board decides, from held-out losses of a curve instead of a model.
**made up**: parabolas of several curvatures whose lowest point lies beside the advice, moves until the end, and
is flatter at the end than early on; with what equal runs differ by, and rows that differ among themselves, as measured.
**grids**: the losses that a grid recorded, row by row, straight lines between its rates; the advice is moved over the
grid, so that a search which only trusts it is seen. Regret is the curve's height at the chosen rate above its lowest,
without the noise of the one run; tokens are in whole runs, and as a share of a grid of seven.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
from common import RESULTS, describe_machine, write_result
from numpy.typing import NDArray

from welltuned.search import board as board_module
from welltuned.search import halving
from welltuned.search.applied import RATE
from welltuned.search.arms import factors
from welltuned.search.board import Board, Rules, shares_of
from welltuned.search.curve import Prior

Array = NDArray[np.float64]

GRID = 7
ADVISED = 1e-3
ROWS = 64
# Of the made-up curves: relative loss per square of ln(rate) at the end, and what equal runs differ by, relative.
CURVES = (0.015, 0.06, 0.15, 0.3)
REPEATS = (0.0002, 0.003, 0.011)
# Of the best rate from the advice, in ln(rate): a deviation of 0.33, as the law has for unknown families (E022).
OFFSETS = (-0.5, -0.25, -0.1, 0.1, 0.25, 0.5)
DOUBT = 0.65  # the advice's own, as the plans of both measured cases have it
ROW_NOISE, HARD = 0.06, 0.35  # of a row, relative: its own in each arm, and in common; 64 rows: 1 % paired
MOVES = 0.15  # of the lowest point until the end, times sqrt(ln(1 / share))
RESTLESS = 2.0  # so many times as far as at the end do equal runs differ after a fifth
FALLS = 0.25  # of the loss with the share of the run, as its power; its curvature falls with the power 0.4
STEEPER = 0.4


@dataclass(frozen=True, slots=True)
class MadePlan:
    """Of a plan, what the board asks for."""

    rate: float
    updates: int

    def value(self, name: str) -> float:
        assert name == RATE
        return self.rate


@dataclass(frozen=True, slots=True)
class MadeArm:
    """Of an arm, what the board asks for: one group, and alpha 1."""

    number: int
    settings: dict[str, Any]
    plan: MadePlan
    group: str = ""

    @property
    def x(self) -> float:
        return math.log(self.plan.rate)

    @property
    def name(self) -> str:
        return f"{self.plan.rate:.2g}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One search: ln(rate) that was chosen, whole runs that it took, arms, and what it said."""

    x: float
    runs: float
    arms: int
    said: tuple[str, ...]


# ln(rate), share of the run, number of the arm -> the loss of each held-out row
Losses = Callable[[float, float, int], Sequence[float]]


def searched(
    losses: Losses, centre: float, doubt: float, weights: Sequence[int], *, updates: int, arms: int
) -> Outcome:
    """A whole search around `centre`, which is ln(rate), by the board's own decisions."""

    def made(_: Any, number: int, settings: dict[str, Any]) -> MadeArm:
        return MadeArm(number, dict(settings), MadePlan(settings[RATE], updates))

    first: list[Any] = [made(None, i, {RATE: math.exp(centre) * f}) for i, f in enumerate(factors(arms))]
    nothing: Any = None
    with (
        patch.object(board_module, "arm_of", made),
        patch.object(board_module, "prior_of", lambda arm, rate: Prior(math.log(rate), doubt)),
    ):
        board = Board(nothing, first, weights, Rules(advised={"": math.exp(centre)}), lambda event: None)
        while not board.state.ended:
            while due := [(arm, share) for arm in board.state.alive if (share := board.due(arm)) is not None]:
                for arm, share in due:
                    board.state = board.state.with_arm(replace(arm, step=board.goal(arm)))
                    found = losses(board.arms[arm.number].x, share, arm.number)
                    board.looked(arm.number, share, tuple(float(v) for v in found), 0)
            board.judge(0.0)
    assert board.state.winner is not None
    runs = sum(arm.step for arm in board.state.arms) / updates
    said = tuple(text for record in board.state.rungs for text in record.said)
    return Outcome(board.arms[board.state.winner].x, runs, len(board.state.arms), said)


# ── made up ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Family:
    """Curves of one kind."""

    curve: float
    repeat: float
    moves: float = MOVES


def height(family: Family, off: float) -> float:
    """Relative loss above the lowest, at the end: steeper above the best rate, as grids have it."""
    return family.curve / 2 * off**2 * (1.0 + 0.5 * max(0.0, off))


def made_up(family: Family, offset: float, seed: int, shares: Sequence[float]) -> tuple[Losses, float]:
    """Losses whose lowest point ends `offset` beside the advice; and ln(rate) of the advice."""
    draw, centre = np.random.default_rng([seed, 7]), math.log(ADVISED)
    hard, moved, at = np.exp(draw.normal(0, HARD, ROWS)), 0.0, {1.0: 0.0}
    for before, share in pairwise(sorted(shares, reverse=True)):
        moved += family.moves * math.sqrt(math.log(before / share)) * draw.standard_normal()
        at[share] = moved
    tastes = draw.normal(0, ROW_NOISE, ROWS)  # rows want other rates: paired errors grow with the distance

    def losses(x: float, share: float, number: int) -> Array:
        off = x - centre - offset - at[share]
        own, then = np.random.default_rng([seed, number]), np.random.default_rng([seed, number, int(1000 * share)])
        restless = family.repeat * (1 + (RESTLESS - 1) * math.log(1 / share) / math.log(5))
        noise = restless * math.sqrt(0.5) * (own.standard_normal() + then.standard_normal())  # half of it stays
        rows = hard / hard.mean() * (1 + tastes * off + own.normal(0, ROW_NOISE / 2, ROWS))
        return share**-FALLS * rows * (1 + share**-STEEPER * height(family, off) + noise)

    return losses, centre


def of_family(family: Family, seeds: int, arms: int, updates: int = 500) -> dict[str, Any]:
    regrets, runs, count = [], [], []
    for offset in OFFSETS:
        for seed in range(seeds):
            losses, centre = made_up(family, offset, seed, shares_of([updates]))
            found = searched(losses, centre, DOUBT, [50] * ROWS, updates=updates, arms=arms)
            regrets.append(height(family, found.x - centre - offset))
            runs.append(found.runs)
            count.append(found.arms)
    return {
        "curve": family.curve,
        "repeat": family.repeat,
        "moves": family.moves,
        "regret_of_advice": round(float(np.mean([height(family, -o) for o in OFFSETS])), 5),
        **summary(regrets, runs, count),
    }


def summary(regrets: Sequence[float], runs: Sequence[float], count: Sequence[int]) -> dict[str, float]:
    return {
        "searches": len(regrets),
        "regret_mean": round(float(np.mean(regrets)), 5),
        "regret_median": round(float(np.median(regrets)), 5),
        "regret_90": round(float(np.quantile(regrets, 0.9)), 5),
        "runs": round(float(np.mean(runs)), 3),
        "share_of_a_grid_of_seven": round(float(np.mean(runs)) / GRID, 4),
        "share_at_most": round(max(runs) / GRID, 4),
        "arms": round(float(np.mean(count)), 2),
    }


# ── grids that were measured ─────────────────────────────────────────────────────────────────────────────────────────


def of_grid(grid: dict[str, Any], arms: int, doubt: float = DOUBT) -> dict[str, Any]:
    """Searches whose advice lies up to a factor of 1.65 beside the grid's."""
    runs = sorted((a for a in grid["arms"] if a["status"] == "done"), key=lambda a: a["learning_rate"])
    x_A, weights = np.log([a["learning_rate"] for a in runs]), grid["weights"]
    shares = [look["share"] for look in runs[0]["looks"]]
    loss_SAI = np.array([[a["looks"][i]["loss_of_row"] for a in runs] for i in range(len(shares))])

    def losses(x: float, share: float, _: int) -> Array:
        at = loss_SAI[int(np.argmin([abs(s - share) for s in shares]))]
        i = int(np.clip(np.searchsorted(x_A, x) - 1, 0, len(x_A) - 2))
        t = (x - x_A[i]) / (x_A[i + 1] - x_A[i])
        return np.maximum(at[i] + t * (at[i + 1] - at[i]), 1e-3)

    weight_I = np.asarray(weights, dtype=np.float64) / sum(weights)
    best = float((loss_SAI[-1] @ weight_I).min())
    found = {}
    for offset in np.linspace(-0.5, 0.5, 11):
        centre = math.log(grid["advised"]) + float(offset)
        one = searched(losses, centre, doubt, weights, updates=grid["updates"], arms=arms)
        regret = float(losses(one.x, 1.0, 0) @ weight_I) / best - 1
        alone = float(losses(centre, 1.0, 0) @ weight_I) / best - 1
        found[round(float(offset), 2)] = (regret, one, alone)
    regrets, outcomes = [r for r, _, _ in found.values()], [o for _, o, _ in found.values()]
    at_advice = found[0.0]
    return {
        **summary(regrets, [o.runs for o in outcomes], [o.arms for o in outcomes]),
        "regret_of_advice": round(float(np.mean([a for _, _, a in found.values()])), 5),
        "at_the_advice": {"regret": round(at_advice[0], 5), "runs": round(at_advice[1].runs, 3)},
        "said_at_the_advice": at_advice[1].said,
        "by_offset": {str(k): [round(r, 5), round(o.runs, 2), round(a, 5)] for k, (r, o, a) in found.items()},
    }


def measured(seeds: int, arms: int, grids: Sequence[str], updates: int) -> dict[str, Any]:
    """All families and grids with the policy as it is."""
    families = [Family(c, r) for c in CURVES for r in REPEATS]
    made = [of_family(family, seeds, arms, updates) for family in families]
    restless = [of_family(Family(c, REPEATS[1], 2 * MOVES), seeds, arms, updates) for c in CURVES]
    names = ("regret_mean", "runs", "regret_of_advice")
    kept = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in grids}
    return {
        "all_made_up": {name: round(float(np.mean([m[name] for m in made])), 5) for name in names},
        "made_up": made,
        "whose_lowest_point_moves_twice_as_far": restless,
        "grids": {name: of_grid(grid, arms) for name, grid in kept.items()},
    }


def told(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: made up {found['all_made_up']}")
    for m in [*found["made_up"], *found["whose_lowest_point_moves_twice_as_far"]]:
        print("   ", {k: m[k] for k in ("curve", "repeat", "regret_mean", "regret_90", "runs", "regret_of_advice")})
    for grid, m in found["grids"].items():
        print(
            "   ",
            grid,
            {k: m[k] for k in ("regret_mean", "regret_median", "runs", "regret_of_advice", "at_the_advice")},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="after", help="of this policy in the result, which keeps the others")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--arms", type=int, default=3)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--prices", default="", help="others than the policy's own, to be tried as well")
    parser.add_argument("--grids", default="sweep_grid_gsm8k,sweep_grid_gsm8k_float32,sweep_grid_tickets")
    arguments = parser.parse_args()
    grids = [name for name in arguments.grids.split(",") if (RESULTS / f"{name}.json").exists()]
    what = arguments.seeds, arguments.arms, grids, arguments.updates
    found = measured(*what)
    told(arguments.name, found)
    prices = {}
    for price in (float(text) for text in arguments.prices.split(",") if text):
        with patch.object(halving, "PRICE", price):
            at = measured(*what)
        told(f"price {price:g}", at)
        short = {name: {k: m[k] for k in ("regret_mean", "runs", "at_the_advice")} for name, m in at["grids"].items()}
        prices[f"{price:g}"] = {"all_made_up": at["all_made_up"], "grids": short}
    path = RESULTS / "sweep_policy.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    how = {
        "machine": describe_machine(),
        "arms": arguments.arms,
        "seeds": arguments.seeds,
        "updates": arguments.updates,
    }
    print(write_result("sweep_policy", {**kept, arguments.name: {**how, **found, "prices": prices}}))


if __name__ == "__main__":
    main()

"""A search as its page shows it: the arms, what became of each, and the curve that chose; finished or at work."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from welltuned.advice.settle import shown
from welltuned.report.log import Log
from welltuned.report.table import plain, smoothed, thinned
from welltuned.search.report import GRID

POINTS = 600  # of an arm's training loss

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """An arm's held-out loss after `share` of its run, and how far that was above the best there, paired."""

    share: float
    loss: float
    above_best: float | None
    above_best_se: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One arm. `rate` is None where its name does not say it; `became` is its end in words, empty while it trains."""

    number: int
    name: str
    rate: float | None
    group: str
    status: str
    why: str
    updates: int
    tokens: int
    looks: tuple[Look, ...]

    @property
    def last(self) -> Look | None:
        return self.looks[-1] if self.looks else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRead:
    """A search.

    Attributes:
        found: what sweep.json concludes; empty until the search ends.
        updates: what an arm that goes to its end makes, by the plan that the arms depart from.
        searched: the choices that the arms differ in.
    """

    arms: tuple[Arm, ...]
    found: Line
    updates: int
    searched: frozenset[str]

    @property
    def winner(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.number == self.found.get("winner")), None)

    @property
    def shares(self) -> tuple[float, ...]:
        """After which shares of a run arms were compared."""
        return tuple(sorted({look.share for arm in self.arms for look in arm.looks}))

    @property
    def at_work(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.status == "alive")

    @property
    def step(self) -> int:
        return max((arm.updates for arm in self.arms), default=0)


def read_search(kept: Line, log: Log, updates: int) -> SearchRead:
    """From sweep.json where the search is finished, else from what metrics.jsonl tells.

    Raises:
        KeyError, TypeError, ValueError: sweep.json is not what we write.
    """
    question = kept["asked"]["question"]
    names = [*(name for name, _ in question["over"]), *(span["name"] for span in question.get("ranges") or ())]
    searched = frozenset(map(str, names))
    if "arms" in kept:
        arms = tuple(_finished(row) for row in kept["arms"])
        return SearchRead(arms=arms, found=kept, updates=updates, searched=searched)
    return SearchRead(arms=_told(log, updates), found={}, updates=updates, searched=searched)


def _finished(row: Line) -> Arm:
    looks = tuple(
        Look(share=look["share"], loss=look["loss"], above_best=look["above_best"], above_best_se=look["above_best_se"])
        for look in row["looks"]
        if isinstance(look["loss"], int | float)  # one that diverged has none
    )
    names = ("number", "name", "group", "status", "why", "updates", "tokens")
    return Arm(**{name: row[name] for name in names}, rate=float(row["learning_rate"]), looks=looks)


def _told(log: Log, updates: int) -> tuple[Arm, ...]:
    """The arms as the lines of a search tell of them, one after the other."""
    arms: dict[int, Arm] = {}
    for line in log.arm_events:
        number = line.get("arm")
        if line["event"] == "arm" and isinstance(number, int):
            arms[number] = _begun(number, str(line.get("name", number)))
        if not isinstance(number, int) or (arm := arms.get(number)) is None:
            continue
        match line["event"]:
            case "arm_judged" if isinstance(line.get("arm_eval_loss"), float):
                share = line.get("share", line.get("step", 0) / max(updates, 1))
                gap, error = line.get("above_best"), line.get("above_best_se")
                look = Look(share=share, loss=line["arm_eval_loss"], above_best=gap, above_best_se=error)
                arms[number] = replace(arm, looks=(*arm.looks, look))
            case "arm_ended":
                arms[number] = replace(arm, status=str(line.get("status")), why=str(line.get("why")))
    return tuple(_counted(arm, log) for arm in arms.values())


def _begun(number: int, name: str) -> Arm:
    """An arm by its name alone, which begins with its rate: `1.3e-3, r 16`."""
    first, _, group = name.partition(", ")
    try:
        rate: float | None = float(first)
    except ValueError:
        rate = None
    return Arm(number=number, name=name, rate=rate, group=group, status="alive", why="", updates=0, tokens=0, looks=())


def _counted(arm: Arm, log: Log) -> Arm:
    table = log.arm_updates.get(arm.number)
    if table is None or not len(table):
        return arm
    return replace(arm, updates=int(table.column("step")[-1]), tokens=int(table.column("tokens").sum()))


def drawn(search: SearchRead, log: Log) -> dict[str, Any]:
    """What the page draws: each arm's training loss and its looks, the fitted curve, and the rates that matter."""
    found = search.found
    return {
        "arms": [
            {
                "name": arm.name,
                "rate": arm.rate,
                "group": arm.group,
                "status": arm.status,
                "chosen": arm is search.winner,
                "looks": [{"share": look.share, "loss": look.loss, "error": look.above_best_se} for look in arm.looks],
                **_course(arm, log),
            }
            for arm in search.arms
        ],
        "updates": search.updates,
        "fitted": found.get("fitted") or [],
        "fitted_share": found.get("fitted_share"),
        "advised": found.get("advised_rate"),
        "best": found.get("best_rate"),
        "factor": found.get("best_rate_factor"),
    }


def _course(arm: Arm, log: Log) -> dict[str, Any]:
    """The smoothed training loss of an arm over its updates."""
    table = log.arm_updates.get(arm.number)
    if table is None:
        return {"step": [], "smooth": []}
    loss = smoothed(table.column("loss"))
    keep = thinned(loss, POINTS)
    return {"step": plain(table.column("step")[keep], 12), "smooth": plain(loss[keep])}


def rows(search: SearchRead) -> list[dict[str, Any]]:
    """The table of the arms: lowest latest loss at the latest share first."""
    order = sorted(search.arms, key=lambda arm: (-arm.last.share, arm.last.loss) if arm.last else (0.0, math.inf))
    return [
        {
            "arm": arm,
            "losses": [next((look.loss for look in arm.looks if look.share == share), None) for share in search.shares],
            "gap": _gap(arm.last),
            "fate": "chosen" if arm is search.winner else _fate(arm),
        }
        for arm in order
    ]


def _gap(look: Look | None) -> str:
    if look is None or not look.above_best or look.above_best_se is None:
        return ""
    return f"{look.above_best:.4f} ± {look.above_best_se:.4f}"


def _fate(arm: Arm) -> str:
    words = {"alive": "not ended", "done": "trained to its end"}
    return f"{words.get(arm.status, arm.status)}{': ' if arm.why else ''}{arm.why}"


def tokens(search: SearchRead) -> list[tuple[str, int, str]]:
    """Bars of tokens: what was trained, beside one run and a whole grid; with what is said of each."""
    trained = sum(arm.tokens for arm in search.arms)
    one = search.found.get("run_tokens")
    if not isinstance(one, int) or not one:
        return []
    return [
        ("this search", trained, f"{trained / one:.2f} whole runs"),
        ("a grid of seven", GRID * one, "each rate to its end"),
        ("one run", one, "the chosen arm alone"),
    ]


def rungs(search: SearchRead) -> list[tuple[str, str]]:
    """When arms were compared, and what followed, in words."""
    names = {arm.number: arm.name for arm in search.arms}
    told = []
    for rung in search.found.get("rungs") or ():
        parts = [f"{names.get(rung['leader'], rung['leader'])} leads"]
        if isinstance(rung["regret"], float) and math.isfinite(rung["regret"]):
            parts[0] += f", expected to cost {rung['regret']:.2%} of the loss"
        if rung["best_rate"] is not None:
            factor = f" (×/÷ {rung['best_rate_factor']:.2f})" if rung["best_rate_factor"] is not None else ""
            parts.append(f"the best rate is about {shown(float(rung['best_rate']))}{factor}")
        told.append((f"after {rung['share']:.0%}", "; ".join([*parts, *rung["said"]])))
    return told


def sentence(search: SearchRead) -> str:
    """Where a search that is at work stands."""
    ended = len(search.arms) - len(search.at_work)
    gone = f", {ended} of them ended" if ended else ""
    best = _best(search.arms)
    leads = f" {best.name} has the lowest held-out loss so far, {best.last.loss:.4f}." if best and best.last else ""
    return f"{len(search.arms)} arms{gone}; {search.step:,} of {search.updates:,} updates made.{leads}"


def _best(arms: Sequence[Arm]) -> Arm | None:
    judged = [arm for arm in arms if arm.last is not None]
    latest = max((arm.last.share for arm in judged if arm.last), default=None)
    return min(
        (arm for arm in judged if arm.last and arm.last.share == latest),
        key=lambda arm: arm.last.loss if arm.last else math.inf,
        default=None,
    )

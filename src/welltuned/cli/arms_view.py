"""How a search looks in a terminal: a line an arm while it works, a table of what it found."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from welltuned.advice.settle import duration_words
from welltuned.cli.safe import visible
from welltuned.cli.terminal import console
from welltuned.search.events import ArmAdded, ArmEnded, ArmJudged, ArmUpdated, SearchEvent
from welltuned.training.events import Note

if TYPE_CHECKING:
    from welltuned.search.report import Found

EVERY = 30.0  # seconds between two looks at all arms where there is no terminal


@dataclass(slots=True)
class ArmsShown:
    """A line an arm: live where there is a terminal, else printed now and then. A search's observer.

    `known` are sentences that were shown before.
    """

    known: set[str] = field(default_factory=set)
    names: dict[int, str] = field(default_factory=dict)
    latest: dict[int, ArmUpdated] = field(default_factory=dict)
    judged: dict[int, ArmJudged] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    live: Live | None = None
    _began: float = field(default_factory=time.monotonic)
    _shown: float = field(default_factory=time.monotonic)

    def __call__(self, event: SearchEvent) -> None:
        match event:
            case Note():
                if event.text not in self.known:
                    self.known.add(event.text)
                    self._line(event.text, "dim")
            case ArmAdded():
                self.names[event.arm] = event.name
                if event.why:
                    self._line(f"another arm, {event.name}: {event.why}", "bold")
            case ArmUpdated():
                self.latest[event.arm] = event
                self.tokens += event.tokens
                self._update()
            case ArmJudged():
                self.judged[event.arm] = event
                if not console.is_terminal:  # there the table has it
                    self._line(self._judged(event), "bold")
            case ArmEnded():
                self.ended[event.arm] = event.status
                self._line(f"{self._name(event.arm)} {event.status}: {event.why}", "yellow")

    def _name(self, arm: int) -> str:
        return visible(self.names.get(arm, f"arm {arm}"))

    def _judged(self, event: ArmJudged) -> str:
        return f"{self._name(event.arm)} after {event.step} updates: held-out loss {event.eval_loss:.4f}, {_gap(event)}"

    def _update(self) -> None:
        if console.is_terminal:
            if self.live is None:
                self.live = Live(self._all(), console=console, refresh_per_second=4, transient=True)
                self.live.start()
            self.live.update(self._all())
        elif time.monotonic() - self._shown > EVERY:
            self._shown = time.monotonic()
            console.print(self._all())

    def _all(self) -> Group:
        took = time.monotonic() - self._began
        below = f"  {duration_words(took)}, {self.tokens / max(took, 1e-9):,.0f} tokens/s, all arms together"
        return Group(self._table(), Text(below, style="dim"))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("  arm", no_wrap=True, overflow="ellipsis")
        for name in ("updates", "loss", "held out"):
            table.add_column(name, no_wrap=True, justify="right")
        table.add_column("above the best", no_wrap=True)
        for arm, event in sorted(self.latest.items()):
            judged = self.judged.get(arm)
            ended = self.ended.get(arm)
            table.add_row(
                Text(f"  {self._name(arm)}"),
                f"{event.step}/{event.total_steps}",
                f"{event.loss:.3f}",
                "" if judged is None else f"{judged.eval_loss:.4f}",
                Text(ended or ("" if judged is None else self._now(judged)), style="yellow" if ended else ""),
                style="dim" if ended else "",
            )
        return table

    def _now(self, event: ArmJudged) -> str:
        """Its distance from the best: one that began later may be better at the same share."""
        best = min(other.eval_loss for other in self.judged.values() if other.share == event.share)
        return _gap(event) if event.above_best or event.eval_loss <= best else f"{event.eval_loss - best:+.4f}"

    def _line(self, text: str, style: str) -> None:
        out = self.live.console if self.live is not None else console
        out.print(Padding(Text(visible(text), style=style), (0, 0, 0, 2), expand=False))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def _gap(event: ArmJudged) -> str:
    if not event.above_best:
        return "the best"
    error = "" if event.above_best_se is None else f" ± {event.above_best_se:.4f}"
    return f"{event.above_best:+.4f}{error}"


def print_found(found: "Found") -> None:
    """The table, why arms ended, what it changes, and what it took."""
    from welltuned.search.report import spent, table

    header, *rows = table(found)
    looks = range(1, len(header) - 3)
    # Where there is no room for every look, the last one of each arm; sweep.json and the report have all of them.
    wide = sum(map(len, header)) + 2 * len(header) + max(len(row.name) for row in found.rows) <= console.width
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    shown.add_column(header[0], overflow="fold")
    for name in (*(header[i] for i in looks), *header[-3:-1], "") if wide else ("held-out loss", *header[-3:-1], ""):
        shown.add_column(name, no_wrap=True, justify="left" if name in (header[-3], "") else "right")
    reasons: dict[str, list[str]] = {}
    for cells, row in zip(rows, found.rows, strict=True):
        losses = [cells[i] for i in looks] if wide else [next((c for c in reversed(cells[1:-3]) if c), "")]
        chosen = row.number == found.winner
        shown.add_row(
            *(Text(visible(cell)) for cell in (cells[0], *losses, *cells[-3:-1], "chosen" if chosen else row.status)),
            style="bold green" if chosen else None,
        )
        if row.why:
            reasons.setdefault(row.why, []).append(row.name)
    console.print()
    console.print(shown)
    for why, names in reasons.items():
        console.print(Text(visible(f"{', '.join(names)}: {why}"), style="dim"))
    console.print(f"\n{visible(found.advice)}", style="bold", markup=False)
    console.print(f"{spent(found)}.\n", markup=False)

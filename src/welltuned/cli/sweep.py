"""welltuned sweep: settle on the user's own rows what the advice cannot know."""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table
from rich.text import Text

from welltuned.cli.plan import recipe_of
from welltuned.cli.plan_view import print_plan
from welltuned.cli.report import print_report
from welltuned.cli.safe import visible
from welltuned.cli.terminal import RowsShown, console, quiet_libraries
from welltuned.cli.train import print_json, print_result
from welltuned.search.events import ArmAdded, ArmEnded, ArmJudged, ArmUpdated, SearchEvent
from welltuned.training.events import Note
from welltuned.training.rundir import require_free

if TYPE_CHECKING:
    from welltuned.search.sweep import SweepResult


def run(arguments: argparse.Namespace) -> int:
    recipe, out = recipe_of(arguments), Path(arguments.out)
    require_free(out)
    from welltuned.search.arms import question_of
    from welltuned.search.sweep import sweep  # brings torch: after what can be refused without it
    from welltuned.training.prepare import prepare

    question = question_of(arguments.arms, arguments.over)
    quiet_libraries()
    prepared = prepare(recipe, progress=RowsShown())
    print_plan(prepared.plan)
    shown = ArmsShown(frozenset(prepared.plan.warnings))
    try:
        result = sweep(prepared, question, out, shown)
    finally:
        shown.close()
    return end(result, as_json=arguments.json)


def resume(path: Path, *, accept_changes: bool, as_json: bool) -> int:
    """Go on with a search that was ended."""
    from welltuned.search.sweep import resume_sweep

    quiet_libraries()
    shown = ArmsShown()
    try:
        result = resume_sweep(path, shown, accept_changes=accept_changes)
    finally:
        shown.close()
    return end(result, as_json=as_json)


def end(result: "SweepResult", *, as_json: bool) -> int:
    """The table, what it changes, and the winner's Run."""
    from welltuned.search.report import spent, table

    header, *rows = table(result.found)
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in header:
        shown.add_column(name)
    for row in rows:
        shown.add_row(*(Text(visible(cell)) for cell in row), style="bold green" if row[-1] == "chosen" else None)
    console.print()
    console.print(shown)
    console.print(f"\n{visible(result.found.advice)}", style="bold", markup=False)
    console.print(f"{spent(result.found)}.\n", markup=False)
    print_result(result.run)
    print_report(result.run.path)
    if as_json:
        print_json(result.run.path)
    return 0


@dataclass(slots=True)
class ArmsShown:
    """A line an arm: live where there is a terminal, else printed every few seconds. A search's observer.

    `known` are sentences that were shown before.
    """

    known: frozenset[str] = frozenset()
    names: dict[int, str] = field(default_factory=dict)
    latest: dict[int, ArmUpdated] = field(default_factory=dict)
    judged: dict[int, ArmJudged] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    live: Live | None = None
    _shown: float = field(default_factory=time.monotonic)

    def __call__(self, event: SearchEvent) -> None:
        match event:
            case Note():
                if event.text not in self.known:
                    self._line(f"  {event.text}", "dim")
            case ArmAdded():
                self.names[event.arm] = event.name
                if event.why:
                    self._line(f"  another arm, {event.name}: {event.why}", "bold")
            case ArmUpdated():
                self.latest[event.arm] = event
                self._update()
            case ArmJudged():
                self.judged[event.arm] = event
                self._line(f"  {self._judged(event)}", "bold")
            case ArmEnded():
                self.ended[event.arm] = f"{event.status}: {event.why}"
                self._line(f"  {self.names.get(event.arm, event.arm)} {event.status}: {event.why}", "yellow")

    def _judged(self, event: ArmJudged) -> str:
        gap = f"{event.above_best:+.4f}"
        if event.above_best_se is not None and event.above_best:
            gap += f" ± {event.above_best_se:.4f} from the best"
        name = self.names.get(event.arm, str(event.arm))
        return f"{name} after {event.step} updates: held-out loss {event.eval_loss:.4f} ({gap})"

    def _update(self) -> None:
        if console.is_terminal:
            if self.live is None:
                self.live = Live(self._table(), console=console, refresh_per_second=4, transient=False)
                self.live.start()
            self.live.update(self._table())
        elif time.monotonic() - self._shown > 5:
            self._shown = time.monotonic()
            console.print(self._table())

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for arm, event in sorted(self.latest.items()):
            judged = self.judged.get(arm)
            held_out = "" if judged is None else f"held out {judged.eval_loss:.4f}"
            table.add_row(
                Text(visible(self.names.get(arm, str(arm)))),
                f"{event.step}/{event.total_steps}",
                f"loss {event.loss:.3f}",
                held_out,
                Text(visible(self.ended.get(arm, "")), style="yellow"),
            )
        return table

    def _line(self, text: str, style: str) -> None:
        (self.live.console if self.live is not None else console).print(Text(visible(text), style=style))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

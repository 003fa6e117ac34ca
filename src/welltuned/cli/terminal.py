"""How the progress of a run and its result look in a terminal. Everything goes to stderr; `plan_view` has the plan."""

import json
import logging
import sys
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from welltuned.advice.settle import bytes_words, duration_words
from welltuned.cli.safe import visible
from welltuned.training.events import Compiled, Evaluated, Event, Finding, Note, Severity, Skipped, Updated

# In a file or a pipe rich would fold everything to 80 columns.
console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices out of this command's output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that we do not use


class RowsShown:
    """Shows that rows are being rendered, where it takes long: on a screen every second, in a log every half minute."""

    def __init__(self, out: Console = console) -> None:
        self.out, self.started, self.shown = out, time.monotonic(), time.monotonic()

    def __call__(self, name: str, rows: int) -> None:
        now = time.monotonic()
        if now - self.shown < (1 if self.out.is_terminal else 30):
            return
        self.shown = now
        line = f"  reading {visible(name)}: {rows:,} rows rendered in {duration_words(now - self.started)}"
        self.out.print(line, end="\r" if self.out.is_terminal else "\n", markup=False, soft_wrap=True)


@dataclass(slots=True)
class Progress:
    """A live bar where there is a terminal, a line every few seconds where there is none. An event observer."""

    live: Live | None = None
    last: Updated | None = None
    _shown: float = field(default=0.0)

    def __call__(self, event: Event) -> None:
        match event:
            case Note():
                self._line(Text("  " + visible(event.text), style="dim"))
            case Compiled():
                self._line(Text("  " + visible(event.sentence), style="dim"))
            case Skipped():
                rows = visible(", ".join(event.rows[:5]))
                text = f"! update {event.step} was left out, {visible(event.what)}: {rows}"
                self._line(Text(text, style="bold yellow"))
            case Finding():
                self._finding(event)
            case Evaluated():
                error = f" ± {event.eval_loss_se:.3f}" if event.eval_loss_se == event.eval_loss_se else ""
                what, value = "loss", event.eval_loss
                if "eval_reward" in event.measures:
                    what, value = "reward", event.measures["eval_reward"]
                self._line(Text(f"  held-out {what} after {event.step} updates: {value:.3f}{error}", style="bold"))
            case Updated():
                self.last = event
                if console.is_terminal:
                    self._bar(event)
                elif time.monotonic() - self._shown > 5 or event.step == event.total_steps:
                    self._shown = time.monotonic()
                    console.print(_status(event))
                if event.step == event.total_steps:
                    self.close()

    def _finding(self, finding: Finding) -> None:
        style = _STYLES[finding.severity]
        self._line(Text(f"! {visible(finding.what)}", style=style))
        self._line(Text(f"  {visible(finding.cause)}.", style=style))
        for number, remedy in enumerate(finding.remedies, start=1):
            keys = "  ".join(f"--set {key}={json.dumps(value)}" for key, value in remedy.changes.items())
            line = Text(f"  {number}. {visible(remedy.text)}")
            self._line(line.append(f"  {visible(keys)}" if keys else "", style="cyan"))

    def _line(self, text: Text) -> None:
        (self.live.console if self.live is not None else console).print(text)

    def _bar(self, event: Updated) -> None:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=event.total_steps, completed=event.step, width=30), _status(event))
        if self.live is None:
            self.live = Live(grid, console=console, refresh_per_second=8, transient=False)
            self.live.start()
        self.live.update(grid)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


_STYLES = {Severity.HINT: "dim", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}


def _status(event: Updated) -> Text:
    return Text(
        f"{event.step}/{event.total_steps}  loss {event.loss:.3f}  rate {event.learning_rate:.1e}  "
        f"{event.tokens_per_second:,.0f} tokens/s  {bytes_words(event.memory_bytes)}  "
        f"{duration_words(event.seconds_left)} left"
    )

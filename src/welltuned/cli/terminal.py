"""How things look in a terminal: the plan, the progress of a run, its result. Everything goes to stderr."""

import logging
import os
import sys
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from welltuned.advice.plan import Plan, plan_lines
from welltuned.choice import SetBy
from welltuned.cli.safe import visible
from welltuned.training.events import Evaluated, Event, Note, Updated

# In a file or a pipe rich would fold everything to 80 columns.
console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices out of this command's output."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; the GGUF reader has no other switch
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
        line = f"  reading {visible(name)}: {rows:,} rows rendered in {duration(now - self.started)}"
        self.out.print(line, end="\r" if self.out.is_terminal else "\n", markup=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes as GB or MB (powers of ten)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def print_plan(plan: Plan, out: Console = console) -> None:
    """The plan on one screen: facts, choices with reasons, memory, warnings."""
    model, data, machine = plan.facts.model, plan.facts.dataset, plan.facts.machine
    out.print(
        f"\n[bold]Model[/]    {escape(model.id)} · {escape(model.family)} · {model.parameters / 1e6:,.0f} M parameters"
    )
    out.print(
        f"[bold]Data[/]     {data.rows:,} training rows, {data.heldout_rows:,} held out · {data.tokens:,} tokens, "
        f"{data.supervised_share:.0%} of them trained · lengths {data.length_min}–{data.length_max}, "
        f"median {data.length_median}"
    )
    for part in data.mixture:
        out.print(
            f"         an epoch: {part.rows_of_epoch:,} of {part.rows:,} rows, {part.share:.0%} of the tokens, "
            f"from {escape(part.name)}"
        )
    name = machine.gpu_name or f"{machine.cores} CPU cores"
    out.print(f"[bold]Machine[/]  {escape(name)} · {size(machine.training_memory)} memory free")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("choice", "value", "range"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", ratio=1)
    for line in plan_lines(plan):
        user = plan.choices[line.name].set_by is SetBy.USER
        evidence = f" [{line.evidence}]" if line.evidence else ""
        reason = Text(line.reason).append(evidence, style="dim")
        table.add_row(line.name, Text(line.value, style="cyan" if user else "bold green"), line.span, reason)
    out.print()
    out.print(table)
    parts = ", ".join(f"{name} {size(part)}" for name, part in plan.memory.parts.items() if part >= 1e6)
    out.print(f"\n[bold]Memory[/]   about {size(plan.memory.total_bytes)} ({parts})")
    out.print(f"[bold]Updates[/]  {plan.updates:,} of {plan.value('effective_batch_size')} examples")
    for warning in plan.warnings:
        out.print(Text("! " + visible(warning), style="yellow"))
    out.print()


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
            case Evaluated():
                error = f" ± {event.eval_loss_se:.3f}" if event.eval_loss_se == event.eval_loss_se else ""
                self._line(
                    Text(f"  held-out loss after {event.step} updates: {event.eval_loss:.3f}{error}", style="bold")
                )
            case Updated():
                self.last = event
                if console.is_terminal:
                    self._bar(event)
                elif time.monotonic() - self._shown > 5 or event.step == event.total_steps:
                    self._shown = time.monotonic()
                    console.print(_status(event))
                if event.step == event.total_steps:
                    self.close()

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


def _status(event: Updated) -> Text:
    return Text(
        f"{event.step}/{event.total_steps}  loss {event.loss:.3f}  rate {event.learning_rate:.1e}  "
        f"{event.tokens_per_second:,.0f} tokens/s  {size(event.memory_bytes)}  {duration(event.seconds_left)} left"
    )

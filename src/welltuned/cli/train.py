"""welltuned train."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from welltuned.cli.plan import recipe_of
from welltuned.cli.terminal import Progress, RowsShown, console, duration, print_plan, quiet_libraries, size
from welltuned.training.events import Event, Note
from welltuned.training.rundir import ADAPTER, MODEL, RUN, require_free

if TYPE_CHECKING:
    from welltuned.training.run import RunResult


def run(arguments: argparse.Namespace) -> int:
    recipe, out = recipe_of(arguments), Path(arguments.out)
    require_free(out)
    from welltuned.training.prepare import prepare
    from welltuned.training.run import train  # brings torch: after what can be refused without it

    quiet_libraries()
    prepared = prepare(recipe, progress=RowsShown())
    print_plan(prepared.plan)
    progress = Progress()

    def watch(event: Event) -> None:
        if not (isinstance(event, Note) and event.text in prepared.plan.warnings):  # the plan has just said those
            progress(event)

    try:
        result = train(prepared, out, watch)
    finally:
        progress.close()
    print_result(result)
    if arguments.json:
        print(json.dumps(json.loads((result.path / RUN).read_text(encoding="utf-8")), ensure_ascii=False))
    return 0


def print_result(result: "RunResult") -> None:
    """What the run found, and where its adapter lies."""
    if result.before is not None and result.after is not None:
        console.print(
            f"Held-out loss {result.before.loss:.3f} → [bold]{result.after.loss:.3f}[/] "
            f"(± {result.after.standard_error:.3f}) in {duration(result.seconds)}, "
            f"{result.tokens_per_second:,.0f} tokens/s, peak {size(result.peak_memory)}."
        )
    change = sum(check.change for check in result.checks)
    console.print(
        f"Verified: all {len(result.checks)} trained tensors moved and are finite "
        f"(sum of absolute change {change:,.1f}), and what is on disk equals what was trained."
    )
    folder = result.path / (ADAPTER if (result.path / ADAPTER).is_dir() else MODEL)
    console.print(f"\n[bold]{escape(str(folder))}[/] holds the result. Use it with:")
    print_command(f"welltuned chat {result.path}")
    if folder.name == ADAPTER:
        print_command(f'PeftModel.from_pretrained(base, "{folder}")       # PEFT, and with it TRL')
    else:
        print_command(f'AutoModelForCausalLM.from_pretrained("{folder}")')


def print_command(text: str) -> None:
    """A line to copy: never wrapped, never read as markup."""
    console.print(f"  {text}", markup=False, soft_wrap=True)

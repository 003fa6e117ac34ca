"""welltuned train."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from welltuned.cli.plan import recipe_of
from welltuned.cli.terminal import Progress, console, duration, print_plan, quiet_libraries, size

if TYPE_CHECKING:
    from welltuned.training.run import RunResult


def run(arguments: argparse.Namespace) -> int:
    from welltuned.training.prepare import prepare
    from welltuned.training.run import train
    from welltuned.training.rundir import RUN

    recipe = recipe_of(arguments)
    quiet_libraries()
    prepared = prepare(recipe)
    print_plan(prepared.plan)
    progress = Progress()
    try:
        result = train(prepared, Path(arguments.out), progress)
    finally:
        progress.close()
    print_result(result)
    if arguments.json:
        print(json.dumps(json.loads((result.path / RUN).read_text(encoding="utf-8")), ensure_ascii=False))
    return 0


def print_result(result: "RunResult") -> None:
    """What the run found, and where its adapter lies."""
    from welltuned.training.rundir import ADAPTER, MODEL

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
    console.print(f"\n[bold]{folder}[/] holds the result. Use it with:")
    console.print(f"  welltuned chat {result.path}", markup=False)
    if folder.name == ADAPTER:
        console.print(f'  PeftModel.from_pretrained(base, "{folder}")       # PEFT, and with it TRL', markup=False)
    else:
        console.print(f'  AutoModelForCausalLM.from_pretrained("{folder}")', markup=False)

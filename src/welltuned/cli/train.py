"""welltuned train."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from welltuned.advice.settle import bytes_words, duration_words
from welltuned.cli.plan import recipe_of
from welltuned.cli.plan_view import print_plan
from welltuned.cli.report import print_report
from welltuned.cli.terminal import Progress, RowsShown, console, quiet_libraries
from welltuned.facts.machine import launch
from welltuned.training.events import Event, Note
from welltuned.training.rundir import ADAPTER, MODEL, RUN, require_free

if TYPE_CHECKING:
    from welltuned.training.result import RunResult


def run(arguments: argparse.Namespace) -> int:
    recipe, out = recipe_of(arguments), Path(arguments.out)
    if launch().rank == 0:
        require_free(out)
    from welltuned.training.prepare import prepare
    from welltuned.training.prepare_together import prepare_together
    from welltuned.training.ranks import joined
    from welltuned.training.run import train  # brings torch: after what can be refused without it

    quiet_libraries()
    with joined() as ranks:
        prepared = prepare_together(lambda: prepare(recipe, progress=RowsShown()), ranks)
        if ranks.is_first:
            print_plan(prepared.plan)
        progress = Progress()

        def watch(event: Event) -> None:
            if not (isinstance(event, Note) and event.text in prepared.plan.warnings):  # the plan has just said those
                progress(event)

        try:
            result = train(prepared, out, watch, ranks=ranks)
        finally:
            progress.close()
        if ranks.is_first:
            print_finished(result, as_json=arguments.json)
    return int(result.diverged is not None)


def print_finished(result: "RunResult", *, as_json: bool) -> None:
    """A run's end, with its page."""
    print_result(result)
    print_report(result.path)
    if as_json:
        print_json(result.path)


def print_json(run: Path) -> None:
    """A finished run's summary on stdout."""
    print(json.dumps(json.loads((run / RUN).read_text(encoding="utf-8")), ensure_ascii=False))


def print_result(result: "RunResult") -> None:
    """What the run found, and where its adapter lies."""
    if result.before is not None and result.after is not None:
        what, before, after = "loss", result.before.loss, result.after.loss
        if "eval_reward" in result.after.measures:  # the loss of grpo is minus that
            what, before, after = "reward", -before, -after
        error = result.after.standard_error
        near = f"(± {error:.3f}) " if error == error else ""  # of one row there is none
        console.print(
            f"Held-out {what} {before:.3f} → [bold]{after:.3f}[/] {near}in {duration_words(result.seconds)}, "
            f"{result.tokens_per_second:,.0f} tokens/s, peak {bytes_words(result.peak_memory)}."
        )
        if (share := result.after.measures.get("rewards/accuracies")) is not None:
            margin = result.after.measures["rewards/margins"]
            won = f"The chosen answer wins in [bold]{share:.0%}[/] of the held-out pairs"
            console.print(f"{won}, by {margin:.3f} on average.")
    change = sum(check.change for check in result.checks)
    console.print(
        f"Verified: all {len(result.checks)} trained tensors moved and are finite "
        f"(sum of absolute change {change:,.1f}), and what is on disk equals what was trained."
    )
    folder = result.path / (ADAPTER if (result.path / ADAPTER).is_dir() else MODEL)
    console.print(f"\n[bold]{escape(str(folder))}[/] holds the result. Use it with:")
    scores = any(check.name.startswith("score.") for check in result.checks)  # a reward model's head
    if scores:
        source = "base" if folder.name == ADAPTER else f'"{folder}"'
        print_command(f"AutoModelForSequenceClassification.from_pretrained({source}, num_labels=1)")
    else:
        print_command(f"welltuned chat {result.path}")
    if folder.name == ADAPTER:
        print_command(f'PeftModel.from_pretrained(base, "{folder}")       # PEFT, and with it TRL')
    elif not scores:
        print_command(f'AutoModelForCausalLM.from_pretrained("{folder}")')
    print_divergence(result.diverged)


def print_divergence(diverged: str | None) -> None:
    """That a run failed though it has a result, and why."""
    if diverged is not None:
        text = f"This run diverged; its result is the best weights from before. It {diverged}"
        console.print(f"\n[bold red]{escape(text)}.[/]", soft_wrap=True)


def print_command(text: str) -> None:
    """A line to copy: never wrapped, never read as markup."""
    console.print(f"  {text}", markup=False, soft_wrap=True)

"""welltuned demo: a real model learns a job that it could not do, in minutes, on a laptop's processor."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from welltuned.cli.plan_view import print_plan
from welltuned.cli.report import print_report
from welltuned.cli.terminal import Progress, console, quiet_libraries
from welltuned.cli.train import print_command, print_result
from welltuned.demo_score import score
from welltuned.errors import InputError
from welltuned.models.resolve import DEMO_ALIAS
from welltuned.recipe import load_recipe
from welltuned.training.rundir import require_free

if TYPE_CHECKING:
    from welltuned.training.prepare import Prepared
    from welltuned.training.run import Ready
    from welltuned.training.shown import Score

EXAMPLES = 3
LONGEST_REPLY = 60  # tokens; the longest ticket has 36


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps is not None and arguments.steps < 1:
        raise InputError("must be at least 1", where="--steps")
    out = Path(arguments.out) if arguments.out is not None else _free_folder()
    require_free(out)
    from welltuned.training.prepare import prepare
    from welltuned.training.run import train
    from welltuned.training.shown import keep_scores

    quiet_libraries()
    with as_file(files("welltuned").joinpath("demo_data")) as folder:
        prepared = prepare(load_recipe(None, _recipe(folder, arguments.steps)))
        _introduce(prepared)
        print_plan(prepared.plan)
        before: list[str] = []
        progress = Progress()
        try:
            result = train(
                prepared,
                out,
                progress,
                before_training=lambda ready: before.extend(_ask(ready, prepared)),
            )
        finally:
            progress.close()
    console.print("Asking the tuned model the held-out messages …", style="dim")
    assert result.engine is not None
    after = _answers(result.engine.model, prepared)
    lines = _scores(prepared, before, after)
    keep_scores(out, f"on {len(after)} held-out messages", lines)
    _print_scores(prepared, before, after, lines)
    print_result(result)
    print_report(out)
    print_command(f'welltuned chat {out} --system "{_system(prepared)}" --base')
    return 0


def _free_folder() -> Path:
    """demo-run, or the first of demo-run-2, demo-run-3, ... that does not exist."""
    names = chain(["demo-run"], (f"demo-run-{n}" for n in count(2)))
    return next(path for path in map(Path, names) if not path.exists())


def _recipe(folder: Path, steps: int | None) -> dict[str, object]:
    # One pass keeps the demo short; everything else is the advice's.
    recipe: dict[str, object] = {
        "model": DEMO_ALIAS,
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "heldout.jsonl"),
        "num_train_epochs": 1.0,
    }
    return recipe if steps is None else {**recipe, "max_steps": steps}


def _introduce(prepared: "Prepared") -> None:
    row = prepared.held_out_conversations[0]
    console.print("\n[bold]The job[/]: turn a customer's message into a JSON ticket. No key or value is in the prompt.")
    console.print(Text(f"  message  {row.messages[-2].content}"))
    console.print(Text(f"  ticket   {row.messages[-1].content}"))


def _system(prepared: "Prepared") -> str:
    return prepared.held_out_conversations[0].messages[0].content


def _ask(ready: "Ready", prepared: "Prepared") -> list[str]:
    console.print("Asking the untrained model the held-out messages …", style="dim")
    return _answers(ready.model, prepared)


def _answers(model: object, prepared: "Prepared") -> list[str]:
    from transformers import PreTrainedModel

    from welltuned.data.render import Renderer
    from welltuned.models.generate import Decoding, replies

    assert isinstance(model, PreTrainedModel)
    renderer = Renderer(prepared.tokenizer, chat_template=prepared.chat_template)
    ids = [renderer.prompt(replace(c, messages=c.messages[:-1])) for c in prepared.held_out_conversations]
    return replies(model, prepared.tokenizer, ids, Decoding(max_new_tokens=LONGEST_REPLY, batch_size=28))


def _scores(prepared: "Prepared", before: Sequence[str], after: Sequence[str]) -> list["Score"]:
    from welltuned.training.shown import Score

    expected = [c.messages[-1].content for c in prepared.held_out_conversations]
    first, last = score(before, expected), score(after, expected)
    return [
        Score("replies that are tickets", first.valid, first.valid_se, last.valid, last.valid_se),
        Score("fields right", first.fields, first.fields_se, last.fields, last.fields_se),
        Score("tickets all right", first.exact, first.exact_se, last.exact, last.exact_se),
    ]


def _print_scores(prepared: "Prepared", before: Sequence[str], after: Sequence[str], lines: Sequence["Score"]) -> None:
    expected = [c.messages[-1].content for c in prepared.held_out_conversations]
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    for name in (f"measured on {len(expected)} held-out messages", "before", "after"):
        table.add_column(name)
    for line in lines:
        table.add_row(line.name, f"{line.before:.0%} ± {line.before_se:.0%}", f"{line.after:.0%} ± {line.after_se:.0%}")
    console.print()
    console.print(table)
    for index in range(0, len(expected), max(1, len(expected) // EXAMPLES))[:EXAMPLES]:
        messages = prepared.held_out_conversations[index].messages
        grid = Table.grid(padding=(0, 2), pad_edge=True)
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text, style in (
            ("message", messages[-2].content, ""),
            ("before", " ".join(before[index].split()), "red"),
            ("after", after[index], "green"),
            ("expected", expected[index], "dim"),
        ):
            grid.add_row(name, Text(text, style=style))
        console.print()
        console.print(grid)
    console.print()

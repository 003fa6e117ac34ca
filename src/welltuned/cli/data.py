"""welltuned data: what the data will teach the model, to be seen in ten seconds."""

import argparse
import json
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from welltuned.cli.row_view import legend, row_table
from welltuned.cli.safe import json_text, visible
from welltuned.cli.terminal import RowsShown, console, quiet_libraries
from welltuned.data.audit import Severity
from welltuned.data.show import Lengths
from welltuned.errors import InputError
from welltuned.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from welltuned.training.inspection import Inspection, Shown

MOST_TOKENS = 400  # shown of a row: what is longer is shortened in its middle
BAR = 40  # characters
MARKS = {Severity.ERROR: ("✗", "bold red"), Severity.WARNING: ("!", "yellow"), Severity.NOTE: ("·", "dim")}


def run(arguments: argparse.Namespace) -> int:
    if arguments.show < 0:
        raise InputError("must be 0 or more", where="--show")
    recipe = _recipe(arguments)
    from welltuned.training.inspection import inspect

    quiet_libraries()
    found = inspect(recipe, show=arguments.show, rows=arguments.row, progress=RowsShown())
    if arguments.json:
        print(json_text(json.dumps(found.to_json(), ensure_ascii=False)))
    else:
        print_inspection(found)
    return 1 if found.blocked else 0


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """Files are data, but for a recipe, which ends as YAML does."""
    recipes = [name for name in arguments.data if name.lower().endswith((".yaml", ".yml"))]
    if len(recipes) > 1:
        raise InputError("is a second recipe", where=recipes[1], mend="give one")
    names = ("model", "eval_data", "map", "subset", "split")
    options = {name: vars(arguments)[name] for name in names}
    options["data"] = [name for name in arguments.data if name not in recipes] or None
    return load_recipe(recipes[0] if recipes else None, options, arguments.sets)


def print_inspection(found: "Inspection") -> None:
    """Everything on one screen or two: counts, lengths, findings, rows."""
    _print_counts(found)
    _print_lengths(found)
    _print_findings(found)
    colour = console.color_system is not None and not console.no_color
    if found.examples:
        console.print("\n[bold]Rows[/]     ", legend(colour), sep="")
    for shown in found.examples:
        _print_row(found, shown, colour)
    for origin, why in found.bad:
        console.print(Text(f"\n{visible(origin)} cannot be read: {visible(why)}", style="bold red"))
    console.print()
    if found.blocked:
        console.print(Text("Training would refuse these data, for what is marked ✗ above.", style="bold red"))


def _print_counts(found: "Inspection") -> None:
    audit = found.audit
    console.print(Text.assemble(("\nData     ", "bold"), visible(found.formats)))
    for note in found.notes:
        _indented(Text(visible(note), style="dim"))
    console.print(f"[bold]Rows[/]     {audit.rows:,} training rows, {audit.held_out_rows:,} held out")
    text = f"{audit.tokens:,} in the training rows, {audit.supervised_tokens:,} of them ({audit.share:.0%}) are trained"
    console.print(f"[bold]Tokens[/]   {text}")
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    table.add_column("speaker")
    for name in ("tokens", "trained", "share"):
        table.add_column(name, justify="right")
    for speaker, share in audit.speakers.items():
        if share.tokens:
            part = f"{share.trained / share.tokens:.0%}"
            style = "green" if share.trained else "dim"
            table.add_row(speaker.name.lower(), f"{share.tokens:,}", f"{share.trained:,}", part, style=style)
    _indented(table)


def _print_lengths(found: "Inspection") -> None:
    lengths, limit = found.lengths, found.max_length
    console.print(
        f"[bold]Lengths[/]  {lengths.min:,} to {lengths.max:,} tokens, half of the rows up to {lengths.p50:,}, "
        f"95 % up to {lengths.p95:,}"
    )
    _indented(_histogram(lengths, None if limit is None else limit.value))
    if limit is not None:
        cut = found.audit.cut
        does = "cuts nothing" if cut is None else f"cuts {cut.rows:,}, {cut.lose:,} of which lose trained tokens"
        _indented(Text(f"max_length {limit.value:,} {does} (set by the {limit.set_by})"))


def _histogram(lengths: Lengths, limit: int | None) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    most = max(b.rows for b in lengths.histogram)
    for each in lengths.histogram:
        eighths = -(-each.rows * BAR * 8 // most)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        longest = each.last if limit is None else limit
        cut = each.last > longest and each.rows > 0
        label = f"{each.first:,}–{each.last:,}" if each.first < each.last else f"{each.first:,}"
        rows = Text(f"{each.rows:,}").append(" longer than max_length" if cut and each.first > longest else "")
        table.add_row(label, Text(bar, style="red" if cut else "cyan"), rows)
    return table


def _print_findings(found: "Inspection") -> None:
    problems = found.audit.problems()
    ends = f"every whole answer ends with a trained end token in {found.audit.end_trained:,} of {found.audit.rows:,}"
    console.print(Text.assemble(("Findings ", "bold"), f"{ends} rows" + ("" if problems else "; no defect was found")))
    for problem in problems:
        mark, style = MARKS[problem.severity]
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text(mark, style=style), Text(visible(problem.sentence), style=style))
        _indented(grid)


def _print_row(found: "Inspection", shown: "Shown", colour: bool) -> None:
    example = shown.example
    tokens, trained = len(example.ids), int(example.mask.sum())
    title = Text.assemble(
        "\n", (visible(example.origin), "bold"), f", {shown.why}: {tokens:,} tokens, {trained:,} trained"
    )
    if shown.length > tokens:
        title.append(f", cut from {shown.length:,}", "red")
    if example.found:
        title.append(f" [{', '.join(sorted(example.found))}]", "yellow")
    console.print(title, soft_wrap=True)
    console.print(row_table(found.text_of(shown, MOST_TOKENS), colour))


def _indented(what: Text | Table) -> None:
    grid = Table.grid(padding=(0, 0))
    grid.add_column(width=9)
    grid.add_column()
    grid.add_row("", what)
    console.print(grid)

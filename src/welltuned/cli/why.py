"""welltuned why: the rule behind a hyperparameter, what speaks for it and against it, and what it gives here."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from welltuned.advice.evidence import Grade, Row, row
from welltuned.advice.page import about, scope
from welltuned.advice.settle import shown
from welltuned.advice.why import (
    TABLE,
    UPDATES,
    Against,
    Converted,
    Entry,
    all_keys_json,
    converted,
    entries,
    factors,
    here,
    rate_table,
    to_json,
    why,
)
from welltuned.choice import SetBy
from welltuned.cli.plan import recipe_of
from welltuned.cli.safe import json_text
from welltuned.cli.terminal import console, quiet_libraries
from welltuned.errors import InputError
from welltuned.recipe import HYPERPARAMETERS, Method, Tune

if TYPE_CHECKING:
    from welltuned.advice.plan import Plan

MOST_ROWS = 10  # of those for a rule; the others are named
GRADES = {
    Grade.MEASURED: "measured",
    Grade.RECIPE: "recipe",
    Grade.VENDOR: "vendor",
    Grade.THEORY: "theory",
    Grade.DERIVED: "derived",
    Grade.FOLKLORE: "folklore",
}


def run(arguments: argparse.Namespace) -> int:
    key = arguments.key
    if key is None:
        if arguments.json:
            print(json.dumps(all_keys_json(), ensure_ascii=False))
        else:
            print_keys()
        return 0
    method = None if arguments.method is None else Method(arguments.method)
    tune = None if arguments.tune is None else Tune(arguments.tune)
    why(key, method, tune)  # an unknown key is said before anything is read
    plan = _plan(arguments)
    if plan is not None:
        method, tune = plan.recipe.method, plan.recipe.tune
    found = why(key, method, tune)
    if arguments.json:
        print(json_text(json.dumps(to_json(found, plan), ensure_ascii=False)))
        return 0
    print_why(found, plan)
    return 0


def _plan(arguments: argparse.Namespace) -> "Plan | None":
    """The plan of the run that the options describe; None where they describe none."""
    if not (arguments.recipe or arguments.model or arguments.data):
        if arguments.sets:
            raise InputError("has no meaning without a model and data", where="--set", mend="add --model and --data")
        return None
    recipe = recipe_of(arguments)
    from welltuned.training.prepare import prepare

    quiet_libraries()
    return prepare(recipe, weights_needed=False).plan


def print_keys() -> None:
    """Every key, a line for each of its rules."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1)
    for key, found in entries().items():
        for entry in found:
            table.add_row(key if entry is found[0] else "", scope(entry), Text(entry.short))
    console.print(table)
    console.print(Text("\n`welltuned why KEY` says what speaks for and against it.", style="dim"))


def print_why(found: Sequence[Entry], plan: "Plan | None" = None) -> None:
    """What a key is here, its rule, rows, what would settle it; of several rules the usual one, the others named."""
    key = found[0].key
    doc = HYPERPARAMETERS[key].doc if key in HYPERPARAMETERS else ""
    console.print(Text.assemble((f"\n{key}", "bold"), f"  {doc}"))
    if plan is not None:
        _print_here(key, plan)
    usual = [entry for entry in found if entry.speaks_of(Method.SFT, Tune.LORA)]
    told = usual or [entry for entry in found if Method.SFT in entry.methods] or list(found)
    for entry in told:
        _print_entry(entry)
    if key == "learning_rate" and any(Method.SFT in entry.methods for entry in told):
        _print_table()
    for entry in found:
        if entry not in told:
            _field(scope(entry), Text(entry.short))
    if len(told) < len(found):
        console.print(Text("           more of those: add --method or --tune", style="dim"))
    console.print()


def _field(name: str, text: Text) -> None:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=10, style="bold", no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_row(name, text)
    console.print(grid)


def _print_here(key: str, plan: "Plan") -> None:
    choice = here(key, plan)
    span = "" if choice.low is None else f" ({shown(choice.low)}–{shown(choice.high)})"
    style = "cyan" if choice.set_by is SetBy.USER else "bold green"
    _field("Here", Text.assemble((shown(choice.value), style), f"{span}: {choice.reason}"))
    if key == "learning_rate":
        for what, factor in factors(plan):
            first = what == factors(plan)[0][0]
            _field(
                "", Text(f"{'' if first else '× '}{shown(factor) if first else f'{factor:.2f}'}  {what}", style="dim")
            )


def _print_entry(entry: Entry) -> None:
    if scope(entry):
        console.print(Text(f"\n{scope(entry)}", style="bold"))
    _field("Rule", Text(entry.rule))
    shown_first = entry.lead[:MOST_ROWS]
    for number, id in enumerate(shown_first):
        _field("" if number else "For", _row(row(id)))
    more = [id for id in entry.evidence if id not in shown_first]
    if more:
        _field("", Text(f"and {' '.join(more)}", style="dim"))
    compared = [(against, converted(entry, against)) for against in entry.against]
    differing = [pair for pair in compared if pair[1] is None or not pair[1].agrees]
    agreeing = [pair for pair in compared if pair[1] is not None and pair[1].agrees]
    for name, pairs in (("Against", differing), ("Alike", agreeing)):
        for number, (against, there) in enumerate(pairs):
            _field("" if number else name, _row(against.row))
            _field("", _against(against, there))
    if not entry.against:
        _field("Against", Text("no row says otherwise", style="dim"))
    _field("To settle", Text(entry.settle))


def _row(found: Row) -> Text:
    """One line, cut where the terminal ends."""
    grades = "+".join(words for grade, words in GRADES.items() if grade in found.grades)
    head = (f"{found.id} {grades}  ", "dim")
    text = Text.assemble(head, f"{about(found)}: {found.value}", (f"  {found.source}", "dim"))
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _against(against: Against, there: Converted | None) -> Text:
    text = Text.assemble((f"{', '.join(against.because)}: ", "yellow"), against.says)
    return text if there is None else text.append(f"; {there.sentence()}")


def _print_table() -> None:
    setting = f"{TABLE.family}, r {TABLE.r}, alpha {shown(TABLE.alpha)}, batches of {TABLE.batch}"
    console.print(Text.assemble(("\nThe law", "bold"), f"   supervised, {setting}; columns are updates"))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    table.add_column("")
    for tune in ("LoRA", "full"):
        for updates in UPDATES:
            table.add_column(f"{tune} {updates:,}", justify="right")
    for line in rate_table():
        table.add_row(line.size, *(shown(rate) for rate in (*line.lora, *line.full)))
    console.print(table)
    console.print(Text("Above 135M short runs are extrapolated, and their ranges are wide.\n", style="dim"))

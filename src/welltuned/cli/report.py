"""welltuned report: the page of a run."""

import argparse
import json
from pathlib import Path

from rich.markup import escape

from welltuned.cli.terminal import console
from welltuned.models.tokenizer import in_short
from welltuned.report.page import write_report


def run(arguments: argparse.Namespace) -> int:
    out = None if arguments.out is None else Path(arguments.out)
    path = write_report(Path(arguments.run), [Path(other) for other in arguments.others], out)
    print_where(path)
    if arguments.json:
        print(json.dumps({"report": str(path)}))
    return 0


def print_report(run: Path) -> None:
    """Write a run's page and say where; the run is what counts, so a page that cannot be written is only said."""
    try:
        print_where(write_report(run))
    except Exception as error:
        text = f"There is no report ({in_short(error)}); once more: welltuned report {run}"
        console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)


def print_where(path: Path) -> None:
    console.print(f"[bold]{escape(str(path))}[/] shows all of it: open it in a browser.", soft_wrap=True)

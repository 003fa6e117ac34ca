"""welltuned resume: go on with a run that was interrupted."""

import argparse
from pathlib import Path

from rich.markup import escape

from welltuned.cli.report import print_report
from welltuned.cli.terminal import Progress, console, quiet_libraries
from welltuned.cli.train import print_command, print_divergence, print_json, print_result
from welltuned.training.rundir import SWEEP, is_finished, read_run


def run(arguments: argparse.Namespace) -> int:
    path, code = Path(arguments.run), 0
    if is_finished(path):  # not an error: a script may ask again and again until the run is done
        console.print(f"[bold]{escape(str(path))}[/] is finished. Use it with:")
        print_command(f"welltuned chat {path}")
        diverged = read_run(path).get("diverged")
        print_divergence(diverged)
        code = int(diverged is not None)
    elif (path / SWEEP).is_file():
        from welltuned.cli.sweep import resume as resume_sweep

        return resume_sweep(path, accept_changes=arguments.accept_changes, as_json=arguments.json)
    else:
        from welltuned.training.resume import resume  # brings torch

        quiet_libraries()
        progress = Progress()
        try:
            result = resume(path, progress, accept_changes=arguments.accept_changes)
        finally:
            progress.close()
        print_result(result)
        print_report(result.path)
        code = int(result.diverged is not None)
    if arguments.json:
        print_json(path)
    return code

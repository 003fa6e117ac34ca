"""welltuned resume: go on with a run that was interrupted."""

import argparse
from pathlib import Path

from rich.markup import escape

from welltuned.cli.terminal import Progress, console, quiet_libraries
from welltuned.cli.train import print_command, print_divergence, print_finished, print_json
from welltuned.facts.machine import launch
from welltuned.training.rundir import SWEEP, is_finished, read_run


def run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.run)
    if is_finished(path) and launch().size == 1:  # before torch is imported
        return _finished(path, as_json=arguments.json)
    if (path / SWEEP).is_file():
        from welltuned.cli.sweep import resume as resume_sweep

        return resume_sweep(path, accept_changes=arguments.accept_changes, as_json=arguments.json)
    from welltuned.training.ranks import joined
    from welltuned.training.resume import resume  # brings torch

    quiet_libraries()
    progress = Progress()
    with joined() as ranks:
        if ranks.first(lambda: is_finished(path)):
            return _finished(path, as_json=arguments.json) if ranks.is_first else 0
        try:
            result = resume(path, progress, accept_changes=arguments.accept_changes, ranks=ranks)
        finally:
            progress.close()
        if ranks.is_first:
            print_finished(result, as_json=arguments.json)
    return int(result.diverged is not None)


def _finished(path: Path, *, as_json: bool) -> int:
    """Not an error: a script may ask again and again until the run is done."""
    console.print(f"[bold]{escape(str(path))}[/] is finished. Use it with:")
    print_command(f"welltuned chat {path}")
    diverged = read_run(path).get("diverged")
    print_divergence(diverged)
    if as_json:
        print_json(path)
    return int(diverged is not None)

"""welltuned eval."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from welltuned.cli.report import print_report
from welltuned.cli.safe import json_text, visible
from welltuned.cli.terminal import console, quiet_libraries
from welltuned.errors import InputError

if TYPE_CHECKING:
    from welltuned.finished.find import Finished
    from welltuned.finished.judge import Judged, Judgement
    from welltuned.finished.scores import Metric


def run(arguments: argparse.Namespace) -> int:
    if (arguments.run is None) == (arguments.model is None):
        raise InputError("give a run or a model", where="welltuned eval", mend="RUN, or --model M --data D")
    if arguments.model is not None and arguments.data is None and arguments.tasks is None:
        raise InputError("a model by itself has no held-out rows", where="--model", mend="give --data FILE")
    if arguments.harness and arguments.tasks is None:
        raise InputError("belongs to --tasks", where="--harness", mend="add --tasks, or leave it out")
    from welltuned.finished.find import find

    quiet_libraries()
    finished = find(arguments.run if arguments.run is not None else arguments.model)
    if arguments.tasks is not None:
        return _harness(arguments, finished)
    from welltuned.finished.judge import judge_run, to_json
    from welltuned.training.rundir import finite

    place = finished.path if arguments.out is None and finished.is_run else arguments.out
    found = judge_run(
        finished,
        data=arguments.data,
        metrics=_metrics(arguments.metrics),
        count=arguments.rows,
        max_new_tokens=arguments.max_new_tokens,
        watch=lambda text: console.print(Text(visible(text) + " …", style="dim")),
    )
    print_judgement(found)
    document = finite(to_json(found))
    if place is not None:
        document["kept"] = _keep(Path(place), document)
    if arguments.json:
        print(json_text(json.dumps(document, ensure_ascii=False, allow_nan=False)))
    return 0


def _keep(place: Path, document: Mapping[str, Any]) -> str | None:
    """Write what was found, and the page that shows it; None where it cannot be written, which is said."""
    from welltuned.finished.kept import keep

    try:
        path = keep(place, document)
    except OSError as error:
        console.print(Text(f"It is not kept: {error.filename} cannot be written ({error.strerror})", style="yellow"))
        return None
    console.print(Text(f"Kept in {path}.", style="dim"), soft_wrap=True)
    print_report(place)
    return str(path)


def _metrics(text: str | None) -> "list[Metric]":
    from welltuned.finished.scores import Metric

    names = [part.strip() for part in text.split(",") if part.strip()] if text else []
    known = {str(metric).lower(): metric for metric in Metric}
    for name in names:
        if name.lower() not in known:
            mend = f"known are {', '.join(str(metric) for metric in Metric)}"
            raise InputError(f"there is no metric '{name}'", where="--metrics", mend=mend)
    return [known[name.lower()] for name in names]


def _harness(arguments: argparse.Namespace, finished: "Finished") -> int:
    from welltuned.finished.harness import command, run_harness

    for option in ("data", "metrics", "rows"):
        if getattr(arguments, option) is not None:
            mend = "leave one of them out"
            raise InputError("is ours, and --tasks is the harness's", where=f"--{option}", mend=mend)
    out = None if arguments.out is None else Path(arguments.out)
    line = command(finished, arguments.tasks, out=out, more=arguments.harness)
    console.print(Text("  " + visible(" ".join(line)), style="dim"), soft_wrap=True)
    run_harness(line)
    if arguments.json:
        print(json.dumps({"command": line, "out": arguments.out}))
    return 0


def print_judgement(found: "Judgement") -> None:
    """The base and the tuned model side by side, and the difference."""
    from welltuned.finished.scores import MEANING

    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    models = ("base", "tuned", "difference") if found.base is not None else ("model",)
    for name in (f"{found.count:,} rows: {visible(found.rows)}", *models):
        table.add_column(name)

    def row(name: str, base: str | None, tuned: str, gap: str) -> None:
        table.add_row(name, *((base or "", tuned, gap) if found.base is not None else (tuned,)))

    def loss(judged: "Judged") -> str:
        return _near(judged.loss.loss, judged.loss.standard_error, 3)

    gap = found.loss_difference
    row(
        "loss",
        None if found.base is None else loss(found.base),
        loss(found.tuned),
        "" if gap is None else _near(gap.value, gap.error, 3, signed=True),
    )
    row(
        "perplexity",
        None if found.base is None else f"{found.base.perplexity:.2f}",
        f"{found.tuned.perplexity:.2f}",
        "",
    )
    for index, score in enumerate(found.tuned.scores):
        base = found.base.scores[index] if found.base is not None else None
        value, error = found.differences[index] if base is not None else (0.0, 0.0)
        shown = None if base is None else _share(base.value, base.error)
        row(str(score.metric), shown, _share(score.value, score.error), _share(value, error, signed=True))
    console.print(table)
    for score in found.tuned.scores:
        left = f"; {score.left_out} rows whose answers have none are left out" if score.left_out else ""
        console.print(Text(f"{score.metric}: {MEANING[score.metric]}{left}", style="dim"), soft_wrap=True)


def _near(value: float, error: float, digits: int, *, signed: bool = False) -> str:
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text if error != error else f"{text} ± {error:.{digits}f}"


def _share(value: float, error: float, *, signed: bool = False) -> str:
    text = f"{value:+.1%}" if signed else f"{value:.1%}"
    return text if error != error else f"{text} ± {error:.1%}"

"""The page of one Run, or of several laid over each other: one HTML file that needs nothing else.

Everything that a file, a name or a model says is escaped by the template engine; numbers for the curves travel as JSON
in a block that no text can end.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from welltuned.advice.settle import bytes_words
from welltuned.errors import InputError
from welltuned.report import arms, parts
from welltuned.report.arms import SearchRead
from welltuned.report.curves import curves
from welltuned.report.evaluations import read_evaluations
from welltuned.report.next import next_steps
from welltuned.report.read import RunRead, read_run_folder
from welltuned.report.table import MOST_POINTS
from welltuned.report.verdict import verdict
from welltuned.training import durable
from welltuned.training.rundir import EVALUATIONS, PLAN

REPORT = "report.html"


def write_report(run: Path, others: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Write the page of a Run, with the curves of others laid over its own, or of a folder of evaluations; where it is.

    Raises:
        InputError: one of the folders is no Run, or the page cannot be written.
    """
    target = run / REPORT if out is None else out
    if (run / EVALUATIONS).is_dir() and not (run / PLAN).is_file() and not others:
        text = evaluations_page(run)
    else:
        text = page(read_run_folder(run), [read_run_folder(other) for other in others])
    try:
        durable.replace_file(target, text)
    except OSError as error:
        what = f"the report cannot be written ({error.strerror})"
        raise InputError(what, where=str(target), mend="give another --out") from error
    return target


def page(run: RunRead, others: Sequence[RunRead] = (), *, events: str = "", key: str = "", name: str = "") -> str:
    """The page as HTML.

    Args:
        events: where a page that is served hears of what is new; empty for one that opens from disk.
        key: what its requests carry, where it may stop a run, go on with it and ask it; else empty.
        name: the run's on the server.
    """
    runs = (run, *others)
    audit = (run.summary or {}).get("audit") or {}
    return rendered(
        "page.html",
        run=run,
        others=others,
        compared=parts.compared(runs) if others else None,
        verdict=verdict(run),
        tiles=parts.tiles(run),
        facts=parts.facts(run.plan),
        choices=parts.choices_of(run.plan),
        memory=parts.memory_of(run),
        audit=audit,
        defects=parts.defects(audit),
        shown=run.shown,
        samples=parts.sampled(run),
        measurements=parts.measurements(run),
        search=None if run.search is None else _search(run.search),
        evaluations=run.evaluations,
        next_steps=next_steps(run),
        provenance=parts.provenance(run),
        events=events,
        key=key,
        name=name,
        data=embedded([curves(one, MOST_POINTS // len(runs)) for one in runs]),
        lengths=embedded((run.shown["lengths"] or {}).get("histogram", [])),
        charts=asset("uPlot.iife.min.js"),
        style=asset("uPlot.min.css") + asset("page.css"),
        script="".join(map(asset, ("charts.js", "arms.js", "page.js", *(("live.js",) if events else ())))),
        licence=asset("uPlot.LICENSE"),
    )


def _search(search: SearchRead) -> dict[str, Any]:
    """A search as the template takes it."""
    trained = arms.tokens(search)
    most = max((count for _, count, _ in trained), default=1)
    return {
        "read": search,
        "rows": arms.rows(search),
        "tokens": [{"name": name, "count": n, "share": n / most, "said": said} for name, n, said in trained],
        "rungs": arms.rungs(search),
    }


def evaluations_page(folder: Path) -> str:
    """The page of evaluations that belong to no Run.

    Raises:
        InputError: there is none, or one is damaged.
    """
    found = read_evaluations(folder)
    if not found:
        raise InputError("there is no evaluation", where=str(folder / EVALUATIONS), mend="give the folder of a run")
    return rendered("evaluated.html", folder=folder.resolve().name, evaluations=found, style=asset("page.css"))


def listing(runs: Sequence[Mapping[str, Any]], folder: Path, *, start: bool = False) -> str:
    """The page that lists Runs, each a mapping as live.Shelf gives it.

    Args:
        start: whether runs may be started from it.
    """
    values = {"runs": runs, "folder": str(folder), "start": start}
    return rendered("list.html", **values, style=asset("page.css"), script=asset("list.js"))


def embedded(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or begin a comment.

    >>> embedded("</script>")
    '"\\\\u003c/script>"'
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def rendered(template: str, /, **values: Any) -> str:
    """One of our templates, everything in it escaped."""
    return _environment().get_template(template).render(theme=asset("theme.js"), **values)


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(asset),
    )
    environment.filters["bytes"] = bytes_words
    environment.filters["rewards"] = parts.rewards_of
    return environment


def asset(name: str) -> str:
    return files("welltuned.report").joinpath("assets", name).read_text(encoding="utf-8")

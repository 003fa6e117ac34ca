"""The page of one Run, or of several laid over each other: one HTML file that needs nothing else.

Everything that a file, a name or a model says is escaped by the template engine; numbers for the curves travel as JSON
in a block that no text can end.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from welltuned.advice import evidence
from welltuned.advice.describe import data_line, machine_line, model_line
from welltuned.advice.plan import Plan, plan_lines
from welltuned.advice.settle import bytes_words, duration_words
from welltuned.choice import SetBy
from welltuned.errors import InputError
from welltuned.report.curves import curves
from welltuned.report.next import next_steps
from welltuned.report.read import RunRead, read_run_folder
from welltuned.report.verdict import held_out, verdict
from welltuned.search import report as searched
from welltuned.training import durable

REPORT = "report.html"
SAMPLES_SHOWN = 6


def write_report(run: Path, others: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Write the page of a Run, with the curves of others laid over its own; where it lies.

    Raises:
        InputError: one of the folders is no Run, or the page cannot be written.
    """
    target = run / REPORT if out is None else out
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
    drawn = [curves(one) for one in (run, *others)]
    return rendered(
        "page.html",
        run=run,
        verdict=verdict(run),
        held_out=held_out(run),
        summary=run.summary or {},
        tiles=tiles(run),
        facts=_facts(run.plan),
        choices=_choices(run.plan),
        memory=_memory(run),
        search=_search(run),
        audit=(run.summary or {}).get("audit") or {},
        defects=defects((run.summary or {}).get("audit") or {}),
        shown=run.shown,
        samples=list(run.samples)[-SAMPLES_SHOWN:],
        next_steps=next_steps(run),
        provenance=provenance(run),
        events=events,
        key=key,
        name=name,
        data=embedded(drawn),
        lengths=embedded((run.shown["lengths"] or {}).get("histogram", [])),
        style=asset("page.css") + asset("uPlot.min.css"),
        charts=asset("uPlot.iife.min.js"),
        script=asset("page.js"),
        licence=asset("uPlot.LICENSE"),
    )


def _search(run: RunRead) -> dict[str, Any] | None:
    """What a search compared before this became its result, drawn again from the numbers; None for any other run."""
    plain = (run.summary or {}).get("sweep")
    try:
        found = None if plain is None else searched.from_json(plain)
    except (KeyError, TypeError, ValueError):  # a file that somebody changed
        found = None
    if found is None:
        return None
    header, *rows = searched.table(found)
    plot = Markup(searched.plot(found))  # numbers, and names that it escapes
    return {"header": header, "rows": rows, "plot": plot, "advice": found.advice, "spent": searched.spent(found)}


def embedded(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or begin a comment.

    >>> embedded("</script>")
    '"\\\\u003c/script>"'
    """
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["bytes"] = bytes_words
    return environment


def listing(runs: Sequence[Mapping[str, Any]], folder: Path, *, start: bool = False) -> str:
    """The page that lists Runs, each a mapping as live.Shelf gives it.

    Args:
        start: whether runs may be started from it.
    """
    return rendered(
        "list.html", runs=runs, folder=str(folder), start=start, style=asset("page.css"), script=asset("list.js")
    )


def rendered(template: str, /, **values: Any) -> str:
    """One of our templates, everything in it escaped."""
    return _environment().from_string(asset(template)).render(**values)


def asset(name: str) -> str:
    return files("welltuned.report").joinpath("assets", name).read_text(encoding="utf-8")


def tiles(run: RunRead) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value, what is said beneath."""
    found, summary, plan = [], run.summary or {}, run.plan
    tokens, supervised = (int(np.nansum(run.log.updates.column(name))) for name in ("tokens", "supervised_tokens"))
    found.append(("updates", f"{len(run.log.updates):,}", f"of {plan.updates:,} planned"))
    found.append(("tokens", f"{tokens:,}", f"{supervised:,} of them trained"))
    if (seconds := summary.get("seconds")) is not None:
        found.append(("time", duration_words(seconds), f"{summary['tokens_per_second']:,.0f} tokens/s"))
    peak = summary.get("peak_memory_bytes")
    if peak is not None:
        found.append(("peak memory", bytes_words(peak), f"forecast {bytes_words(plan.memory.total_bytes)}"))
    checks = summary.get("trained_tensors") or []
    if checks:
        found.append(("verified", f"{len(checks):,} tensors", "moved, finite, and on disk as trained"))
    return found


def _facts(plan: Plan) -> list[tuple[str, str]]:
    facts = plan.facts
    return [
        ("Model", model_line(facts.model)),
        ("Data", data_line(facts.dataset)),
        ("Machine", machine_line(facts.machine)),
    ]


def _choices(plan: Plan) -> list[dict[str, Any]]:
    known = evidence.rows()
    return [
        {
            "name": line.name,
            "value": line.value,
            "span": line.span,
            "reason": line.reason,
            "by_user": plan.choices[line.name].set_by is SetBy.USER,
            "evidence": [known[i] for i in plan.choices[line.name].evidence if i in known],
        }
        for line in plan_lines(plan)
    ]


def _memory(run: RunRead) -> dict[str, Any]:
    """Forecast by part, largest first, and what was measured; shares are of the larger of the two."""
    memory, peak = run.plan.memory, (run.summary or {}).get("peak_memory_bytes")
    whole = max(memory.total_bytes, peak or 0, 1)
    parts = sorted(memory.parts.items(), key=lambda item: -item[1])
    return {
        "total": memory.total_bytes,
        "limit": memory.limit_bytes,
        "peak": peak,
        "peak_share": (peak or 0) / whole,
        "parts": [{"name": name, "bytes": size, "share": size / whole} for name, size in parts if size],
    }


def defects(audit: Mapping[str, Any]) -> list[str]:
    """The kinds of defect that the data had, in a sentence each, and how many kinds were looked for in vain."""
    found = audit.get("found") or {}
    told = []
    for name, one in found.items():
        if one["rows"]:
            left = f", {one['dropped']:,} left out" if one["dropped"] else ""
            names = [name if isinstance(name, str) else " and ".join(name) for name in one["origins"][:5]]
            where = f" ({', '.join(names)})" if names else ""
            told.append(
                f"{name.replace('_', ' ')}: {one['rows']:,} of {one['of']:,} rows, policy {one['policy']}{left}{where}"
            )
    clean = sum(not one["rows"] for one in found.values())
    return (
        [*told, f"{clean} other kinds of defect were looked for and not found"]
        if told
        else ([f"All {clean} kinds of defect were looked for, and none was found"] if clean else [])
    )


def provenance(run: RunRead) -> list[tuple[str, Mapping[str, Any]]]:
    """What makes the run repeatable: groups of names and values."""
    started, summary = run.started, run.summary or {}
    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("run", {"id": started.get("run", ""), "folder": str(run.path), "seed": run.plan.value("seed")}),
        ("versions", started.get("versions") or {}),
    ]
    hashed = {k: v for k, v in (started.get("identity") or {}).items() if k not in ("recipe", "plan")}
    identity = {name: _plain(value) for name, value in hashed.items()}
    groups.append(("hashes", identity))
    base = summary.get("base_weights") or {}
    if base:
        groups.append(("base weights", {name: _plain(value) for name, value in base.items()}))
    return [(name, values) for name, values in groups if values]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

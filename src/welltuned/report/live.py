"""Runs served: a list of those beneath a folder, and each one's page, which follows the run while it trains.

Nothing here writes: what may be started from a page is control's. A request must name this server's own host (other
sites' pages cannot reach it through a name of theirs), and carries a token where other machines can reach the server.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from welltuned.advice.settle import duration_words
from welltuned.errors import InputError
from welltuned.recipe import Method
from welltuned.report.curves import curves
from welltuned.report.log import Log
from welltuned.report.page import listing, page
from welltuned.report.parts import tiles
from welltuned.report.read import RunRead, read_run_folder
from welltuned.report.verdict import held_out, verdict
from welltuned.training.events import Severity
from welltuned.training.lock import at_work
from welltuned.training.rundir import METRICS, PLAN

if TYPE_CHECKING:
    from welltuned.report.control import Control

DEEPEST = 4  # folders below the one that is served
EVERY = 1.0  # seconds between looks at a run that trains
LOG_SHOWN = 60
PACE = 20  # updates by which the rest is judged
COOKIE = "welltuned"


@dataclass(slots=True)
class Shelf:
    """The Runs beneath a folder, each with what was read of its metrics so far."""

    folder: Path
    _logs: dict[Path, tuple[Log, Lock]] = field(default_factory=dict)  # however many browsers look, one reads a log

    def runs(self) -> dict[str, Path]:
        """By name, which is the path below the folder; the folder itself may be a Run."""
        found: dict[str, Path] = {}
        waiting = [(self.folder, 0)]
        while waiting:
            place, depth = waiting.pop()
            if (place / PLAN).is_file():
                found[str(place.relative_to(self.folder)) if depth else place.resolve().name] = place
            elif depth < DEEPEST:
                waiting += [(inner, depth + 1) for inner in _folders(place)]
        return dict(sorted(found.items()))

    @contextmanager
    def reading(self, *paths: Path) -> Iterator[list[RunRead]]:
        """Runs as they are now; nothing that was read of them changes meanwhile."""
        kept = {path: self._logs.setdefault(path, (Log(path / METRICS), Lock())) for path in paths}
        with ExitStack() as held:
            for path in sorted(kept):  # always in this order, so that two readers cannot wait for each other
                held.enter_context(kept[path][1])
            yield [read_run_folder(path, kept[path][0]) for path in paths]

    def page(self, *paths: Path, events: str = "", key: str = "", name: str = "") -> str:
        with self.reading(*paths) as (first, *others):
            return page(first, others, events=events, key=key, name=name)

    def news(self, path: Path) -> dict[str, Any]:
        with self.reading(path) as (run,):
            return news(run)

    def entry(self, name: str, path: Path) -> dict[str, Any]:
        """A Run as a line of the list."""
        try:
            with self.reading(path) as (run,):
                return self._entry(name, run)
        except InputError as error:
            return {"name": name, "trouble": str(error)}

    def _entry(self, name: str, run: RunRead) -> dict[str, Any]:
        found = held_out(run)
        started = float(run.started.get("time") or 0)
        recipe = run.plan.recipe
        reward = recipe.method is Method.GRPO  # whose loss is minus the mean reward
        sign = -1 if reward else 1
        return {
            "name": name,
            "trouble": "",
            "link": f"/run/{quote(name)}",
            "state": state_of(run),
            "health": "healthy" if at_work(run.path) else verdict(run).health.name.lower(),
            "reward": reward,
            "method": f"{recipe.method} · {recipe.tune}",
            "model": recipe.model,
            "before": sign * found[0]["loss"] if found else None,
            "after": sign * found[1]["loss"] if found else None,
            "updates": made(run),
            "started": started,
            "started_words": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else "",
        }


def _folders(place: Path) -> list[Path]:
    try:
        return [p for p in place.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith(".")]
    except OSError:
        return []


def made(run: RunRead) -> int:
    """Updates so far; of a search that is at work those of the arm that has made most."""
    return run.search.step if run.search is not None and run.summary is None else len(run.log.updates)


def state_of(run: RunRead) -> str:
    if run.summary is not None:
        return verdict(run).health
    return "running" if at_work(run.path) else "interrupted"


def seconds_left(run: RunRead) -> str | None:
    """What the updates that are left take at the pace of the latest ones, in words; None where that is not known."""
    table = run.log.updates
    tokens, speed = (table.column(name)[-PACE:] for name in ("tokens", "tokens_per_second"))
    known = np.isfinite(tokens) & (speed > 0)
    if not known.any() or run.search is not None:
        return None
    return duration_words(float((tokens[known] / speed[known]).mean()) * max(0, run.plan.updates - len(table)))


def news(run: RunRead) -> dict[str, Any]:
    """What a served page is told of a Run."""
    said, done, total = verdict(run), made(run), run.plan.updates
    findings = [f"{f.severity}: {f.sentence}" for f in run.log.findings]
    skipped = [f"update {line.get('step')} was left out: {line.get('what')}" for line in run.log.skipped]
    told = [*run.log.notes, *skipped, *findings][-LOG_SHOWN:]
    running = at_work(run.path)
    lost = any(f.severity is Severity.ERROR for f in run.log.findings)
    left = seconds_left(run) if running else None
    return {
        "finished": run.summary is not None,
        "health": ["healthy", "running"] if running and not lost else [said.health.name.lower(), str(said.health)],
        "sentence": said.sentence,
        "running": running,
        "done": done / total if total else 0.0,
        "state": f"{state_of(run)}: update {done:,} of {total:,}" + ("" if left is None else f", about {left} left"),
        "tiles": tiles(run),
        "curves": curves(run),
        "log": told[::-1],
    }


def app(folder: Path, hosts: frozenset[str], token: str | None, control: "Control | None" = None) -> ASGIApp:
    """The server.

    Args:
        hosts: names that a request may ask for, with and without a port.
        token: what a request must carry; None where only this machine reaches the server.
        control: what pages may do besides looking; None for nothing.
    """
    key = "" if control is None else control.key
    shelf = Shelf(folder)

    def named(name: str) -> Path | None:
        return shelf.runs().get(name)

    def index(request: Request) -> Response:
        return HTMLResponse(
            listing([shelf.entry(name, path) for name, path in shelf.runs().items()], folder, start=bool(key))
        )

    def one(request: Request) -> Response:
        path = named(request.path_params["name"])
        if path is None:
            return _missing()
        name = request.path_params["name"]
        return HTMLResponse(shelf.page(path, events=f"/events/{quote(name)}", key=key, name=name))

    def compare(request: Request) -> Response:
        found = [named(name) for name in request.query_params.getlist("run")]
        paths = [path for path in found if path is not None]
        if not paths or len(paths) < len(found):
            return _missing()
        return HTMLResponse(shelf.page(*paths))

    async def events(request: Request) -> Response:
        path = named(request.path_params["name"])
        return _missing() if path is None else StreamingResponse(_events(shelf, path), media_type="text/event-stream")

    routes = [
        Route("/", index),
        Route("/compare", compare),
        Route("/run/{name:path}", one),
        Route("/events/{name:path}", events),
        *([] if control is None else control.routes()),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={InputError: _unreadable}), hosts, token)


def _missing() -> Response:
    return PlainTextResponse("There is no such run here.\n", status_code=404)


def _unreadable(request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"{error}\n", status_code=500)


async def _events(shelf: Shelf, path: Path) -> AsyncIterator[str]:
    """What is new of a Run, as server-sent events, until it is finished."""
    before: Mapping[str, Any] | None = None
    while True:
        try:
            now = await asyncio.to_thread(shelf.news, path)
        except InputError as error:
            yield f": {' '.join(str(error).split())}\n\n"
            return
        if now != before:
            yield f"data: {json.dumps(now, allow_nan=False)}\n\n"
        else:
            yield ": still the same\n\n"  # whoever left is noticed by writing
        if now["finished"]:
            return
        before = now
        await asyncio.sleep(EVERY)


class Guard:
    """Lets through what names this host and, where one is asked for, carries the token."""

    def __init__(self, inner: ASGIApp, hosts: frozenset[str], token: str | None):
        self.inner, self.hosts, self.token = inner, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        request = Request(scope)
        await (self._refusal(request) or self.inner)(scope, receive, send)

    def _refusal(self, request: Request) -> ASGIApp | None:
        host = Headers(scope=request.scope).get("host", "")
        if self.hosts and _without_port(host) not in self.hosts:
            return PlainTextResponse("This server answers to its own name only.\n", status_code=403)
        if self.token is None or self._same(request.cookies.get(COOKIE)):
            return None
        if self._same(request.query_params.get("token")):
            answer = RedirectResponse(request.url.path, status_code=303)  # the token leaves the address
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        return PlainTextResponse("A token is needed: open the address that the server printed.\n", status_code=401)

    def _same(self, given: str | None) -> bool:
        return given is not None and self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def _without_port(host: str) -> str:
    name = host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return name.lower()

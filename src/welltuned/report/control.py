"""What a served page may do where its owner allows it: plan, start, stop, go on, ask. Every act is a command of ours,
run as a process of its own, so that closing the browser or the server ends nothing.

Only pages that this server made can act: each request carries a key that they hold, in a header that other sites'
pages cannot send.
"""

import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from welltuned.advice.describe import time_line
from welltuned.advice.plan import Plan, plan_lines
from welltuned.choice import SetBy
from welltuned.errors import InputError
from welltuned.models.resolve import DEMO_ALIAS
from welltuned.recipe import Method, Tune, load_recipe
from welltuned.report.page import asset, rendered
from welltuned.report.parts import facts
from welltuned.training.lock import LOCK, at_work
from welltuned.training.prepare import prepare
from welltuned.training.rundir import RUN

KEY = "x-welltuned-key"
ASKED = ("model", "data", "eval_data", "method", "tune")  # what the form has fields for
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,80}")
_TAIL = 4_000  # characters of what a process said
LONGEST_REPLY = 300  # seconds
ROWS_IN = (".jsonl", ".json", ".csv", ".parquet", ".txt")
MOST_NAMED = 200  # models and files that a form offers


@dataclass(slots=True)
class Control:
    """Processes that were started from a page, by the Run's name."""

    folder: Path
    key: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def routes(self) -> list[Route]:
        acts = {
            "plan": self.plan,
            "start": self.start,
            "stop": self.stop,
            "resume": self.resume,
            "job": self.job,
            "chat": self.chat,
        }
        return [
            Route("/start", self.form),
            *(Route(f"/api/{name}", self._guarded(act), methods=["POST"]) for name, act in acts.items()),
        ]

    def form(self, request: Request) -> Response:
        """The page on which a run is planned and started."""
        return HTMLResponse(
            rendered(
                "start.html",
                style=asset("page.css"),
                script=asset("start.js"),
                key=self.key,
                folder=str(self.folder),
                methods=[str(m) for m in Method],
                tunes=[str(t) for t in Tune],
                models=models_known(self.folder),
                data_files=data_files(Path()),
            )
        )

    def _guarded(self, act: Any) -> Any:
        async def guarded(request: Request) -> Response:
            if not secrets.compare_digest(request.headers.get(KEY, ""), self.key):
                return JSONResponse({"error": "this page is not one of this server's"}, status_code=403)
            try:
                asked = await request.json()
                if not isinstance(asked, dict):
                    raise InputError("the request is no JSON object")
                return JSONResponse(await asyncio.to_thread(act, asked))
            except InputError as error:
                return JSONResponse({"error": str(error)}, status_code=400)
            except ValueError:
                return JSONResponse({"error": "the request is no JSON"}, status_code=400)

        return guarded

    # ── acts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The plan of what the form says."""
        options, sets = _recipe_of(asked)
        return _shown(prepare(load_recipe(None, options, sets), weights_needed=False).plan)

    def start(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Train, in a process of its own."""
        options, sets = _recipe_of(asked)
        load_recipe(None, options, sets)  # what is wrong with it is said here, not in a log
        name = self._new_name(asked.get("name"))
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
        words += [word for text in sets for word in ("--set", text)]
        self._run(name, ["train", *words, "--out", str(self.folder / name)])
        return {"name": name}

    def resume(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Go on with a run that was interrupted."""
        name, path = self._known(asked)
        if at_work(path):
            raise InputError("it is at work already", where=name)
        self._run(name, ["resume", str(path)])
        return {"name": name}

    def stop(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the process that is at work on a run to end: it saves first, and `resume` goes on."""
        name, path = self._known(asked)
        if not at_work(path):
            raise InputError("nothing is at work on it", where=name)
        os.kill(int(json.loads((path / LOCK).read_bytes())["pid"]), signal.SIGINT)
        return {"name": name}

    def job(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """How a process that was started here fares: its exit code, None while it runs, and the end of what it said."""
        name = str(asked.get("name"))
        process = self._processes.get(name)
        if process is None:
            raise InputError("it was not started here", where=name)
        said = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-_TAIL:]
        return {"code": process.poll(), "said": said, "planned": (self.folder / name / "plan.yaml").is_file()}

    def chat(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """One reply of a finished run, beside its base's."""
        name, path = self._known(asked)
        if not (path / RUN).is_file():
            raise InputError("it is not finished", where=name)
        prompt = asked.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError("there is nothing to answer", where="prompt")
        words = ["chat", str(path), "--base", "--json", f"--prompt={prompt}"]
        system = asked.get("system")
        if isinstance(system, str) and system.strip():
            words.append(f"--system={system}")
        try:
            done = subprocess.run(_command(words), capture_output=True, timeout=LONGEST_REPLY, check=False)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"there was no reply within {LONGEST_REPLY} s", where=name) from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise InputError(said[-1] if said else f"it ended with exit code {done.returncode}", where=name)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    # ── the processes behind them ────────────────────────────────────────────────────────────────────────────────────

    def _run(self, name: str, words: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            made = subprocess.Popen(
                _command(words), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._processes[name] = made

    def _new_name(self, name: Any) -> str:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError("a run's name has letters, digits, dots and dashes only", where="name")
        if (self.folder / name).exists():
            raise InputError("there is a run of that name", where=name, mend="give another")
        return name

    def _known(self, asked: Mapping[str, Any]) -> tuple[str, Path]:
        """A Run beneath the folder, not by a way out of it."""
        name = str(asked.get("name"))
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not (path / "plan.yaml").is_file():
            raise InputError("there is no such run here", where=name)
        return name, path


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "welltuned", *words]


def _recipe_of(asked: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The form's fields as options, and edited choices as `key=value`."""
    options = {key: str(asked[key]).strip() for key in ASKED if str(asked.get(key) or "").strip()}
    changed = asked.get("sets") or {}
    if not isinstance(changed, Mapping):
        raise InputError("changed choices come as names with values", where="sets")
    sets = [_of_line(line) for line in str(asked.get("more") or "").splitlines() if line.strip()]
    return options, [*sets, *(f"{key}={value}" for key, value in changed.items() if str(value).strip())]


def _of_line(line: str) -> str:
    """`key: value`, as a recipe has it, or `key=value`, as --set takes it."""
    key, mark, value = line.partition(":" if ":" in line.partition("=")[0] else "=")
    if not mark or not key.strip() or not value.strip():
        raise InputError("this is no key with a value", where=line.strip(), mend="one a line, such as max_steps: 100")
    return f"{key.strip()}={value.strip()}"


def models_known(folder: Path) -> list[str]:
    """Models to choose from: the demo's, and those of the Runs beneath a folder."""
    found = {DEMO_ALIAS}
    for plan in sorted(folder.glob("*/recipe.yaml"))[:MOST_NAMED]:
        with suppress(InputError):
            found.add(load_recipe(str(plan)).model)
    return sorted(found)


def data_files(place: Path) -> list[str]:
    """Files to choose from: those with the ending of rows, in a folder and those in it."""
    found = [p for depth in ("*", "*/*") for p in place.glob(depth) if p.suffix in ROWS_IN and p.is_file()]
    return sorted(str(p) for p in found if not any(part.startswith(".") for part in p.parts))[:MOST_NAMED]


def _shown(plan: Plan) -> dict[str, Any]:
    by_user = {name for name, choice in plan.choices.items() if choice.set_by is SetBy.USER}
    return {
        "choices": [{**line._asdict(), "by_user": line.name in by_user} for line in plan_lines(plan)],
        "memory": {
            "total": plan.memory.total_bytes,
            "limit": plan.memory.limit_bytes,
            "fits": plan.memory.fits,
            "parts": [
                {"name": name, "bytes": size}
                for name, size in sorted(plan.memory.parts.items(), key=lambda item: -item[1])
                if size
            ],
        },
        "facts": [*facts(plan), ("Time", time_line(plan.time))],
        "warnings": list(plan.warnings),
    }

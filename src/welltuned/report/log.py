"""metrics.jsonl as it grows: what was read once is not read again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from welltuned.report.table import Table
from welltuned.training.events import Finding

Line = Mapping[str, Any]


@dataclass(slots=True)
class Log:
    """What a Run has told so far.

    Attributes:
        updates: the lines with a `loss`, one for each update that was made.
        evaluations: those with an `eval_loss`, that before the first update included.
        arm_updates: those of a search's arms, by number; `arm_events` the other lines that tell of arms.
        damaged: lines that are no JSON object; a last one that is still being written is not read yet.
    """

    path: Path
    updates: Table = field(default_factory=Table)
    evaluations: Table = field(default_factory=Table)
    findings: list[Finding] = field(default_factory=list)
    skipped: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    arm_updates: dict[int, Table] = field(default_factory=dict)
    arm_events: list[Line] = field(default_factory=list)
    damaged: int = 0
    _read: int = 0
    _last: bytes = b""  # the line before that place: another there means that the file was cut and has grown again

    def follow(self) -> bool:
        """Read what was added since; whether anything was. Of a run that went back, all is read anew."""
        if not self.path.is_file():
            return False
        with self.path.open("rb") as file:
            file.seek(self._read - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._forget()
                file.seek(0)
            start = self._read
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                self._read, self._last = self._read + len(raw), raw
                self._take(raw)
        return self._read > start

    def _forget(self) -> None:
        self.updates, self.evaluations, self.damaged, self._read, self._last = Table(), Table(), 0, 0, b""
        for told in (self.findings, self.skipped, self.notes, self.arm_updates, self.arm_events):
            told.clear()

    def _take(self, raw: bytes) -> None:
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            self.damaged += 1
            return
        if "loss" in line and "event" not in line:
            self.updates.add(line)
        if "eval_loss" in line:
            self.evaluations.add(line)
        match line.get("event"):
            case "finding":
                self._take_finding(line)
            case "skipped":
                self.skipped.append(line)
            case "note":
                self.notes.append(str(line.get("text", "")))
            case "compiled":
                self.notes.append(str(line.get("sentence", "")))
            case "arm_update":
                self._take_arm(line)
            case "arm" | "arm_judged" | "arm_ended":
                self.arm_events.append(line)

    def _take_arm(self, line: Line) -> None:
        number = line.get("arm")
        if not isinstance(number, int):
            self.damaged += 1
            return
        kept = {name: line.get(name) for name in ("step", "learning_rate", "tokens")}
        self.arm_updates.setdefault(number, Table()).add({**kept, "loss": line.get("arm_loss")})

    def _take_finding(self, line: Line) -> None:
        try:
            self.findings.append(Finding.from_json(line))
        except (KeyError, TypeError, ValueError, AttributeError):  # not one of ours
            self.damaged += 1

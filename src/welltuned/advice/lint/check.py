"""A check: what it looks for, how heavy it weighs, on what evidence, and how to mend what it finds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from welltuned.advice.evidence import unique
from welltuned.advice.lint.config import Config


class Severity(StrEnum):
    """An error: the run fails, or is spoilt. A warning: outside what evidence supports. A note: good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


ORDER = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.NOTE: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """What a check found in one file: the setting's neutral name, a sentence with this file's numbers.

    `mend` replaces the check's own; `severity` may soften it. `key` and `line` are for what is no setting.
    """

    name: str
    sentence: str
    mend: str | None = None
    severity: Severity | None = None
    key: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check, with its words for the documentation. `numbers` are its thresholds, by name."""

    id: str
    name: str
    severity: Severity
    looks_for: str
    why: str
    mend: str
    evidence: tuple[str, ...]
    numbers: Mapping[str, float]
    find: Callable[[Config], Iterable[Hit]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A check's finding in a file."""

    id: str
    severity: Severity
    key: str
    line: int | None
    sentence: str
    evidence: tuple[str, ...]
    mend: str

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "severity": str(self.severity),
            "key": self.key,
            "line": self.line,
            "sentence": self.sentence,
            "evidence": list(self.evidence),
            "mend": self.mend,
        }


CHECKS: dict[str, Check] = {}
Find = Callable[[Config], Iterable[Hit]]


def check(
    id: str,
    name: str,
    severity: Severity,
    *,
    looks_for: str,
    why: str,
    mend: str,
    evidence: tuple[str, ...],
    **numbers: float,
) -> Callable[[Find], Find]:
    """Register a check. Its thresholds are given here, beside the evidence, and read with `limit(id, name)`."""

    def register(find: Find) -> Find:
        if id in CHECKS:
            raise ValueError(f"two checks are called {id}")
        CHECKS[id] = Check(
            id=id,
            name=name,
            severity=severity,
            looks_for=looks_for,
            why=why,
            mend=mend,
            evidence=unique(evidence),
            numbers=MappingProxyType(numbers),
            find=find,
        )
        return find

    return register


def limit(id: str, name: str) -> float:
    """A threshold of a check."""
    return CHECKS[id].numbers[name]


def findings_of(config: Config) -> list[Finding]:
    """Every finding, errors first, then in the order of the file."""
    found = [_finding(check, hit, config) for check in CHECKS.values() for hit in check.find(config)]
    return sorted(found, key=lambda finding: (ORDER[finding.severity], finding.line or 0, finding.id))


def _finding(check: Check, hit: Hit, config: Config) -> Finding:
    return Finding(
        id=check.id,
        severity=hit.severity or check.severity,
        key=hit.key if hit.key is not None else config.key(hit.name),
        line=hit.line if hit.line is not None else config.line_of(hit.name),
        sentence=hit.sentence,
        evidence=check.evidence,
        mend=hit.mend or check.mend,
    )

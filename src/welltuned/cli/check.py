"""welltuned check: what is wrong with a configuration, whichever tool it was written for."""

import argparse
import json
import sys
from typing import Any

from welltuned.advice.lint import Config, Finding, Severity, Tool, findings_of
from welltuned.interop import read_config
from welltuned.recipe import Method

_COLOURS = {Severity.ERROR: "31", Severity.WARNING: "33", Severity.NOTE: "2"}


def run(arguments: argparse.Namespace) -> int:
    """0 where nothing is wrong, 1 where a finding is an error; bad input is an InputError (2)."""
    tool = Tool(arguments.tool) if arguments.tool else None
    method = Method(arguments.method) if arguments.method else None
    configs = read_config(arguments.file, tool, method)
    findings = _distinct([finding for config in configs for finding in findings_of(config)])
    if arguments.json:
        print(json.dumps(_document(arguments.file, configs, findings), ensure_ascii=False))
    else:
        _print(arguments.file, configs, findings)
    return 1 if any(finding.severity is Severity.ERROR for finding in findings) else 0


def _distinct(findings: list[Finding]) -> list[Finding]:
    """Runs of one script share parts, and so findings."""
    return list(dict.fromkeys(findings))


def _unread(configs: tuple[Config, ...]) -> list[dict[str, Any]]:
    found = {(unread.line, unread.key, unread.text) for config in configs for unread in config.unread.values()}
    return [{"key": key, "line": line, "text": text} for line, key, text in sorted(found)]


def _document(file: str, configs: tuple[Config, ...], findings: list[Finding]) -> dict[str, Any]:
    return {
        "file": file,
        "tool": str(configs[0].tool),
        "findings": [finding.to_json() for finding in findings],
        "unread": _unread(configs),
    }


def _print(file: str, configs: tuple[Config, ...], findings: list[Finding]) -> None:
    colour = sys.stdout.isatty()
    for finding in findings:
        where = f"{file}:{finding.line}" if finding.line else file
        name = f"\033[{_COLOURS[finding.severity]}m{finding.severity}\033[0m" if colour else str(finding.severity)
        print(f"{where}: {name} {finding.id}: {finding.sentence}")
        print(f"    mend: {finding.mend} [{' '.join(finding.evidence)}]")
    unread = _unread(configs)
    if unread:
        names = ", ".join(f"{entry['key']} (line {entry['line']})" for entry in unread)
        print(f"{file}: not read, because only running it could tell: {names}")
    kinds = [f"{sum(f.severity is severity for f in findings)} {severity}s" for severity in Severity]
    what = " and ".join(dict.fromkeys(f"{config.tool} {_kind(config)}" for config in configs))
    print(f"{file}: {what}: {', '.join(kinds)}")
    for key in {config.facts["method_by"].key for config in configs if "method_by" in config.facts}:
        print(f"{file}: read as dpo by its key {key}; KTO and ORPO have it too: --method says which")


def _kind(config: Config) -> str:
    words = [str(word) for word in (config.method, config.tune) if word is not None]
    return " ".join(words) if words else "run of a kind that is not known here"

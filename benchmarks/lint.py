"""How well `welltuned check` tells faults from sound recipes, and how fast.

    python benchmarks/lint.py                                                                  a minute

Planted faults are the cases of tests/advice/test_lint.py: a sound configuration with one thing wrong, in TRL's,
Axolotl's, LLaMA-Factory's or our format, or as a script. Sound recipes are the published ones of
tests/interop/fixtures at their own values, and those of recipes/. An alarm on those is an error or a warning; a note is
none. The time is that of reading a file and running every check, without starting Python.
"""

import statistics
import sys
import tempfile
import time
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from common import describe_machine, write_result

from welltuned.advice.lint import CHECKS, Finding, Severity, findings_of
from welltuned.interop import read_config

ROOT = Path(__file__).parents[1]
REPEATS = 5


def measure() -> dict[str, Any]:
    tests = _module(ROOT / "tests" / "advice" / "test_lint.py")
    faults = _planted(tests)
    sound = sorted(
        path
        for folder in (ROOT / "tests" / "interop" / "fixtures", ROOT / "recipes")
        for path in folder.rglob("*")
        if path.suffix in (".yaml", ".yml", ".py")
    )
    alarms = {str(path.relative_to(ROOT)): _alarms(path) for path in sound}
    milliseconds = [_milliseconds(path) for path in sound]
    return {
        "machine": describe_machine(),
        "checks": {id: {"name": check.name, "severity": str(check.severity)} for id, check in sorted(CHECKS.items())},
        "number_of_checks": len(CHECKS),
        "planted": {
            "faults": len(faults),
            "found": sum(fault["found"] for fault in faults),
            "with_another_finding": sum(bool(fault["others"]) for fault in faults),
            "checks_without_a_fault": sorted(CHECKS.keys() - {fault["id"] for fault in faults}),
            "by_check": dict(sorted(Counter(fault["id"] for fault in faults).items())),
        },
        "sound": {
            "recipes": len(sound),
            "false_alarms": sum(len(found) for found in alarms.values()),
            "which": {path: found for path, found in alarms.items() if found},
        },
        "milliseconds": {"median": round(statistics.median(milliseconds), 1), "most": round(max(milliseconds), 1)},
    }


def _module(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _planted(tests: ModuleType) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = tests.folder.__wrapped__(Path(name))
        for id, case in tests.CASES:
            is_script = isinstance(case, str) and "import" in case
            path = folder / ("train.py" if is_script else "config.yaml")
            path.write_text(case if isinstance(case, str) else yaml.safe_dump(case), encoding="utf-8")
            ids = {finding.id for finding in _findings(path)}
            found.append({"id": id, "found": id in ids, "others": sorted(ids - {id})})
    return found


def _findings(path: Path) -> list[Finding]:
    return [finding for config in read_config(str(path)) for finding in findings_of(config)]


def _alarms(path: Path) -> list[str]:
    return [f"{finding.id}: {finding.sentence}" for finding in _findings(path) if finding.severity is not Severity.NOTE]


def _milliseconds(path: Path) -> float:
    """The best of a few: what other processes take is not the check's."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        _findings(path)
        times.append(1000 * (time.perf_counter() - started))
    return min(times)


def main() -> None:
    result = measure()
    planted, sound = result["planted"], result["sound"]
    print(
        f"{result['number_of_checks']} checks; {planted['found']} of {planted['faults']} planted faults found, "
        f"{planted['with_another_finding']} with another finding; {sound['false_alarms']} false alarms on "
        f"{sound['recipes']} sound recipes; {result['milliseconds']['median']} ms a file (median)"
    )
    print(write_result("lint", result))
    sys.exit(planted["found"] < planted["faults"] or sound["false_alarms"] > 0)


if __name__ == "__main__":
    main()

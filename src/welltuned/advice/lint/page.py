"""The documentation of all checks, made from the checks themselves: docs/checks.md."""

from collections.abc import Iterator
from types import ModuleType

from welltuned.advice.evidence import row
from welltuned.advice.lint import CHECKS, FAMILIES, Check, Severity

_HEAD = """# Checks

`welltuned check FILE` reads a configuration of welltuned, TRL (the alignment handbook's recipes and other YAML for
transformers too), Axolotl or LLaMA-Factory, or a Python script that calls TRL or Unsloth, and says what is wrong with
it, in the file's own words and numbers. Scripts are read and never run: what only running could tell is listed as not
read, and is not guessed. `--json` prints one document; the exit code is 1 where there is an error.

An **error** makes the run fail or spoils it. A **warning** is outside what any evidence supports. A **note** is good to
know, and sound recipes have some. Ids stay what they are. Each check cites rows of evidence; `E094` and its like are
listed at the end. This page is made from the checks' own words:
`python -m welltuned.advice.lint.page > docs/checks.md`.
"""


def page() -> str:
    """The page as Markdown."""
    counts = {severity: sum(check.severity is severity for check in CHECKS.values()) for severity in Severity}
    total = ", ".join(f"{count} {severity}s" for severity, count in counts.items())
    parts = [_HEAD, f"There are {len(CHECKS)} checks: {total}.\n"]
    for title, module in FAMILIES.items():
        parts.append(f"## {title}\n")
        parts += [_section(check) for check in _checks_of(module)]
    parts.append("## Evidence\n")
    cited = sorted({id for check in CHECKS.values() for id in check.evidence})
    parts.append("\n".join(_evidence(id) for id in cited) + "\n")
    return "\n".join(parts)


def _checks_of(module: ModuleType) -> Iterator[Check]:
    return (check for check in CHECKS.values() if check.find.__module__ == module.__name__)


def _section(check: Check) -> str:
    return (
        f"### {check.id} {check.name} ({check.severity})\n\n"
        f"{check.looks_for} {check.why}\n\n"
        f"*Mend:* {check.mend}. *Evidence:* {', '.join(check.evidence)}.\n"
    )


def _evidence(id: str) -> str:
    found = row(id)
    return f"- **{id}** ({found.grade}) {found.hyperparameter}: {found.value.replace('|', '/')}. *{found.source}*"


if __name__ == "__main__":
    print(page(), end="")

"""A model card: what was trained, on what, with which choices, and what was measured; from the Run's own files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import welltuned
from welltuned.adapters.agree import Agreement
from welltuned.advice.plan import Plan, plan_lines
from welltuned.choice import SetBy
from welltuned.finished.find import Finished

CARD = "README.md"


def card(finished: Finished, *, title: str, use: str, agreement: Agreement | None = None) -> str:
    """The card as Markdown.

    Args:
        use: how to run what lies beside it.
    """
    parts = [_head(finished), f"# {title}", _what(finished), "## Use\n\n" + use]
    measured = _measured(finished.facts, agreement)
    if measured:
        parts.append("## Measured\n\n" + "\n".join(f"- {line}" for line in measured))
    if finished.plan is not None:
        parts += ["## Data\n\n" + _data(finished.plan), "## Choices\n\n" + _choices(finished.plan)]
    parts.append(f"Made with welltuned {welltuned.__version__}.")
    return "\n\n".join(parts) + "\n"


def _head(finished: Finished) -> str:
    """What model hubs read."""
    base = finished.base or finished.model
    lines = ["---", f"base_model: {base}", "tags:", "- welltuned"]
    if finished.adapter is not None:
        lines += ["- lora", "library_name: peft"]
    return "\n".join([*lines, "---"])


def _what(finished: Finished) -> str:
    how = "fine-tuned in full" if finished.adapter is None else "fine-tuned with LoRA"
    if finished.nf4:
        how = "fine-tuned with QLoRA (the base in 4 bits, NF4 with double quantisation)"
    made = finished.facts.get("made")
    more = f" Afterwards: {made}." if made else ""
    updates = finished.facts.get("updates")
    after = f" in {updates:,} updates" if isinstance(updates, int) else ""
    return f"`{finished.base or finished.model}`, {how}{after}.{more}"


def _measured(facts: Mapping[str, Any], agreement: Agreement | None) -> list[str]:
    found = []
    held = facts.get("held_out") or {}
    before, after = held.get("before"), held.get("after")
    if before and after:
        error = after.get("standard_error")
        near = f" ± {error:.3f}" if error is not None else ""
        found.append(f"Loss on {held['rows']:,} held-out rows: {before['loss']:.3f} → {after['loss']:.3f}{near}.")
    checks = facts.get("trained_tensors") or []
    if checks:
        found.append(f"All {len(checks):,} trained tensors moved and are finite; their checksums are in run.json.")
    if agreement is not None:
        text = agreement.sentence()
        found.append(f"Merged: {text}.")
    return found


def _data(plan: Plan) -> str:
    data = plan.facts.dataset
    return (
        f"{', '.join(f'`{name}`' for name in plan.recipe.datasets)}: {data.rows:,} rows to train on and "
        f"{data.heldout_rows:,} held out, {data.tokens:,} tokens, of which {data.supervised_share:.0%} were trained."
    )


def _choices(plan: Plan) -> str:
    lines = ["| choice | value | set by | why |", "|---|---|---|---|"]
    for line in plan_lines(plan):
        by = "the user" if plan.choices[line.name].set_by is SetBy.USER else "advice"
        lines.append(f"| {line.name} | {_cell(line.value)} | {by} | {_cell(line.reason)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_card(folder: Path, text: str) -> None:
    (folder / CARD).write_text(text, encoding="utf-8")

"""The sections of a Run's page as plain values: figures, choices, memory, what the data had, replies, where from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from welltuned.advice import evidence
from welltuned.advice.describe import data_line, machine_line, model_line
from welltuned.advice.plan import Plan, plan_lines
from welltuned.advice.settle import bytes_words, duration_words
from welltuned.choice import SetBy
from welltuned.recipe import Method
from welltuned.report.arms import SearchRead
from welltuned.report.read import RunRead
from welltuned.report.verdict import held_out

SAMPLES_SHOWN = 6
TABLE_LINES = 200  # of held-out measurements


def tiles(run: RunRead) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value, what is said beneath."""
    summary, plan = run.summary or {}, run.plan
    found = _measured(run)
    tokens, supervised = (int(np.nansum(run.log.updates.column(name))) for name in ("tokens", "supervised_tokens"))
    if run.search is not None:
        found += _compared(run.search)
    if run.search is None or run.summary is not None:
        found.append(("updates", f"{len(run.log.updates):,}", f"of {plan.updates:,} planned"))
        found.append(("tokens", f"{tokens:,}", f"{supervised:,} of them {_trained(plan)}"))
    if (seconds := summary.get("seconds")) is not None:
        found.append(("time", duration_words(seconds), f"{summary['tokens_per_second']:,.0f} tokens/s"))
    if (peak := peak_of(run)) is not None:
        found.append(("peak memory", bytes_words(peak), f"forecast {bytes_words(plan.memory.total_bytes)}"))
    checks = summary.get("trained_tensors") or []
    if checks:
        found.append(("verified", f"{len(checks):,} tensors", "moved, finite, and on disk as trained"))
    return found


def _compared(search: SearchRead) -> list[tuple[str, str, str]]:
    """The figures of a search."""
    if search.winner is not None:
        return [("arms compared", f"{len(search.arms)}", f"{search.winner.name} was chosen")]
    ended = len(search.arms) - len(search.at_work)
    tokens = sum(arm.tokens for arm in search.arms)
    return [
        ("arms", f"{len(search.arms)}", f"{ended} of them ended"),
        ("updates", f"{search.step:,}", f"of {search.updates:,} planned for each arm that goes on"),
        ("tokens", f"{tokens:,}", "by all arms together"),
    ]


def _trained(plan: Plan) -> str:
    return "its own answers" if plan.recipe.method is Method.GRPO else "trained"


def _measured(run: RunRead) -> list[tuple[str, str, str]]:
    """What was held out, before and after training."""
    reward, found = run.plan.recipe.method is Method.GRPO, []
    if (pair := held_out(run)) is not None:
        sign = -1 if reward else 1  # the loss of grpo is minus the reward
        before, after = (sign * float(value["loss"]) for value in pair)
        error = pair[1].get("standard_error")
        near = "" if error is None else f"± {error:.3f} "
        name = "held-out reward" if reward else "held-out loss"
        found.append(
            (
                name,
                f"{before:.3f} → {after:.3f}",
                f"{near}before and {'after training' if run.summary is not None else 'at the last look'}",
            )
        )
    shares = run.log.evaluations.column("eval_rewards/accuracies")
    shares = shares[np.isfinite(shares)]
    if len(shares):
        found.append(("chosen answer wins", f"{shares[-1]:.0%}", "of held-out pairs; chance is 50%"))
    return found


def compared(runs: Sequence[RunRead]) -> tuple[list[str], list[dict[str, Any]]]:
    """Several runs beside each other: which choices they differ in, and a line for each run with its values of them."""
    names = dict.fromkeys(name for run in runs for name in run.plan.choices)
    words = [{line.name: line.value for line in plan_lines(run.plan)} for run in runs]
    recipes = [
        {"model": r.plan.recipe.model, "data": ", ".join(r.plan.recipe.datasets), "method": str(r.plan.recipe.method)}
        for r in runs
    ]
    both = zip(recipes, words, strict=True)
    values = [{**recipe, **{name: shown.get(name, "–") for name in names}} for recipe, shown in both]
    differ = [name for name in values[0] if len({value[name] for value in values}) > 1]
    lines = [
        {"name": run.name, "figures": dict((n, v) for n, v, _ in _measured(run)), "values": [value[n] for n in differ]}
        for run, value in zip(runs, values, strict=True)
    ]
    return differ, lines


def measurements(run: RunRead) -> tuple[list[str], list[list[str]], int]:
    """Held-out measurements as a table: its head, its lines, and how many more there are."""
    table, reward = run.log.evaluations, run.plan.recipe.method is Method.GRPO
    sign = -1 if reward else 1
    names = ["eval_rewards/accuracies", "eval_rewards/margins", "eval_completions/mean_length"]
    names = [name for name in names if name in table.names]
    words = {names_: names_.removeprefix("eval_").replace("/", ": ").replace("_", " ") for names_ in names}
    head = ["update", "held-out reward" if reward else "held-out loss", "standard error", *words.values()]
    lines = []
    for line in table.rows(TABLE_LINES):
        loss = line.get("eval_loss")
        values = [None if loss is None else sign * loss, line.get("eval_loss_se"), *(line.get(n) for n in names)]
        lines.append([f"{line.get('step') or 0:,.0f}", *("" if v is None else f"{v:.4g}" for v in values)])
    return head, lines, max(0, len(table) - TABLE_LINES)


def sampled(run: RunRead) -> list[dict[str, Any]]:
    """Held-out prompts of a run that learns from rewards, with what it answered at the first and the last look."""
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for sample in run.samples:
        if {"row", "step", "prompt", "completion"} <= sample.keys():
            by_row.setdefault(str(sample["row"]), []).append(sample)
    found = []
    for row, looks in list(by_row.items())[:SAMPLES_SHOWN]:
        first, last = looks[0], looks[-1]
        shown = [first] if first is last else [first, last]
        found.append({"row": row, "prompt": first["prompt"], "answer": first.get("answer"), "looks": shown})
    return found


def rewards_of(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a completion was given: in all where it had several rewards, and each."""
    each, whole = sample.get("rewards") or {}, sample.get("reward")
    found = [("reward", _number(whole))] if whole is not None else []
    return found + ([(str(name), _number(value)) for name, value in each.items()] if len(each) > 1 else [])


def _number(value: Any) -> str:
    return "none" if value is None else f"{value:.3g}" if isinstance(value, int | float) else str(value)


def facts(plan: Plan) -> list[tuple[str, str]]:
    facts = plan.facts
    return [
        ("Model", model_line(facts.model)),
        ("Data", data_line(facts.dataset)),
        ("Machine", machine_line(facts.machine)),
    ]


def choices_of(plan: Plan) -> list[dict[str, Any]]:
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


def peak_of(run: RunRead) -> int | None:
    """The most memory that was measured: run.json has the last process's, and a run may have been gone on with."""
    seen = run.log.updates.column("memory_bytes")
    return (
        int(max((run.summary or {}).get("peak_memory_bytes") or 0, np.max(seen, initial=0, where=np.isfinite(seen))))
        or None
    )


def memory_of(run: RunRead) -> dict[str, Any]:
    """Forecast by part, largest first, and what was measured; shares are of the larger of the two."""
    memory, peak = run.plan.memory, peak_of(run)
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

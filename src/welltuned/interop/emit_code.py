"""The Python that reads the user's rows for another tool, holds some out and counts those of an epoch."""

import json
from collections.abc import Sequence

from welltuned.advice.plan import Plan
from welltuned.interop.emit_missing import held_out_share
from welltuned.interop.emit_rows import Look, Shape, loss_of, rows_code
from welltuned.interop.emit_text import python_value

_READING = '''\
def read(sources):
    """(rows, group of each row, rows to take) of every dataset; rows of one group are held out together."""
    for loading, to_row, count in sources:
        rows, groups = [], []
        for record in load_dataset(**loading):
            row = to_row(record)
            if row is not None:
                rows.append(row)
                groups.append(GROUP)
        yield rows, groups, count


def split(sources):
    """Rows to train on and rows held out; all rows of a group are on one side, chosen by the group's hash."""
    train, held_out = [], []
    every = list(read(sources))
    total = sum(len(rows) for rows, _, _ in every)
    size = {}
    for _, groups, _ in every:
        for group in groups:
            size[group] = size.get(group, 0) + 1
    aside, chosen = 0, set()
    for group in sorted(size, key=lambda group: hashlib.sha256(f"{SEED} {group}".encode()).digest()):
        if aside >= HELD_OUT * total:
            break
        chosen.add(group)
        aside += size[group]
    for rows, groups, count in every:
        own = [row for row, group in zip(rows, groups) if group not in chosen]
        held_out += [row for row, group in zip(rows, groups) if group in chosen]
        if count is not None:  # a part of the rows, or all of them more than once
            random.Random(SEED).shuffle(own)
            own = [own[i % len(own)] for i in range(count)]
        train += own
    return train, held_out
'''


def data_code(plan: Plan, looks: Sequence[Look], held_out: Sequence[Look], shape: Shape) -> str:
    """SEED, HELD_OUT, `to_row_N`, TRAIN, EVAL where there is held-out data, and `split`."""
    share = held_out_share(plan) if plan.facts.dataset.heldout_rows and not held_out else 0.0
    head = [
        f"SEED = {plan.value('seed')}",
        f"HELD_OUT = {python_value(share)}  # share of the rows that is never trained on",
    ]
    code = rows_code((*looks, *held_out), shape, loss_of(plan.recipe))
    counts = [p.rows_of_epoch if p.rows_of_epoch != p.rows else None for p in plan.facts.dataset.mixture]
    counts = counts or [None] * len(looks)
    lines = [
        "# What `load_dataset` reads, how a row is written, and how many rows make an epoch (None: all).",
        "TRAIN = [",
    ]
    for index, (look, count) in enumerate(zip(looks, counts, strict=True)):
        lines.append(f"    ({python_value(dict(look.loading))}, to_row_{index}, {count}),")
    lines.append("]")
    if held_out:
        own = (
            f"    ({python_value(dict(look.loading))}, to_row_{i}, None),"
            for i, look in enumerate(held_out, len(looks))
        )
        lines += ["EVAL = [", *own, "]"]
    reading = _READING.replace("GROUP", _group(plan, shape))
    return "\n".join([*head, "", "", code, "", *lines, "", "", reading])


def _group(plan: Plan, shape: Shape) -> str:
    """The expression of what rows must share to be held out together."""
    if plan.recipe.group_by is not None:
        return f"str(record[{json.dumps(plan.recipe.group_by, ensure_ascii=False)}])"
    if shape is Shape.TEXT:
        return 'row["text"]'
    question = '[turn for turn in row["messages"] if turn["role"] == "user"][:1]'
    return f"json.dumps({question})" if shape is Shape.CHAT else 'json.dumps(row["prompt"])'

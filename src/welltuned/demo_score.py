"""Scoring of the demo's tickets: how many replies are tickets at all, and how many of their fields are right."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Any

from welltuned.errors import InputError

KEYS = ("product", "category", "urgency", "order", "wants")
CATEGORIES = ("billing", "delivery", "defect", "account", "cancellation", "question")
URGENCIES = ("low", "normal", "high")
WANTS = ("refund", "replacement", "repair", "information", "callback", "confirmation")


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketScore:
    """Shares between 0 and 1, each over all rows, and their standard errors.

    `valid` is the share of replies that are tickets, `fields` the share of fields right over rows x keys, `per_field`
    the same for each key, and `exact` the share of tickets with every field right. A reply that is no ticket has no
    field right.

    `valid_se`, `exact_se` and `per_field_se` are binomial standard errors, sqrt(p (1 - p) / rows). The fields of one
    ticket do not go wrong independently, so `fields_se` counts rows, not fields: sqrt(variance over rows / rows).
    """

    rows: int
    valid: float
    valid_se: float
    fields: float
    fields_se: float
    exact: float
    exact_se: float
    per_field: Mapping[str, float]
    per_field_se: Mapping[str, float]


def score(replies: Sequence[str], expected: Sequence[str]) -> TicketScore:
    """Compare replies with the expected tickets, row by row.

    A reply counts as a ticket only if the whole of it, surrounding whitespace aside, is one JSON object with exactly
    the keys of `KEYS`, each once, in any order. Nothing is repaired or searched for: text before or after the JSON, a
    code fence, single quotes, a trailing comma, NaN, a missing, extra or repeated key all make the reply invalid. A
    value is right when it has the same type and the same characters as the expected one, so the number 5 is not "5",
    and "" or "null" is not null.

    >>> ticket = '{"product":"kettle","category":"defect","urgency":"normal","order":null,"wants":"repair"}'
    >>> result = score([ticket.replace("repair", "refund"), "Sure! " + ticket], [ticket, ticket])
    >>> result.valid, result.fields, result.exact
    (0.5, 0.4, 0.0)
    """
    if len(replies) != len(expected):
        raise InputError(
            f"there are {len(replies)} replies for {len(expected)} expected tickets", mend="give one reply for each"
        )
    if not expected:
        raise InputError("there are no tickets to score", mend="give at least one row")
    valid: list[bool] = []
    right: list[list[bool]] = []
    for number, (reply, answer) in enumerate(zip(replies, expected, strict=True), start=1):
        want = _ticket(answer)
        if want is None or not all(value is None or isinstance(value, str) for value in want.values()):
            raise InputError(
                "the expected ticket is not a JSON object of strings or nulls with the keys " + ", ".join(KEYS),
                where=f"row {number}",
                mend="correct that row of the data",
            )
        got = _ticket(reply)
        valid.append(got is not None)
        right.append([got is not None and type(got[key]) is type(want[key]) and got[key] == want[key] for key in KEYS])
    fields, fields_se = _mean(sum(row) / len(KEYS) for row in right)
    exact, exact_se = _mean(all(row) for row in right)
    share, share_se = _mean(valid)
    by_key = {key: _mean(row[column] for row in right) for column, key in enumerate(KEYS)}
    return TicketScore(
        rows=len(right),
        valid=share,
        valid_se=share_se,
        fields=fields,
        fields_se=fields_se,
        exact=exact,
        exact_se=exact_se,
        per_field={key: mean for key, (mean, _) in by_key.items()},
        per_field_se={key: error for key, (_, error) in by_key.items()},
    )


def _ticket(text: str) -> dict[str, Any] | None:
    try:
        ticket = json.loads(text.strip(), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return ticket if isinstance(ticket, dict) and ticket.keys() == set(KEYS) else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _mean(values: Iterable[float]) -> tuple[float, float]:
    """The mean and its standard error; for values that are 0 or 1 the latter is sqrt(p (1 - p) / n)."""
    found = [float(value) for value in values]
    mean = fsum(found) / len(found)
    return mean, sqrt(fsum((value - mean) ** 2 for value in found)) / len(found)

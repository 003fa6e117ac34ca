"""One chosen hyperparameter: its value, its range, and why."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class SetBy(StrEnum):
    ADVICE = "advice"
    USER = "user"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A value with the range in which it is sound, one sentence of reason, and ids of evidence rows.

    `low` and `high` are None where a range has no meaning (names, switches).
    """

    value: Any
    low: Any = None
    high: Any = None
    reason: str
    evidence: tuple[str, ...] = ()
    set_by: SetBy = SetBy.ADVICE

"""Evidence: what was measured, shipped, ruled or claimed about hyperparameters, one row a fact (evidence.csv).

Grades: M measured sweep or controlled comparison · R recipe of a released run · V vendor's rule · T theory · D derived
here · F folklore. Access: P primary text read · A abstract only · S someone else's reading of it.
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import files
from types import MappingProxyType


class Grade(StrEnum):
    MEASURED = "M"
    RECIPE = "R"
    VENDOR = "V"
    THEORY = "T"
    DERIVED = "D"
    FOLKLORE = "F"


@dataclass(frozen=True, slots=True)
class Row:
    """One fact: for which method, family and size it holds, in which setting, how good it is, and where it is from."""

    id: str
    method: str
    family: str
    size: str
    variant: str
    hyperparameter: str
    value: str
    setting: str
    alpha_x_lr: str
    grade: str
    access: str
    source: str

    @property
    def grades(self) -> frozenset[Grade]:
        """Most rows have one grade; a few, such as `T+M`, two."""
        return frozenset(Grade(part) for part in self.grade.replace("/", "+").split("+"))


@cache
def rows() -> Mapping[str, Row]:
    """Every row by id, in the order of the file."""
    text = files("welltuned.advice").joinpath("evidence.csv").read_text(encoding="utf-8")
    found: dict[str, Row] = {}
    for record in csv.DictReader(text.splitlines()):
        row = Row(**record)
        if row.id in found:
            raise ValueError(f"evidence.csv has {row.id} twice")
        found[row.id] = row
    return MappingProxyType(found)


def row(id: str) -> Row:
    """The row of an id; a rule that cites what does not exist is a bug, so this raises KeyError."""
    return rows()[id]


def matching(
    *,
    hyperparameter: str | None = None,
    method: str | None = None,
    family: str | None = None,
    grade: Grade | None = None,
) -> tuple[Row, ...]:
    """Rows whose columns contain the given words (case ignored; `any` and `all` in a row match every word)."""

    def speaks_of(column: str, word: str | None) -> bool:
        return word is None or word.lower() in column.lower() or column.lower() in ("any", "all")

    return tuple(
        row
        for row in rows().values()
        if (hyperparameter is None or hyperparameter.lower() in row.hyperparameter.lower())
        and speaks_of(row.method, method)
        and speaks_of(row.family, family)
        and (grade is None or grade in row.grades)
    )


def unique(ids: Iterable[str]) -> tuple[str, ...]:
    """Ids in order of first mention, each checked to exist."""
    return tuple(row(id).id for id in dict.fromkeys(ids))

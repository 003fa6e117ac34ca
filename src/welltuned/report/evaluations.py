"""Evaluations as a page shows them: base beside tuned, what differs and how surely, and some replies."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from welltuned.errors import InputError
from welltuned.training.rundir import EVALUATIONS

REPLIES_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A line of the table, each value as text with its standard error; `better` is None where nothing is certain."""

    name: str
    base: str
    tuned: str
    gap: str
    better: bool | None
    left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One evaluation.

    Attributes:
        replies: some of them, spread over the rows; `answered` is how many there are.
    """

    number: int
    model: str
    data: str
    rows: int
    when: str
    sentence: str
    measures: tuple[Measure, ...]
    replies: tuple[Mapping[str, Any], ...]
    answered: int
    beside_base: bool


def read_evaluations(folder: Path) -> list[Evaluated]:
    """Those that are kept beneath a folder, the newest first.

    Raises:
        InputError: one is damaged.
    """
    found = sorted((int(p.stem), p) for p in (folder / EVALUATIONS).glob("*.json") if p.stem.isdigit())
    return [_read(number, path) for number, path in reversed(found)]


def _read(number: int, path: Path) -> Evaluated:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        replies, measures = kept["replies"], _measures(kept)
        spread = dict.fromkeys(int(i) for i in np.linspace(0, len(replies) - 1, REPLIES_SHOWN)) if replies else {}
        return Evaluated(
            number=number,
            model=str(kept["model"]),
            data=str(kept["data"]),
            rows=int(kept["rows"]),
            when=time.strftime("%Y-%m-%d %H:%M", time.localtime(float(kept.get("time") or 0))),
            sentence=_sentence(kept),
            measures=measures,
            replies=tuple({"prompt": "", "base": None, **replies[i]} for i in spread),
            answered=len(replies),
            beside_base=kept["base"] is not None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"it is no evaluation that can be read ({error})", where=str(path)) from error


def _measures(kept: Mapping[str, Any]) -> tuple[Measure, ...]:
    tuned, base, gaps = kept["tuned"], kept["base"], kept["difference"] or {}
    loss = {"value": tuned["loss"], "standard_error": tuned["standard_error"]}
    base_loss = None if base is None else {"value": base["loss"], "standard_error": base["standard_error"]}
    found = [_measure("loss", base_loss, loss, gaps.get("loss"), sign=-1, share=False)]
    perplexity = {"value": tuned["perplexity"], "standard_error": None}
    before = None if base is None else {"value": base["perplexity"], "standard_error": None}
    found.append(_measure("perplexity", before, perplexity, None, sign=-1, share=False))
    for name, value in tuned["metrics"].items():
        of_base = None if base is None else base["metrics"][name]
        found.append(_measure(name, of_base, value, gaps.get(name), sign=1, share=True, left_out=value["left_out"]))
    return tuple(found)


def _measure(
    name: str,
    base: Mapping[str, Any] | None,
    tuned: Mapping[str, Any],
    gap: Mapping[str, Any] | None,
    *,
    sign: int,
    share: bool,
    left_out: int = 0,
) -> Measure:
    def text(value: Mapping[str, Any] | None, *, signed: bool = False) -> str:
        return "" if value is None else _near(value["value"], value["standard_error"], share=share, signed=signed)

    return Measure(
        name=name,
        base=text(base),
        tuned=text(tuned),
        gap=text(gap, signed=True),
        better=None if gap is None else _better(gap, sign),
        left_out=left_out,
    )


def _better(gap: Mapping[str, Any], sign: int) -> bool | None:
    """Whether it got better by more than two standard errors, or worse; None within the noise, or of one row."""
    value, error = gap["value"], gap["standard_error"]
    if error is None or abs(value) <= 2 * error:
        return None
    return bool(sign * value > 0)


def _near(value: float | None, error: float | None, *, share: bool, signed: bool) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    sign = "+" if signed else ""
    if share:
        return f"{value:{sign}.1%}" + ("" if error is None else f" ± {error:.1%}")
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def _sentence(kept: Mapping[str, Any]) -> str:
    rows = f"{kept['rows']:,} {kept['data'] if kept['data'] == 'held-out rows' else 'rows of ' + str(kept['data'])}"
    gap = (kept["difference"] or {}).get("loss")
    if gap is None:
        tuned = kept["tuned"]
        return f"On {rows} the loss is {_near(tuned['loss'], tuned['standard_error'], share=False, signed=False)}."
    value, error = gap["value"], gap["standard_error"]
    better = _better(gap, -1)
    by = _near(abs(value), error, share=False, signed=False)
    if better is None:
        return f"On {rows} the tuned model's loss differs from its base's by {by}: within the noise of these rows."
    return f"On {rows} the tuned model's loss is {by} {'lower' if better else 'higher'} than its base's."

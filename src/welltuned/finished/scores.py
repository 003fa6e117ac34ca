"""How good replies are, row by row: exact, numbers, JSON, ROUGE-L and BLEU."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

import numpy as np

from welltuned.errors import InputError

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_FINAL = "####"  # GSM8K's mark before the final answer


class Metric(StrEnum):
    EXACT = "exact"
    NUMBER = "number"
    JSON = "json"
    ROUGE_L = "rougeL"
    BLEU = "bleu"


MEANING: Mapping[Metric, str] = {
    Metric.EXACT: "replies equal to the answer, surrounding whitespace aside",
    Metric.NUMBER: "replies whose last number is the answer's last number (after #### where there is one)",
    Metric.JSON: "replies that are one JSON object or list, and nothing else",
    Metric.ROUGE_L: "ROUGE-L, F-measure, mean over rows (rouge-score, with stemming)",
    Metric.BLEU: "BLEU of all replies together, 0 to 1 (sacrebleu's default)",
}
_PACKAGES = {Metric.ROUGE_L: ("rouge_score", "rouge-score"), Metric.BLEU: ("sacrebleu", "sacrebleu")}


@dataclass(frozen=True, slots=True)
class Score:
    """A metric over rows.

    Attributes:
        rows: how many rows it says something about; `left_out`: rows whose answer has nothing to compare.
        of_row: each row's value; for BLEU its leave-one-out pseudo-value.
    """

    metric: Metric
    value: float
    error: float
    rows: int
    left_out: int
    of_row: tuple[float, ...]


def require(metrics: Sequence[Metric]) -> None:
    """Refuse metrics whose packages are not installed, before any reply is generated."""
    for metric in metrics:
        module, package = _PACKAGES.get(metric, ("json", ""))
        if find_spec(module) is None:
            mend = f"pip install {package}, or pip install 'welltuned[eval]'"
            raise InputError(f"{metric} needs the package {package}", where="--metrics", mend=mend)


def score(metric: Metric, replies: Sequence[str], answers: Sequence[str]) -> Score:
    """Compare replies with the answers that the rows hold.

    Raises:
        InputError: no answer has anything that this metric compares (a number, for `number`).
    """
    if metric is Metric.BLEU:
        return _bleu(replies, answers)
    judge = _JUDGES[metric]()
    values = [judge(reply, answer) for reply, answer in zip(replies, answers, strict=True)]
    kept = tuple(value for value in values if value is not None)
    if not kept:
        raise InputError(f"no answer of these rows has what {metric} compares", where="--metrics", mend="leave it out")
    return Score(metric, float(np.mean(kept)), _standard_error(kept), len(kept), len(values) - len(kept), kept)


def _standard_error(values: Sequence[float]) -> float:
    n = len(values)
    return float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def difference(ours: Score, theirs: Score) -> tuple[float, float]:
    """(our value less theirs, its standard error over the same rows)."""
    gaps = np.asarray(ours.of_row) - np.asarray(theirs.of_row)
    return ours.value - theirs.value, _standard_error(gaps.tolist())


Judge = Callable[[str, str], float | None]


def _exact() -> Judge:
    return lambda reply, answer: float(reply.strip() == answer.strip())


def _number() -> Judge:
    def judge(reply: str, answer: str) -> float | None:
        wanted = last_number(answer)
        return None if wanted is None else float(last_number(reply) == wanted)

    return judge


def last_number(text: str) -> Decimal | None:
    """The last number of a text, the one after #### where there is one; commas between thousands do not count.

    >>> last_number("That makes 1,250.50 in all."), last_number("5 of them. #### 7 left")
    (Decimal('1250.50'), Decimal('7'))
    """
    _, mark, after = text.rpartition(_FINAL)
    found = _NUMBER.findall(after if mark else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if mark else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def _json() -> Judge:
    def judge(reply: str, answer: str) -> float:
        del answer
        try:
            return float(isinstance(json.loads(reply.strip(), parse_constant=_no_constant), dict | list))
        except (ValueError, RecursionError):
            return 0.0

    return judge


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _rouge() -> Judge:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda reply, answer: float(scorer.score(answer, reply)["rougeL"].fmeasure)


_JUDGES: Mapping[Metric, Callable[[], Judge]] = {
    Metric.EXACT: _exact,
    Metric.NUMBER: _number,
    Metric.JSON: _json,
    Metric.ROUGE_L: _rouge,
}


def _bleu(replies: Sequence[str], answers: Sequence[str]) -> Score:
    """BLEU is a ratio of sums over rows: its error is the jackknife's (Efron and Stein, 1981)."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU()
    rows = [bleu.corpus_score([r], [[a]]) for r, a in zip(replies, answers, strict=True)]
    counts = np.array([row.counts for row in rows]), np.array([row.totals for row in rows])
    lengths = np.array([[row.sys_len, row.ref_len] for row in rows])

    def of(keep: np.ndarray) -> float:
        system, reference = lengths[keep].sum(0).tolist()
        right, total = (part[keep].sum(0).tolist() for part in counts)
        score = BLEU.compute_bleu(correct=right, total=total, sys_len=system, ref_len=reference, smooth_method="exp")
        return float(score.score) / 100

    n = len(rows)
    whole = of(np.ones(n, bool))
    if n < 2:
        return Score(Metric.BLEU, whole, math.nan, n, 0, (whole,))
    without = np.array([of(np.arange(n) != i) for i in range(n)])
    pseudo = n * whole - (n - 1) * without
    return Score(Metric.BLEU, whole, _standard_error(pseudo.tolist()), n, 0, tuple(pseudo.tolist()))

"""Built-in rewards that compare a completion with the row's answer, or with a pattern. 1 is right, 0 is not."""

import re
from decimal import Decimal, InvalidOperation

# 1,234.5 or 1234 or .5, with a sign; not a part of a word or of a longer number such as 1.2.3.
_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?%?(?!\w|[.,]\d)"
)
_MARKED = re.compile(r"####\s*(.+)")  # GSM8K's mark of a final answer
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(r"^\s*([-+−]?)\s*(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|(\d+)\s*/\s*(\d+))\s*$")
TOLERANCE = Decimal("1e-6")  # of the larger number, or absolute below 1


def exact_match(completion: str, answer: str) -> float:
    """1 where the completion is the answer, white space around both aside."""
    return float(completion.strip() == answer.strip())


def numeric(completion: str, answer: str) -> float:
    """1 where the completion's final number is the answer's: see `final_number`."""
    said, wanted = final_number(completion), final_number(answer)
    if said is None or wanted is None:
        return 0.0
    return float(abs(said - wanted) <= TOLERANCE * max(Decimal(1), abs(said), abs(wanted)))


def final_number(text: str) -> Decimal | None:
    r"""The number that a text settles on: in its last \boxed{}, after its last ####, else its last number; or None.

    >>> final_number("so 1,234 apples, \\boxed{72}"), final_number("... #### -1,000"), final_number("no idea")
    (Decimal('72'), Decimal('-1000'), None)
    """
    boxed, marked = _BOXED.findall(text), _MARKED.findall(text)
    part = boxed[-1] if boxed else marked[-1] if marked else text
    fraction = _FRACTION.match(part)
    if fraction is not None:
        above, below = (Decimal(fraction[i] or fraction[i + 2]) for i in (2, 3))
        return None if not below else above / below * (-1 if fraction[1] in ("-", "−") else 1)
    found = _NUMBER.findall(part)
    if not found:
        return None
    digits = found[-1].replace(",", "").replace("$", "").replace("−", "-").rstrip("%")
    try:
        return Decimal(digits)
    except InvalidOperation:
        return None


def matches(pattern: "re.Pattern[str]", completion: str) -> float:
    """1 where the pattern is found in the completion; ^ and $ tie it to the ends, and . takes line ends too."""
    return float(pattern.search(completion) is not None)

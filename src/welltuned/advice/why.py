"""Why a hyperparameter has its value: the rule in words, rows for it, rows against it, and what would settle it.

The words are data (why.yaml), their numbers come from rules.yaml, and the rows from evidence.csv. Whether a published
learning rate really contradicts the rule is computed, not claimed: the rule is asked for the rate in that row's own
setting (alpha, batch, updates, size), and the two are compared there.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

from welltuned.advice.codec import to_plain
from welltuned.advice.evidence import Row, row, unique
from welltuned.advice.learning_rate import Rate, RateSetting, full_rate, lora_rate, two_digits
from welltuned.advice.plan import Plan
from welltuned.advice.rate import choose_rate, rate_setting
from welltuned.advice.rules import cited, number, rule
from welltuned.advice.settle import shown, size_words
from welltuned.choice import Choice
from welltuned.errors import InputError
from welltuned.recipe import KEYS, Method, Tune, YamlLoader

JUST_OUTSIDE = 1.1  # from here on a factor is worth a number


class Because(StrEnum):
    """Why a row and the rule differ."""

    UNITS = "units"
    BATCH = "batch"
    UPDATES = "updates"
    METHOD = "method"
    SIZE = "size"
    SUPERSEDED = "superseded"
    FOLKLORE = "folklore"
    UNTUNED = "untuned"
    AIM = "aim"


MEANING: Mapping[Because, str] = MappingProxyType(
    {
        Because.UNITS: "another unit: a larger alpha, or another scaling by r, wants a lower rate",
        Because.BATCH: "another batch size",
        Because.UPDATES: "a run of another length",
        Because.METHOD: "another method, or full fine-tuning instead of LoRA",
        Because.SIZE: "models of another size",
        Because.SUPERSEDED: "withdrawn, or replaced by something better measured",
        Because.FOLKLORE: "no data behind it",
        Because.UNTUNED: "compared at one rate, or not compared",
        Because.AIM: "another aim than the lowest held-out loss of this run",
    }
)


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a published learning rate (or the ends of a range of them) was used."""

    rates: tuple[float, ...]
    tune: Tune
    run: RateSetting


@dataclass(frozen=True, slots=True)
class Against:
    row: Row
    because: tuple[Because, ...]
    says: str
    at: Setting | None


@dataclass(frozen=True, slots=True)
class Converted:
    """The rule's own rate and range in a row's setting. `off` is 1 inside the range, else how far outside it."""

    at: Setting
    value: float
    low: float
    high: float
    off: float

    @property
    def agrees(self) -> bool:
        return self.off == 1

    def sentence(self) -> str:
        run = self.at.run
        alpha = "in full" if self.at.tune is Tune.FULL else f"at alpha {shown(run.alpha)}"
        where = f"{alpha}, {_size(run.parameters)}, {run.updates:,} updates of {run.batch}"
        ruled = f"{where} the rule gives {shown(self.value)} ({shown(self.low)}–{shown(self.high)})"
        if self.agrees:
            return f"{ruled}: they agree"
        side, times = ("above", self.off) if self.off > 1 else ("below", 1 / self.off)
        how_far = f"{times:.2g} times" if times >= JUST_OUTSIDE else "just"
        return f"{ruled}: {how_far} {side} that range"


@dataclass(frozen=True, slots=True)
class Entry:
    """What there is to say about a key, for some methods and tunes. `rules` are names in rules.yaml.

    `evidence` are all rows for it, `lead` those of them that a screen shows first.
    """

    key: str
    methods: tuple[Method, ...]
    tunes: tuple[Tune, ...]
    short: str
    rule: str
    rules: tuple[str, ...]
    evidence: tuple[str, ...]
    lead: tuple[str, ...]
    against: tuple[Against, ...]
    settle: str

    def speaks_of(self, method: Method, tune: Tune) -> bool:
        return method in self.methods and tune in self.tunes


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def entries() -> Mapping[str, tuple[Entry, ...]]:
    """Every key's entries, in the order of why.yaml."""
    text = files("welltuned.advice").joinpath("why.yaml").read_text(encoding="utf-8")
    document: dict[str, list[dict[str, Any]]] = yaml.load(text, Loader=YamlLoader)
    return MappingProxyType({key: tuple(_entry(key, item) for item in items) for key, items in document.items()})


def _entry(key: str, item: Mapping[str, Any]) -> Entry:
    methods = tuple(Method(name) for name in item.get("methods", Method))
    evidence = unique((*cited(*item["rules"]), *item.get("also", ())))
    lead = item.get("lead") or [rule(name).evidence[0] for name in item["rules"]] or evidence
    return Entry(
        key=key,
        methods=methods,
        tunes=tuple(Tune(name) for name in item.get("tunes", Tune)),
        short=filled(item["short"]),
        rule=filled(item["rule"]),
        rules=tuple(item["rules"]),
        evidence=evidence,
        lead=unique(lead),
        against=tuple(_against(one) for one in item["against"]),
        settle=filled(item["settle"]),
    )


def _against(item: Mapping[str, Any]) -> Against:
    because = tuple(Because(name) for name in item["because"])
    return Against(row(item["row"]), because, item["says"], _setting(item["at"]) if "at" in item else None)


def _setting(at: Mapping[str, Any]) -> Setting:
    rates = at["rate"] if isinstance(at["rate"], list) else [at["rate"]]
    run = {"family": "llama", **{key: value for key, value in at.items() if key not in ("rate", "tune")}}
    run["parameters"] = int(run["parameters"])
    return Setting(tuple(rates), Tune(at.get("tune", Tune.LORA)), RateSetting(**run))


_NUMBER = re.compile(r"\{(\w+)(?:\.([\w.+]+))?(%?)\}")


def filled(text: str) -> str:
    """The text with every {rule} as that rule's value in words, {rule.low} as its part, {rule%} in per cent."""

    def value(found: re.Match[str]) -> str:
        name, part, per_cent = found.groups()
        spec = rule(name)
        if part is None:
            some = spec.value
        else:
            some = spec.value[part] if isinstance(spec.value, dict) else {"low": spec.low, "high": spec.high}[part]
        return f"{shown(100.0 * some)} %" if per_cent else in_words(name, some)

    return _NUMBER.sub(value, text)


def in_words(name: str, value: Any) -> str:
    """A rule's value as people say it: thresholds by rows, points by size, lists."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if not isinstance(value, list):
        return _size(value) if isinstance(value, float) and value >= 1e6 else shown(value)
    if not isinstance(value[0], list):
        return f"{', '.join(shown(item) for item in value[:-1])} or {shown(value[-1])}"
    if name.endswith("_by_rows"):
        steps = [f"{shown(item)} below {limit:,} rows" for limit, item in value if limit is not None]
        return f"{', '.join(steps)}, {shown(value[-1][1])} above"
    return ", ".join(f"{shown(item)} at {_size(size)}" for size, item in value)


def _size(count: float) -> str:
    """8B, 1.2B, 360M."""
    return size_words(round(count)).replace(".0B", "B")


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def why(key: str, method: Method | None = None, tune: Tune | None = None) -> tuple[Entry, ...]:
    """The entries of a key that speak of this method and this tune; None means any.

    Raises:
        InputError: no such key (the nearest is named), or none that this method or tune has.
    """
    if key not in entries():
        raise _unknown(key)
    found = [
        entry
        for entry in entries()[key]
        if (method is None or method in entry.methods) and (tune is None or tune in entry.tunes)
    ]
    if not found:
        asked = " ".join(str(word) for word in (method, tune) if word is not None)
        of_method = [entry for entry in entries()[key] if method is None or method in entry.methods]
        names = [name for e in of_method or entries()[key] for name in (e.tunes if of_method else e.methods)]
        has = ", ".join(dict.fromkeys(names))
        raise InputError(f"{key} has no meaning with {asked}", where="why", mend=f"it belongs to {has}")
    return tuple(found)


def _unknown(key: str) -> InputError:
    nearest = get_close_matches(key, list(entries()), n=1, cutoff=0.6)
    mend = f"did you mean '{nearest[0]}'?" if nearest else "`welltuned why` lists all of them"
    if key in KEYS and not nearest:
        return InputError(f"'{key}' is yours to say: {KEYS[key].doc.rstrip('.')}", where="why", mend=mend)
    return InputError(f"unknown hyperparameter '{key}'", where="why", mend=mend)


def converted(entry: Entry, against: Against) -> Converted | None:
    """What the rule gives in the row's own setting, and how far the row's rate is outside of its range there.

    A range of rates counts as its middle (in logarithms). None where the row has no rate that could be converted.
    """
    at = against.at
    if at is None:
        return None
    method = entry.methods[0]
    ours = choose_rate(method, at.tune, at.run, rows=0)
    theirs = math.sqrt(at.rates[0] * at.rates[-1])
    off = theirs / ours.low if theirs < ours.low else theirs / ours.high if theirs > ours.high else 1.0
    return Converted(at, ours.value, ours.low, ours.high, off)


# ── the learning rate's table, and its factors ───────────────────────────────────────────────────────────────────────

SIZES: Mapping[str, int] = MappingProxyType({"135M": 134_515_008, "1B": 10**9, "8B": 8 * 10**9, "70B": 70 * 10**9})
UPDATES = (40, 200, 1000)
TABLE = RateSetting(family="llama", parameters=0, batch=16, updates=0, r=16, alpha=32.0)


@dataclass(frozen=True, slots=True)
class RateRow:
    """The law for one size: a rate for each of `UPDATES`, two digits each."""

    size: str
    lora: tuple[float, ...]
    full: tuple[float, ...]


def rate_table(setting: RateSetting = TABLE, sizes: Mapping[str, int] = SIZES) -> tuple[RateRow, ...]:
    """The supervised law at several sizes and lengths of run, at the setting's family, rank, alpha and batch."""
    rows = []
    for name, parameters in sizes.items():
        runs = [replace(setting, parameters=parameters, updates=updates) for updates in UPDATES]
        rows.append(
            RateRow(
                size=name,
                lora=tuple(two_digits(lora_rate(run).value) for run in runs),
                full=tuple(two_digits(full_rate(run).value) for run in runs),
            )
        )
    return tuple(rows)


def setting_of(plan: Plan) -> RateSetting:
    """What the plan's learning rate depends on."""
    return rate_setting(plan.facts.model, plan.choices, plan.value("effective_batch_size"), plan.updates)


def factors(plan: Plan) -> list[tuple[str, float]]:
    """What the plan's advised rate is made of: a start and factors, whose product it is before limits and rounding."""
    if plan.recipe.method is not Method.SFT:
        return []
    setting, full = setting_of(plan), plan.recipe.tune is Tune.FULL
    rate: Rate = full_rate(setting) if full else lora_rate(setting)
    start = "between LoRA's rate / 10 and recipes" if full else f"the sweep's law at r {setting.r}"
    found = [(f"{start}, {size_words(setting.parameters)} {setting.family}", rate.base)]
    if not full:
        found.append(
            (f"alpha {shown(setting.alpha_equivalent)} instead of {number('rate_alpha'):.0f}", rate.alpha_factor)
        )
    found.append((f"batches of {setting.batch} instead of {number('rate_batch'):.0f}", rate.batch_factor))
    found.append((f"{setting.updates:,} updates instead of {number('rate_updates'):.0f}", rate.updates_factor))
    product = rate.base * rate.alpha_factor * rate.batch_factor * rate.updates_factor
    if rate.limited:
        found.append((rate.limited, rate.value / product))
    if plan.facts.dataset.is_text:
        found.append(("plain texts, to forget less", number("rate_text_factor")))
    return found


# ── as plain values ──────────────────────────────────────────────────────────────────────────────────────────────────


def to_json(found: Sequence[Entry], plan: Plan | None = None) -> dict[str, Any]:
    """The document of `why KEY --json`: {key, rules: [...], table, here}; `here` is null without a plan."""
    key = found[0].key
    document: dict[str, Any] = {
        "key": key,
        "rules": [_entry_json(entry) for entry in found],
        "table": None,
        "here": None,
    }
    if key == "learning_rate":
        document["table"] = {
            "setting": {"family": TABLE.family, "batch": TABLE.batch, "r": TABLE.r, "lora_alpha": TABLE.alpha},
            "updates": list(UPDATES),
            "rates": [{"size": line.size, "lora": list(line.lora), "full": list(line.full)} for line in rate_table()],
        }
    if plan is not None:
        choice = here(key, plan)
        document["here"] = {
            "value": choice.value,
            "low": choice.low,
            "high": choice.high,
            "reason": choice.reason,
            "evidence": list(choice.evidence),
            "set_by": str(choice.set_by),
            "factors": [{"what": what, "factor": factor} for what, factor in factors(plan)]
            if document["table"]
            else [],
        }
    return document


def here(key: str, plan: Plan) -> Choice:
    """The plan's choice.

    Raises:
        InputError: the plan makes none of this name.
    """
    if key not in plan.choices:
        what = f"{key} is not chosen for {plan.recipe.method} with {plan.recipe.tune}"
        raise InputError(what, where="why", mend="leave the model and the data out to read the rule alone")
    return plan.choices[key]


def all_keys_json() -> dict[str, Any]:
    """The document of `why --json`."""
    return {"keys": [{"key": key, "rules": [_head(entry) for entry in found]} for key, found in entries().items()]}


def _head(entry: Entry) -> dict[str, Any]:
    tunes = [str(tune) for tune in entry.tunes]
    return {"methods": [str(method) for method in entry.methods], "tunes": tunes, "short": entry.short}


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        **_head(entry),
        "rule": entry.rule,
        "numbers": {
            name: {"value": rule(name).value, "low": rule(name).low, "high": rule(name).high} for name in entry.rules
        },
        "for": [to_plain(row(id)) for id in entry.evidence],
        "against": [_against_json(entry, against) for against in entry.against],
        "settle": entry.settle,
    }


def _against_json(entry: Entry, against: Against) -> dict[str, Any]:
    compared = converted(entry, against)
    return {
        **to_plain(against.row),
        "because": [str(reason) for reason in against.because],
        "says": against.says,
        "converted": None
        if compared is None
        else {"value": compared.value, "low": compared.low, "high": compared.high, "off": compared.off},
    }

"""Rewards by name or path, and what they say of completions. A reward that fails is told of, and never ends a run.

A function of the user's, `file.py:name`, asks by the names of its parameters for what it needs:

    def score(completion, answer): ...             one completion at a time; returns a number
    def score(completions, prompts, answer): ...   lists, an item for each completion; returns as many numbers

`completion` is the sampled text without its end token. Besides it: `prompt` (the text of the last message), `messages`,
`answer` (the row's reference answer), `row` (all of its columns) and every column by its name; with `completions` each
is a list, also under the plurals `prompts`, `answers` and `rows`. `**columns` takes all columns. None instead of a
number means that the reward does not apply to that completion: it is left out of the sum.
"""

import importlib.util
import math
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat

from welltuned.errors import InputError
from welltuned.objectives.rewards.answers import exact_match, matches, numeric
from welltuned.objectives.rewards.schema import json_schema, read_schema

_COMPARING = {"exact_match": exact_match, "numeric": numeric}
BUILT_IN = (*_COMPARING, "regex:PATTERN", "json_schema:FILE")
_SINGULAR = {"prompts": "prompt", "answers": "answer", "rows": "row"}
_GIVEN = ("prompt", "messages", "answer", "row")


@dataclass(frozen=True, slots=True)
class Judged:
    """A completion, and all that a reward may ask about it."""

    completion: str
    prompt: str
    messages: Sequence[Mapping[str, Any]]
    answer: str | None
    row: Mapping[str, Any]
    origin: str

    def get(self, name: str) -> Any:
        match name:
            case "completion" | "completions":
                return self.completion
            case "prompt":
                return self.prompt
            case "messages":
                return self.messages
            case "row":
                return self.row
            case "answer":  # a column of this name as it is, else what was found to be the reference answer
                return self.row.get("answer", self.answer)
        return self.row.get(name)


@dataclass(frozen=True, slots=True)
class Reward:
    """`call` gives one value a completion, whatever the user's function returned.

    Attributes:
        asks: what the user's function cannot do without, as it names it; `where` is its file.
        needs_answer: whether it compares with the row's reference answer.
    """

    name: str
    weight: float
    call: Callable[[Sequence[Judged]], Sequence[Any]]
    asks: tuple[str, ...] = ()
    where: str = ""
    needs_answer: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """A reward that gave no usable number for a completion of this row."""

    reward: str
    origin: str
    what: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards of n completions.

    Attributes:
        total: [n] the weighted sums; NaN where a reward failed, or none applies: such a completion is not compared.
        each: by reward, [n]; NaN where it failed or does not apply.
    """

    total: tuple[float, ...]
    each: Mapping[str, tuple[float, ...]]
    faults: tuple[Fault, ...]


def score(rewards: Sequence[Reward], samples: Sequence[Judged]) -> Scores:
    """What all rewards say of all completions."""
    total, applies, broken = [0.0] * len(samples), [False] * len(samples), [False] * len(samples)
    each: dict[str, tuple[float, ...]] = {}
    faults: list[Fault] = []
    for reward in rewards:
        values = []
        for i, value in enumerate(_values(reward, samples) if samples else []):
            number = math.nan
            if isinstance(value, Fault):
                faults.append(value)
                broken[i] = True
            elif value is not None:
                number = value
                total[i] += reward.weight * value
                applies[i] = True
            values.append(number)
        each[reward.name] = tuple(values)
    told = (math.nan if bad or not any_ else t for t, any_, bad in zip(total, applies, broken, strict=True))
    return Scores(tuple(told), each, tuple(faults))


def _values(reward: Reward, samples: Sequence[Judged]) -> list[float | None | Fault]:
    """One value a completion. Where a call for all fails, each is judged by itself: only the guilty are lost."""
    try:
        return [_number(reward, value, s) for value, s in zip(_called(reward, samples), samples, strict=True)]
    except Exception as error:  # whatever a stranger's function may raise
        if len(samples) == 1:
            return [Fault(reward.name, samples[0].origin, _told(error))]
        return [value for sample in samples for value in _values(reward, [sample])]


def _called(reward: Reward, samples: Sequence[Judged]) -> Sequence[Any]:
    values = reward.call(samples)
    if (
        isinstance(values, str | bytes | Mapping)
        or not isinstance(values, Collection)
        and not hasattr(values, "tolist")
    ):
        raise TypeError(f"it returned {type(values).__name__}, not a list of numbers")
    listed = list(values)
    if len(listed) != len(samples):
        raise ValueError(f"it returned {len(listed)} numbers for {len(samples)} completions")
    return listed


def _number(reward: Reward, value: Any, sample: Judged) -> float | None | Fault:
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        return Fault(reward.name, sample.origin, f"it returned {type(value).__name__}, not a number")
    number = float(value)
    return number if math.isfinite(number) else Fault(reward.name, sample.origin, f"it returned {number}")


def _told(error: Exception) -> str:
    """The error and the line of the user's file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(str(Path(__file__).parent))]
    at = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:200] + at


# ── finding them ─────────────────────────────────────────────────────────────────────────────────────────────────────


def load_rewards(specs: Sequence[str], weights: Sequence[float] | None = None) -> tuple[Reward, ...]:
    """The rewards that a recipe names, each with its weight (1 where none are given).

    Raises:
        InputError: one that is not there or cannot be called; nothing is called.
    """
    if not specs:
        mend = f"name a function, such as rewards.py:score, or one of {', '.join(BUILT_IN)}"
        raise InputError("grpo needs something that rewards answers", where="rewards", mend=mend)
    names: Counter[str] = Counter()
    rewards = []
    for spec, weight in zip(specs, weights or [1.0] * len(specs), strict=True):
        reward = _load(spec, weight)
        names[reward.name] += 1
        again = f"_{names[reward.name]}" if names[reward.name] > 1 else ""
        rewards.append(replace(reward, name=reward.name + again))
    return tuple(rewards)


def require_columns(rewards: Sequence[Reward], columns: Collection[str]) -> None:
    """Raises InputError where a function asks for a column that the rows do not have."""
    for reward in rewards:
        for name in reward.asks:
            if _SINGULAR.get(name, name) not in _GIVEN and name not in columns:
                mend = f"the columns are {', '.join(columns)}; besides them there are {', '.join(_GIVEN)}"
                what = f"`{reward.name}` asks for `{name}`, which rows do not have"
                raise InputError(what, where=reward.where, mend=mend)


def _load(spec: str, weight: float) -> Reward:
    kind, _, rest = spec.partition(":")
    if spec in _COMPARING:
        compare = _COMPARING[spec]
        return Reward(spec, weight, partial(_compared, compare), needs_answer=True)
    if kind == "regex":
        try:
            pattern = re.compile(rest, re.DOTALL)
        except re.error as error:
            raise InputError(f"the pattern '{rest}' is no regular expression ({error})", where="rewards") from error
        return Reward("regex", weight, lambda samples: [matches(pattern, s.completion) for s in samples])
    if kind == "json_schema":
        if not rest:
            raise InputError("json_schema names no file", where="rewards", mend="write json_schema:FILE")
        schema = read_schema(Path(rest).expanduser())
        return Reward("json_schema", weight, lambda samples: [json_schema(schema, s.completion) for s in samples])
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        return _own(Path(path).expanduser(), name, weight)
    if spec.endswith(".py"):
        raise InputError(f"'{spec}' names no function", where="rewards", mend=f"write {spec}:FUNCTION")
    near = get_close_matches(spec, BUILT_IN, n=1, cutoff=0.5)
    mend = f"did you mean {near[0]}?" if near else f"file.py:function, or one of {', '.join(BUILT_IN)}"
    raise InputError(f"'{spec}' is no reward", where="rewards", mend=mend)


def _compared(compare: Callable[[str, str], float], samples: Sequence[Judged]) -> list[float | None]:
    """None, which is no number, for a row without an answer: it cannot be judged by it."""
    return [None if s.answer is None else compare(s.completion, s.answer) for s in samples]


def _own(path: Path, name: str, weight: float) -> Reward:
    module = _module(path)
    function = vars(module).get(name)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = get_close_matches(name, known, n=1)
        mend = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'no functions'}"
        raise InputError(f"there is no function `{name}` in the reward file", where=str(path), mend=mend)
    asked = _asked(function, name, path)
    return Reward(name, weight, partial(_call_own, function, asked), asked.needed, str(path))


def _module(path: Path) -> ModuleType:
    """The user's file, run once under a name of its own."""
    if not path.is_file():
        raise InputError("there is no such reward file", where=str(path), mend="give its path from where you start")
    name = f"welltuned_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"the reward file cannot be run ({_told(error)})", where=str(path)) from error
    return module


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a function takes: parameters by name, those it needs, whether lists, whether all columns besides."""

    names: tuple[str, ...]
    needed: tuple[str, ...]
    lists: bool
    every: bool


def _asked(function: Callable[..., Any], name: str, path: Path) -> _Asked:
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"`{name}` has no readable parameters", where=str(path)) from error
    named = [p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
    lists = any(p.name == "completions" for p in named)
    if lists == any(p.name == "completion" for p in named):
        mend = f"def {name}(completion, answer) or def {name}(completions, prompts, **columns)"
        raise InputError(f"`{name}` takes neither `completion` nor `completions`", where=str(path), mend=mend)
    needed = tuple(p.name for p in named if p.default is Parameter.empty and not p.name.startswith("completion"))
    return _Asked(tuple(p.name for p in named), needed, lists, any(p.kind is Parameter.VAR_KEYWORD for p in parameters))


def _call_own(function: Callable[..., Any], asked: _Asked, samples: Sequence[Judged]) -> Sequence[Any]:
    if not asked.lists:
        return [function(**{name: s.get(name) for name in _names(asked, [s])}) for s in samples]
    given = {name: [s.get(_SINGULAR.get(name, name)) for s in samples] for name in _names(asked, samples)}
    values: Sequence[Any] = function(**given)
    return values


def _names(asked: _Asked, samples: Sequence[Judged]) -> list[str]:
    """The arguments of a call: a parameter with a default only where there is a value for it."""
    columns = dict.fromkeys(key for s in samples for key in s.row)
    here = {*columns, *_GIVEN, "completion", "completions", *(_SINGULAR if asked.lists else ())}
    names = [name for name in asked.names if name in asked.needed or name in here]
    if asked.every:
        names += [name for name in ("prompts" if asked.lists else "prompt", *columns) if name not in names]
    return names

"""Rewards: what they are given, what they may return, and that a broken one is told of and ends nothing."""

import json
import math

import pytest

from welltuned.errors import InputError
from welltuned.objectives.rewards import Judged, load_rewards, require_columns, score
from welltuned.objectives.rewards.answers import final_number
from welltuned.objectives.rewards.schema import json_schema, read_schema


def judged(completion="four", answer="4", **row):
    messages = [{"role": "user", "content": "2+2?"}]
    return Judged(completion, "2+2?", messages, answer, {"answer": answer, **row}, "data.jsonl:1")


@pytest.fixture
def write(tmp_path):
    def function(text, name="rewards.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return function


def values(spec, *samples, weights=None):
    return score(load_rewards([spec] if isinstance(spec, str) else spec, weights), samples)


# ── built in ──


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"), ("72", "72"), ("1,234 apples", "1234"), ("#### 72", "72"),
        ("first 5, then #### -1,000 ", "-1000"), (r"so \boxed{72} of 100", "72"), (r"\boxed{\frac{3}{4}}", "0.75"),
        ("$1,234.50!", "1234.50"), ("x=-5", "-5"), ("−7", "-7"), ("12-5", "5"), (".5", "0.5"), ("10%", "10"),
        ("1e3", "1000"), ("3 + 4 = 7", "7"), ("two", None), ("1.2.3", None), ("a12b", None), ("", None),
    ],
)  # fmt: skip
def test_final_number(text, number):
    found = final_number(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


def test_built_in_rewards():
    assert values("numeric", judged("it is 4."), judged("5"), judged("no")).total == (1.0, 0.0, 0.0)
    assert values("numeric", judged("1,000.0", "#### 1000")).total == (1.0,)
    assert values("exact_match", judged(" 4\n"), judged("4.")).total == (1.0, 0.0)
    assert values(r"regex:^\d+$", judged("12"), judged("12 "), judged("a\n12")).total == (1.0, 0.0, 0.0)


def test_json_schema(write):
    schema = {
        "type": "object",
        "required": ["city", "count"],
        "properties": {
            "city": {"type": "string", "minLength": 2},
            "count": {"type": "integer", "minimum": 1},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
            "at": {"$ref": "#/$defs/place"},
        },
        "additionalProperties": False,
        "$defs": {"place": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^x"}]}},
    }
    spec = "json_schema:" + write(json.dumps(schema), "schema.json")
    good = ['{"city": "Rome", "count": 2}', '```json\n{"city": "Rome", "count": 2, "tags": ["a"], "at": "xy"}\n```']
    bad = ["Rome", "{}", '{"city": "R", "count": 2}', '{"city": "Rome", "count": true}', '{"city": "Rome", "count": 0}']
    bad += ['{"city": "Rome", "count": 1, "more": 1}', '{"city": "Rome", "count": 1, "tags": ["c"]}']
    bad += ['{"city": "Rome", "count": 1, "at": "y"}', '{"city": "Rome", "count": 1.5}']
    found = values(spec, *(judged(text) for text in (*good, *bad))).total
    assert found == (1.0,) * len(good) + (0.0,) * len(bad)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"patternProperties": {}}, "patternProperties"),
        ({"properties": {"a": {"type": "text"}}}, "type 'text'"),
        ({"items": {"$ref": "#/$defs/no"}}, "not in it"),
        ([1], "is an object"),
    ],
)
def test_a_schema_that_would_be_half_understood_is_refused(write, tmp_path, schema, said):
    write(json.dumps(schema), "schema.json")
    with pytest.raises(InputError, match=said):
        read_schema(tmp_path / "schema.json")


def test_true_is_not_one():
    assert json_schema({"enum": [1]}, "true") == 0.0
    assert json_schema({"const": 1}, "1") == 1.0


# ── functions of the user's ──


def test_a_function_gets_what_its_parameters_name(write):
    path = write(
        "def one(completion, prompt, answer, row, level, bonus=0.5):\n"
        "    assert (prompt, answer, row['level']) == ('2+2?', '4', level)\n"
        "    return len(completion) + level + bonus\n"
        "def lists(completions, prompts, answer, level):\n"
        "    assert len(prompts) == len(answer) == len(completions)\n"
        "    return [c.count('o') + x for c, x in zip(completions, level)]\n"
        "def everything(completions, **columns):\n"
        "    assert set(columns) == {'prompts', 'answer', 'level'}\n"
        "    return [1 for _ in completions]\n"
    )
    samples = (judged("foo", level=2), judged("x", level=3))
    assert values(f"{path}:one", *samples).total == (5.5, 4.5)
    assert values(f"{path}:lists", *samples).total == (4.0, 3.0)
    assert values(f"{path}:everything", *samples).total == (1.0, 1.0)


def test_rewards_are_weighed_and_summed(write):
    path = write("def a(completion): return 1\ndef b(completion): return 10\n")
    found = values([f"{path}:a", f"{path}:b", "numeric"], judged("4"), weights=[2.0, 0.5, 1.0])
    assert found.total == (8.0,)
    assert found.each == {"a": (1.0,), "b": (10.0,), "numeric": (1.0,)}


def test_none_means_that_a_reward_does_not_apply(write):
    path = write("def a(completion): return None if completion == 'x' else 2.0\n")
    both = [f"{path}:a", "regex:x"]
    assert values(both, judged("x"), judged("xy")).total == (1.0, 3.0)
    alone = values(both[:1], judged("x"))
    assert math.isnan(alone.total[0]) and not alone.faults


FAULTS = {
    "raises": ("if completion == 'bad': raise KeyError('level')\n    return 1.0", "KeyError"),
    "nan": ("return float('nan') if completion == 'bad' else 1.0", "nan"),
    "infinite": ("return float('inf') if completion == 'bad' else 1.0", "inf"),
    "text": ("return '1.0' if completion == 'bad' else 1.0", "str"),
    "list": ("return [1.0] if completion == 'bad' else 1.0", "list"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_costs_its_own_completion_and_is_told(write, kind):
    body, said = FAULTS[kind]
    path = write(f"def a(completion):\n    {body}\n")
    found = values([f"{path}:a", "regex:."], judged("good"), judged("bad"), judged("fine"))
    assert found.total[0] == found.total[2] == 2.0
    assert math.isnan(found.total[1])
    [fault] = found.faults
    assert (fault.reward, fault.origin) == ("a", "data.jsonl:1")
    assert said in fault.what


def test_a_call_for_many_that_fails_is_made_for_each(write):
    path = write("def a(completions):\n    return [1 / len(c) for c in completions]\n")
    found = values(f"{path}:a", judged("ab"), judged(""), judged("abcd"))
    assert found.total[::2] == (0.5, 0.25)
    assert "ZeroDivisionError" in found.faults[0].what and "rewards.py:2" in found.faults[0].what


@pytest.mark.parametrize("returned", ["1.0", "[1.0]", "None", "{}", "'ab'"])
def test_a_wrong_number_of_numbers_is_a_fault_of_every_completion(write, returned):
    found = values(f"{write(f'def a(completions): return {returned}')}:a", judged("a"), judged("b"))
    if returned == "[1.0]":  # by itself each completion has its number
        assert found.total == (1.0, 1.0)
    else:
        assert len(found.faults) == 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ([], "something that rewards"),
        (["nowhere.py:score"], "no such reward file"),
        (["FILE:skore"], "did you mean score"),
        (["FILE"], "names no function"),
        (["numerik"], "did you mean numeric"),
        (["regex:("], "no regular expression"),
        (["json_schema:nowhere.json"], "cannot be read"),
        (["FILE:neither"], "neither `completion` nor `completions`"),
        (["BROKEN:score"], "cannot be run .*ZeroDivisionError"),
    ],
)
def test_what_cannot_be_called_is_refused_in_one_sentence(write, spec, said):
    path = write("def score(completion): return 1\ndef neither(text): return 1\n")
    broken = write("x = 1 / 0\n", "broken.py")
    with pytest.raises(InputError, match=said):
        load_rewards([s.replace("FILE", path).replace("BROKEN", broken) for s in spec])


def test_a_column_that_rows_do_not_have_is_refused_before_the_run(write):
    path = write("def score(completion, level, more=1): return 1\ndef fine(completions, prompts, answer): return 1\n")
    with pytest.raises(InputError, match="asks for `level`"):
        require_columns(load_rewards([f"{path}:score"]), ["prompt", "answer"])
    require_columns(load_rewards([f"{path}:fine"]), ["prompt"])

"""Whatever JSON a row holds: it is read, or it is one InputError whose sentence can be printed."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from welltuned.data.conversation import Conversation
from welltuned.data.formats import Format, detect, to_conversation, to_judged, to_preference, to_prompt
from welltuned.data.source import Row
from welltuned.data.variants import NAMES, VARIANTS
from welltuned.errors import InputError

COLUMNS = sorted({c for v in VARIANTS for c in (*v.required.values(), *(c for cs in v.optional.values() for c in cs))})
WORDS = ["role", "content", "from", "value", "type", "text", "user", "assistant", "human", "gpt", "system", "tool"]
MORE_WORDS = [
    "tool_calls",
    "function",
    "function_call",
    "name",
    "arguments",
    "train",
    "weight",
    "image",
    "true",
    "",
    " ",
]
texts = st.sampled_from(
    [*WORDS, *MORE_WORDS, "\ud800", "\0", "\n\nHuman: q\n\nAssistant: a", '{"name": "f"}', "[", "[]"]
)
anything = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.text(max_size=5))
values = st.recursive(
    anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
columns = st.sampled_from(COLUMNS) | st.text(max_size=3)
records = st.dictionaries(columns, values, max_size=5)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "q"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "r", "name": "f"},
    {"role": "assistant", "content": "a", "reasoning_content": "t", "train": True},
]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}', "weight": 0}]
REPLY = {"from": "gpt", "value": "a"}
VALID = [
    {"messages": CHAT, "tools": [{"name": "f", "parameters": {}}], "label": True},
    {"messages": CHAT, "system": "s", "answer": 4},
    {"conversations": [*SHAREGPT, REPLY], "tools": '[{"name": "f"}]', "system": "s"},
    {"conversations": SHAREGPT[:1], "chosen": REPLY, "rejected": {"from": "gpt", "value": "b"}},
    {"chosen": CHAT, "rejected": [*CHAT[:-1], {"role": "assistant", "content": "b"}], "prompt": "q", "system": "s"},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"prompt": "q", "completion": "a", "label": 1},
    {"prompt": CHAT[:2], "completion": CHAT[2:]},
    {"prompt": "q", "response": "a", "system_prompt": "s"},
    {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]], "system": "s"},
    {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b", "history": [["q", "a"]]},
    {"question": "q", "answer": "a"},
    {"problem": "q", "ground_truth": 4},
    {"text": "t"},
]


def read_all(data: list[Row], **options) -> int:
    """Read every row in every way, where only InputError may be raised; the number of conversations."""
    found = 0
    try:
        detected = detect(data, **options)
        detected.sentence().encode()
    except InputError as error:
        assert_sentence(error)
        return 0
    for row in data:
        before = copy.deepcopy(row.record)
        for reader in (to_conversation, to_preference, to_judged, to_prompt):
            try:
                result = reader(row, detected)
            except InputError as error:
                assert_sentence(error)
                continue
            if isinstance(result, Conversation):
                found += 1
                assert_sound(result)
        assert repr(row.record) == repr(before), "the row itself was changed"
    return found


def assert_sentence(error: InputError) -> None:
    sentence = str(error)
    assert sentence.encode() and "\n" not in sentence and len(sentence) < 5000


def assert_sound(conversation: Conversation) -> None:
    """What the rest of the room relies on."""
    for message in conversation.messages:
        message.content.encode()
        json.dumps(message.to_template(), ensure_ascii=False).encode()
        assert message.trained is None or message.trained is False or message.role == "assistant"
    json.dumps(conversation.tools, ensure_ascii=False).encode()
    trained = conversation.messages[conversation.trained_from :]
    if conversation.format is not Format.TEXT:
        assert any(m.role == "assistant" and (m.content.strip() or m.extra.get("tool_calls")) for m in trained)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(records, max_size=4))
def test_arbitrary_records(found):
    read_all([Row(record, f"x:{i}") for i, record in enumerate(found)])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(records, min_size=1, max_size=3),
    st.sampled_from([None, *Format]),
    st.dictionaries(st.sampled_from(NAMES) | texts, columns, max_size=3),
)
def test_arbitrary_wishes(found, format, mapping):
    read_all([Row(record, f"x:{i}") for i, record in enumerate(found)], format=format, mapping=mapping)


def places(value, path=()):
    """The path to every part of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(VALID), st.data())
def test_a_valid_record_with_one_part_changed(valid, data):
    record = copy.deepcopy(valid)
    path = data.draw(st.sampled_from([p for p in places(record) if p]))
    within = record
    for key in path[:-1]:
        within = within[key]
    if isinstance(within, dict) and data.draw(st.booleans()):
        del within[path[-1]]
    else:
        within[path[-1]] = data.draw(values)
    read_all([Row(valid, "x:1"), Row(record, "x:2")])
    read_all([Row(record, "x:2")])


@pytest.mark.parametrize("record", VALID)
def test_the_records_that_are_changed_are_valid(record):
    assert read_all([Row(record, "x:1")]) == 1

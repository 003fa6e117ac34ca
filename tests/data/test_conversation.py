import pytest

from welltuned.data.conversation import (
    Conversation,
    Format,
    Message,
    Policy,
    detect_format,
    to_conversation,
    to_conversations,
)
from welltuned.data.source import Row
from welltuned.errors import InputError


def rows(*records):
    return [Row(record, f"x.jsonl:{i}") for i, record in enumerate(records, start=1)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **extra):
    return {"role": "assistant", "content": text, **extra}


PAIR = (Message("user", "q"), Message("assistant", "a"))
GOOD = [
    ({"messages": [user("q"), assistant("a")]}, Format.MESSAGES, PAIR),
    ({"messages": [user([{"type": "text", "text": "q"}]), assistant("a", name=None)]}, Format.MESSAGES, PAIR),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, Format.SHAREGPT, PAIR),
    ({"conversations": [user("q"), assistant("a")], "system": ""}, Format.SHAREGPT, PAIR),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        Format.SHAREGPT,
        (Message("system", "s"), *PAIR),
    ),
    ({"prompt": "q", "completion": "a"}, Format.PROMPT_COMPLETION, PAIR),
    ({"prompt": [user("q")], "completion": [assistant("a")]}, Format.PROMPT_COMPLETION_MESSAGES, PAIR),
    ({"question": "q", "answer": "a"}, Format.QUESTION_ANSWER, PAIR),
    ({"instruction": "q", "output": "a"}, Format.INSTRUCTION, PAIR),
    ({"instruction": "q", "input": None, "output": "a"}, Format.INSTRUCTION, PAIR),
    (
        {"instruction": "q", "input": "i", "output": "a"},
        Format.INSTRUCTION,
        (Message("user", "q\n\ni"), Message("assistant", "a")),
    ),
]


@pytest.mark.parametrize(("record", "format", "messages"), GOOD)
def test_formats_are_detected_named_and_read(record, format, messages):
    result = to_conversations(rows(record))
    assert result.detected.format is format
    assert result.items[0].messages == messages
    assert result.items[0].format is format
    assert result.items[0].origin == "x.jsonl:1"
    assert to_conversation(rows(record)[0]) == result.items[0]


def test_explicit_prompt_messages_are_not_trained():
    prompt = [user("1"), assistant("one"), user("2")]
    conversation = to_conversation(rows({"prompt": prompt, "completion": [assistant("two")]})[0])
    assert conversation.trained_from == 3
    assert conversation.prompt() == (("user", "1"), ("assistant", "one"), ("user", "2"))


def test_extra_fields_and_tools_are_kept():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    tool = {"type": "function", "function": {"name": "f"}}
    turns = [
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "name": "f", "tool_call_id": None},
        assistant("a"),
    ]
    conversation = to_conversation(rows({"messages": turns, "tools": [tool]})[0])
    assert conversation.tools == (tool,)
    assert conversation.messages[1] == Message("assistant", "", {"tool_calls": [call]})
    assert conversation.messages[2].to_template() == {"role": "tool", "content": "4", "name": "f"}


def test_what_is_chosen_and_ignored_is_said():
    detected = detect_format(rows({"question": "q", "answer": "a", "messages": [], "id": 1}))
    assert detected.format is Format.MESSAGES
    assert detected.also == (Format.QUESTION_ANSWER,)
    assert detected.ignored == ("question", "answer", "id")
    assert "would also fit question/answer; columns not read: question, answer, id" in detected.sentence()


def test_ignored_columns_of_later_rows_are_named_too():
    assert detect_format(rows({"prompt": "", "completion": ""}, {"prompt": "", "completion": "", "w": 1})).ignored == (
        "w",
    )


BAD_SCHEMA = [
    ([{"text": "a"}], "x.jsonl:1: no format is known for these columns (text)", "understood are: messages"),
    ([{}], "x.jsonl:1: no format is known for these columns (none)", ""),
    ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "x.jsonl:1: the rows are preference pairs", ""),
    ([{"conversations": [], "chosen": {}, "rejected": {}}], "x.jsonl:1: the rows are preference pairs", ""),
    (
        [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a"}, {"prompt": "p", "completion": "c"}],
        "x.jsonl:3: mixed schemas: `question` is missing (the row has prompt, completion)",
        "x.jsonl:1",
    ),
    ([{"question": "q", "answer": "a"}, {}], "x.jsonl:2: mixed schemas", "the row has no columns"),
    (
        [{"prompt": "p", "completion": "c"}, {"prompt": [user("p")], "completion": [assistant("c")]}],
        "x.jsonl:2: mixed schemas",
        "use one kind",
    ),
    ([{"prompt": "p", "completion": [assistant("c")]}], "x.jsonl:1: mixed schemas", "use one kind"),
    ([], "the dataset has no rows", ""),
]


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize(("records", "start", "part"), BAD_SCHEMA)
def test_wrong_schemas_are_errors_under_either_policy(records, start, part, policy):
    with pytest.raises(InputError) as raised:
        to_conversations(rows(*records), policy)
    assert str(raised.value).startswith(start)
    assert part in str(raised.value)


DEFECTS = [
    ({"messages": [user("q")]}, "no assistant message"),
    ({"messages": [user("q"), assistant("")]}, "empty answer (`messages[1]`)"),
    ({"messages": [user("q"), assistant(" \n")]}, "empty answer"),
    ({"messages": [user("q"), assistant(None)]}, "`messages[1]` is null"),
    ({"messages": [user("q"), assistant("a"), user("q"), assistant("")]}, "`messages[3]`"),
    ({"messages": [user(None), assistant("a")]}, "`messages[0]` is null"),
    ({"messages": [user(3), assistant("a")]}, "of type int"),
    ({"messages": []}, "`messages` is empty"),
    ({"messages": None}, "`messages` is null"),
    ({"messages": "hello"}, "`messages` is not a list"),
    ({"messages": ["hello"]}, "`messages[0]` is not an object"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
    ({"messages": [{"content": "x"}]}, "unknown role None"),
    ({"messages": [assistant("a"), user("q")]}, "begins with an assistant message"),
    ({"messages": [user([{"type": "image", "url": "x"}]), assistant("a")]}, "has image content"),
    ({"messages": [user("\ud800"), assistant("a")]}, "half a surrogate pair"),
    ({"messages": [user("q"), assistant("a")], "tools": "[]"}, "`tools` is not a list"),
]
PAIR_DEFECTS = [
    ({"question": "q", "answer": None}, "`answer` is null or missing"),
    ({"question": "q", "answer": ""}, "`answer` is empty"),
    ({"question": None, "answer": "a"}, "`question` is null"),
    ({"question": "q", "answer": 4}, "`answer` is of type int"),
]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [({"messages": [user("q"), assistant("a")]}, *case) for case in DEFECTS]
    + [({"question": "q", "answer": "a"}, *case) for case in PAIR_DEFECTS]
    + [({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": None}, "no answer")],
)
def test_a_rows_defect_is_an_error_or_dropped_and_named(good, bad, message):
    data = rows(good, bad, good)
    with pytest.raises(InputError) as raised:
        to_conversations(data)
    assert str(raised.value).startswith("x.jsonl:2: ")
    assert message in str(raised.value)
    result = to_conversations(data, Policy.DROP)
    assert [c.origin for c in result.items] == ["x.jsonl:1", "x.jsonl:3"]
    assert [d.origin for d in result.dropped] == ["x.jsonl:2"]
    assert message in result.dropped[0].what


def test_dropping_every_row_is_an_error():
    with pytest.raises(InputError, match="all 2 rows have defects"):
        to_conversations(rows({"question": "q", "answer": ""}, {"question": "q", "answer": ""}), Policy.DROP)


def test_prompt_groups_by_the_turns_before_the_first_answer():
    one = Conversation((Message("user", "q"), Message("assistant", "a")), "x:1")
    two = Conversation((*one.messages, Message("user", "r"), Message("assistant", "b")), "x:2")
    assert one.prompt() == two.prompt() == (("user", "q"),)

"""One bad row among good ones: one sentence with its line, or dropped and named. Never silence, never a traceback."""

import pytest

from welltuned.data.conversation import MixedSchema, Policy
from welltuned.data.formats import to_conversations
from welltuned.data.source import Row
from welltuned.errors import InputError


def user(text, **extra):
    return {"role": "user", "content": text, **extra}


def assistant(text, **extra):
    return {"role": "assistant", "content": text, **extra}


def system(text):
    return {"role": "system", "content": text}


def call(value):
    return {"messages": [user("q"), assistant("", tool_calls=value), assistant("a")]}


def nested(levels):
    value: dict = {}
    for _ in range(levels):
        value = {"a": value}
    return value


Q, A = user("q"), assistant("a")
CHAT = {"messages": [Q, A]}
CHATS = [
    ({"messages": [Q]}, "no assistant message"),
    ({"messages": [Q, assistant("")]}, "empty answer (`messages[1]`)"),
    ({"messages": [Q, assistant(" \n")]}, "empty answer"),
    ({"messages": [Q, assistant([])]}, "empty answer"),
    ({"messages": [Q, assistant(None)]}, "the content of `messages[1]` is null"),
    ({"messages": [Q, {"role": "assistant"}]}, "the content of `messages[1]` is null"),
    ({"messages": [Q, {"role": "assistant", "value": "a"}]}, "the content of `messages[1]` is null"),
    ({"messages": [Q, A, Q, assistant("")]}, "empty answer (`messages[3]`)"),
    ({"messages": [user(None), A]}, "`messages[0]` is null"),
    ({"messages": [user(3), A]}, "`messages[0]` is a number; it must be text"),
    ({"messages": [user(True), A]}, "`messages[0]` is a boolean"),
    ({"messages": [user({"text": "q"}), A]}, "`messages[0]` is an object"),
    ({"messages": [user(["q"]), A]}, "`messages[0]` is a list"),
    ({"messages": [user([{"type": "text"}]), A]}, "a part of the content of `messages[0]` is null"),
    ({"messages": [user([{"type": "text", "text": [{"text": "q"}]}]), A]}, "a part of the content"),
    ({"messages": [user([{"type": "image", "url": "x"}]), A]}, "has image content, and only text is read"),
    ({"messages": [user([{"type": "input_audio"}, {"type": "text", "text": "q"}]), A]}, "has input_audio content"),
    ({"messages": [user([{"type": ["image"]}]), A]}, "has a list content"),
    ({"messages": []}, "`messages` is empty"),
    ({"messages": None}, "`messages` is null"),
    ({}, "`messages` is missing (the row has no columns)"),
    ({"id": 7}, "`messages` is missing (the row has id)"),
    ({"messages": "hello"}, "`messages` is a text; it must be a list of messages"),
    ({"messages": '{"role": "user"}'}, "`messages` is an object"),
    ({"messages": {"role": "user"}}, "`messages` is an object"),
    ({"messages": ["hello"]}, "`messages[0]` is a text, not an object with role and content"),
    ({"messages": [Q, None]}, "`messages[1]` is null, not an object"),
    (
        {"messages": [{"role": "bot", "content": "x"}]},
        "`messages[0]` has the unknown role 'bot'; known are system, dev",
    ),
    ({"messages": [{"from": "elf", "value": "x"}]}, "the unknown role 'elf'; known are"),
    ({"messages": [{"role": "User", "content": "x"}]}, "the unknown role 'User'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "the unknown role 'a list'"),
    ({"messages": [{"role": "x" * 10_000, "content": "x"}]}, "x…'; known are"),
    ({"messages": [{"role": "\ud800\n", "content": "x"}]}, "unknown role"),
    ({"messages": [{"role": "document", "content": "x"}]}, "the unknown role 'document'"),
    ({"messages": [{"content": "x"}]}, "`messages[0]` has no role"),
    ({"messages": [A, Q]}, "begins with an assistant message, so there is nothing that it answers"),
    ({"messages": [{"role": "tool", "content": "x"}, A]}, "begins with a tool message"),
    ({"messages": [system("s"), system("t"), Q, A]}, "the row has two system messages"),
    ({"messages": [system("s"), Q, A, system("t"), Q, A]}, "the row has two system messages"),
    ({"messages": [Q, system("s"), A]}, "a system message comes after others; make them one, at the start"),
    ({"messages": [system("s"), Q, A], "system": "t"}, "two system messages, and the one in `system` is another"),
    ({"messages": [Q, A], "system": 3}, "`system` is a number"),
    ({"messages": [user("\ud800"), A]}, "the content of `messages[0]` holds half a surrogate pair"),
    ({"messages": [Q, assistant("a", name="\udfff")]}, "a text in `messages[1]` holds half a surrogate pair"),
    ({"messages": [Q, assistant("a", **{"\ud800": 1})]}, "a text in `messages[1]` holds half a surrogate pair"),
    ({"messages": [Q, assistant("a", deep=nested(200))]}, "`messages[1]` is nested more than 100 levels deep"),
    ({"messages": [Q, assistant("a", weight=0.5)]}, "the `weight` of `messages[1]` is neither 0 nor 1"),
    ({"messages": [Q, assistant("a", weight="1")]}, "the `weight` of `messages[1]` is neither 0 nor 1"),
    ({"messages": [Q, assistant("a", train="yes")]}, "the `train` of `messages[1]` is neither 0 nor 1"),
    ({"messages": [Q, assistant("a", train=True, weight=0)]}, "contradict each other"),
    (
        {"messages": [user("q", train=True), A]},
        "`messages[0]` says that it is trained, and it is no assistant's message",
    ),
    (call([3]), "`messages[1]` has a tool call that is a number"),
    (call("f(x)"), "`messages[1]` has a tool call that is a text"),
    (call([{"function": {}}]), "`messages[1]` has a tool call without the name of a function"),
    (call([{"name": ""}]), "without the name of a function"),
    (call([{"name": "f", "arguments": "x=1"}]), "`messages[1]` calls f with arguments that are a text; they must be"),
    (call([{"function": {"name": "f", "arguments": [1]}}]), "calls f with arguments that are a list"),
    (call([{"name": "f", "arguments": {"x": "\ud800"}}]), "half a surrogate pair"),
    (call([{"name": "f", "arguments": '{"x": "\\ud800"}'}]), "half a surrogate pair"),
    ({"messages": [Q, {"from": "function_call", "value": "f(x)"}]}, "a tool call that is a text"),
    ({"messages": [Q, {"from": "function_call", "value": ""}]}, "empty answer"),
    ({"messages": [Q, A], "tools": "search"}, "`tools` is a text that is not JSON"),
    ({"messages": [Q, A], "tools": '{"name": "f"}'}, "`tools` is not a list of objects"),
    ({"messages": [Q, A], "tools": ["search"]}, "`tools` is not a list of objects"),
    ({"messages": [Q, A], "tools": 3}, "`tools` is not a list of objects"),
    ({"messages": [Q, A], "tools": [{"name": "\ud800"}]}, "a text in `tools` holds half a surrogate pair"),
    ({"messages": [Q, A], "tools": [nested(500)]}, "`tools` is nested more than 100 levels deep"),
]
QA = {"question": "q", "answer": "a"}
QAS = [
    ({"question": "q", "answer": None}, "the row has no answer: `answer` is null"),
    ({"question": "q"}, "the row has no answer: `answer` is missing (the row has question)"),
    ({"question": "q", "answer": ""}, "the row has no answer (`answer` is empty)"),
    ({"question": "q", "answer": "\n\t"}, "the row has no answer (`answer` is empty)"),
    ({"question": None, "answer": "a"}, "`question` is null"),
    ({"question": "q", "answer": 4}, "`answer` is a number; it must be text"),
    ({"question": "q", "answer": ["a"]}, "`answer` is a list"),
    ({"question": {"a": 1}, "answer": "a"}, "`question` is an object"),
    ({"question": "\udc00", "answer": "a"}, "`question` holds half a surrogate pair, which is not text"),
    ({"question": [{"type": "image"}], "answer": "a"}, "`question` has image content"),
]
ALPACA = {"instruction": "q", "output": "a", "input": "", "history": []}
ALPACAS = [
    ({**ALPACA, "output": ""}, "the row has no answer (`output` is empty)"),
    ({**ALPACA, "input": 3}, "`input` is a number"),
    ({**ALPACA, "history": "before"}, "`history` is not a list of pairs"),
    ({**ALPACA, "history": [["q"]]}, '`history` is not a list of pairs; write [["question", "answer"], ...]'),
    ({**ALPACA, "history": [["q", ""]]}, "the row has an empty answer (`history[0]`)"),
    ({**ALPACA, "history": [["q", "a"], [None, "a"]]}, "the question of `history[1]` is null"),
    ({**ALPACA, "history": [["q", 3]]}, "the answer of `history[0]` is a number"),
]
MESSAGE_PAIR = {"prompt": [Q], "completion": [A]}
OTHERS = [
    ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": None}, "no answer: `completion` is null"),
    ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": {"role": "assistant"}}, "is an object"),
    (MESSAGE_PAIR, {"prompt": [], "completion": [A]}, "`prompt` is empty"),
    (MESSAGE_PAIR, {"prompt": [Q], "completion": [Q]}, "no assistant message"),
    (MESSAGE_PAIR, {"prompt": [A], "completion": [A]}, "begins with an assistant message"),
    (MESSAGE_PAIR, {"prompt": [Q, assistant("a", train=True), Q], "completion": [A]}, "prompts never are"),
    ({"text": "t"}, {"text": ""}, "`text` is empty"),
    ({"text": "t"}, {"text": " \n"}, "`text` is empty"),
    ({"text": "t"}, {"text": 3}, "`text` is a number"),
    ({"text": "t"}, {"text": "\ud800"}, "`text` holds half a surrogate pair"),
    ({"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": ""}, "the row has no answer (`answer` is empty)"),
    ({"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": [1]}, "`answer` is a list"),
    ({"messages": [Q, A], "label": 1}, {"messages": [Q, A], "label": "good"}, "neither true nor false; write true"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": None}, "is null"),
]
CASES = [
    *((CHAT, *case) for case in CHATS),
    *((QA, *case) for case in QAS),
    *((ALPACA, *case) for case in ALPACAS),
    *OTHERS,
]


@pytest.mark.parametrize(("good", "bad", "message"), CASES)
def test_a_bad_row_is_one_sentence_or_dropped_and_named(good, bad, message):
    good = {**good, **({"tools": None, "system": None} if "messages" in good else {})}
    data = [Row(record, f"x.jsonl:{i}") for i, record in enumerate([good, bad, good], start=1)]
    for policy in (Policy.ERROR, Policy.KEEP):  # there is nothing that could be kept
        with pytest.raises(InputError) as raised:
            to_conversations(data, policy)
        assert not isinstance(raised.value, MixedSchema)
        sentence = str(raised.value)
        assert sentence.startswith("x.jsonl:2: ")
        assert message in sentence
        assert "\n" not in sentence and len(sentence) < 400
        sentence.encode()
    result = to_conversations(data, Policy.DROP)
    assert [c.origin for c in result.items] == ["x.jsonl:1", "x.jsonl:3"]
    assert [d.origin for d in result.dropped] == ["x.jsonl:2"]
    assert result.dropped[0].what in sentence


def test_dropping_every_row_is_an_error():
    rows = [Row({"question": "q", "answer": ""}, f"x.jsonl:{i}") for i in (1, 2)]
    with pytest.raises(InputError, match="x.jsonl:1: all 2 rows have defects"):
        to_conversations(rows, Policy.DROP)


def test_what_is_odd_and_sound_is_read():
    """NUL and U+FFFD are for the audit; a last question is never trained; a result may lack its call."""
    for turns in (
        [user("a\0b\ufffd"), A],
        [Q, A, Q],
        [Q, {"role": "tool", "content": "4"}, A],
        [user(""), A],
        [Q, Q, A],
    ):
        assert len(to_conversations([Row({"messages": turns}, "x:1")]).items[0].messages) == len(turns)


def test_a_row_of_a_megabyte():
    text = "words " * 200_000
    conversation = to_conversations([Row({"messages": [user(text), A]}, "x:1")]).items[0]
    assert conversation.messages[0].content == text

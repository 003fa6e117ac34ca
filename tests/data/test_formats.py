"""Every format is detected, named and read; what could be read otherwise is said."""

import json

import pytest

from welltuned.data.conversation import Conversation, Message, MixedSchema, NotTrained, Policy
from welltuned.data.formats import Detected, Format, detect, to_conversation, to_conversations
from welltuned.data.source import Row
from welltuned.errors import InputError


def rows(*records):
    return [Row(record, f"x.jsonl:{i}") for i, record in enumerate(records, start=1)]


def read(*records, **options) -> Conversation:
    """The last of the records, in the format detected from all."""
    data = rows(*records)
    return to_conversation(data[-1], detect(data, **options))


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **extra):
    return {"role": "assistant", "content": text, **extra}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


PAIR = (Message("user", "q"), Message("assistant", "a"))
SYSTEM = (Message("system", "s"), *PAIR)
CHAT = [user("q"), assistant("a")]
GOOD = [
    ({"messages": CHAT}, Format.MESSAGES, PAIR),
    ({"messages": [user([{"type": "text", "text": "q"}]), assistant("a", name=None)]}, Format.MESSAGES, PAIR),
    ({"messages": [user([{"text": "q", "image": None}]), assistant("a")]}, Format.MESSAGES, PAIR),
    ({"messages": [human("q"), gpt("a")]}, Format.MESSAGES, PAIR),
    ({"messages": json.dumps(CHAT)}, Format.MESSAGES, PAIR),
    ({"messages": CHAT, "system": "s"}, Format.MESSAGES, SYSTEM),
    ({"messages": [{"role": "system", "content": "s"}, *CHAT], "system": "s"}, Format.MESSAGES, SYSTEM),
    ({"messages": [{"role": None, "from": "human", "value": "q"}, gpt("a")]}, Format.MESSAGES, PAIR),
    ({"conversations": [human("q"), gpt("a")]}, Format.SHAREGPT, PAIR),
    ({"conversation": [human("q"), gpt("a")]}, Format.SHAREGPT, PAIR),
    ({"conversations": CHAT, "system": ""}, Format.SHAREGPT, PAIR),
    ({"conversations": [human("q"), gpt("a")], "system": "s"}, Format.SHAREGPT, SYSTEM),
    ({"prompt": "q", "completion": "a"}, Format.PROMPT_COMPLETION, PAIR),
    ({"prompt": "q", "completion": "a", "system_prompt": "s"}, Format.PROMPT_COMPLETION, SYSTEM),
    ({"prompt": "q", "response": "a"}, Format.PROMPT_COMPLETION, PAIR),
    ({"prompt": [user("q")], "completion": [assistant("a")]}, Format.PROMPT_COMPLETION_MESSAGES, PAIR),
    ({"question": "q", "answer": "a"}, Format.QUESTION_ANSWER, PAIR),
    ({"question": "q", "response": "a", "system_prompt": "s"}, Format.QUESTION_ANSWER, SYSTEM),
    ({"query": "q", "response": "a"}, Format.QUESTION_ANSWER, PAIR),
    ({"query": "q", "answer": "a"}, Format.QUESTION_ANSWER, PAIR),
    ({"input": "q", "output": "a"}, Format.QUESTION_ANSWER, PAIR),
    ({"instruction": "q", "output": "a"}, Format.ALPACA, PAIR),
    ({"instruction": "q", "response": "a", "context": ""}, Format.ALPACA, PAIR),
    ({"instruction": "q", "input": None, "output": "a", "system": "s"}, Format.ALPACA, SYSTEM),
    (
        {"instruction": "q", "input": "i", "output": "a"},
        Format.ALPACA,
        (Message("user", "q\n\ni"), Message("assistant", "a")),
    ),
    (
        {"instruction": "q", "output": "a", "system": "s", "history": [["r", "b"]]},
        Format.ALPACA,
        (Message("system", "s"), Message("user", "r"), Message("assistant", "b"), *PAIR),
    ),
    ({"text": "t <|im_end|>"}, Format.TEXT, (Message("document", "t <|im_end|>"),)),
    ({"text": "t", "label": 1}, Format.TEXT, (Message("document", "t"),)),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, Format.PREFERENCE, PAIR),
    ({"chosen": CHAT, "rejected": [user("q"), assistant("b")]}, Format.PREFERENCE, PAIR),
    ({"messages": CHAT, "label": True}, Format.KTO, PAIR),
    ({"prompt": "q", "completion": "a", "label": "True"}, Format.KTO, PAIR),
    ({"prompt": "q", "answer": "a"}, Format.PROMPT_ANSWER, PAIR),
    ({"prompt": [user("q")], "solution": "a"}, Format.PROMPT_ANSWER, PAIR),
    ({"problem": "q", "ground_truth": 4}, Format.PROMPT_ANSWER, (PAIR[0], Message("assistant", "4"))),
    ({"question": "q", "solution": "a"}, Format.PROMPT_ANSWER, PAIR),
]


@pytest.mark.parametrize(("record", "format", "messages"), GOOD)
def test_formats_are_detected_named_and_read(record, format, messages):
    result = to_conversations(rows(record))
    assert result.detected.format is format
    assert result.items[0].messages == messages
    assert result.items[0].format is format
    assert result.items[0].origin == "x.jsonl:1"
    assert read(record) == result.items[0]
    forced = detect(rows(record), format=format)
    assert to_conversation(rows(record)[0], forced) == result.items[0]


def test_what_is_prompt_is_not_trained():
    prompt = [user("1"), assistant("one"), user("2")]
    conversation = read({"prompt": prompt, "completion": [assistant("two")]})
    assert conversation.trained_from == 3
    assert conversation.prompt() == (("user", "1"), ("assistant", "one"), ("user", "2"))
    assert read({"prompt": prompt, "solution": "two"}).trained_from == 3
    assert read({"messages": [*prompt, assistant("two")], "label": 1}).trained_from == 3
    assert read({"prompt": prompt, "chosen": "two", "rejected": "three"}).trained_from == 3
    assert read({"messages": [*prompt, assistant("two")]}).trained_from == 0


def test_every_answer_of_the_history_is_trained():
    conversation = read({"instruction": "q", "output": "a", "history": [["r", "b"], ["s", "c"]]})
    assert [m.role for m in conversation.messages] == ["user", "assistant"] * 3
    assert conversation.trained_from == 0
    assert all(m.trained is None for m in conversation.messages)


def test_reasoning_and_other_fields_are_kept_for_the_template():
    turns = [user("q"), assistant("a", reasoning_content="r", thinking="t", reasoning="u", name=None)]
    conversation = read({"messages": turns})
    assert conversation.messages[1].extra == {"reasoning_content": "r", "thinking": "t", "reasoning": "u"}


MARKS = [
    ({"train": True}, True),
    ({"train": False}, False),
    ({"weight": 1}, True),
    ({"weight": 0.0}, False),
    ({"weight": None}, None),
    ({"train": False, "weight": 0}, False),
]


@pytest.mark.parametrize(("mark", "trained"), MARKS)
def test_a_messages_own_mark_is_read_and_not_shown_to_the_template(mark, trained):
    conversation = read({"messages": [user("q"), assistant("a", **mark)]})
    assert conversation.messages[1] == Message("assistant", "a", {}, trained)


def test_users_may_say_that_they_are_not_trained():
    assert read({"messages": [{**user("q"), "weight": 0}, assistant("a")]}).messages[0].trained is False


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
    {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
    {"role": "assistant", "content": "", "tool_calls": {"name": "add", "arguments": {"a": 1}, "function": None}},
    {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    {"from": "function_call", "value": '[{"name": "add", "arguments": "{\\"a\\": 1}"}]'},
    {"role": "function_call", "content": '{"name": "add", "arguments": {"a": 1}}'},
]


@pytest.mark.parametrize("turn", CALLS)
def test_calls_have_one_form_however_they_are_written(turn):
    turns = [user("q"), turn, {"role": "tool", "content": "4", "name": "add", "tool_call_id": None}, assistant("a")]
    conversation = read({"messages": turns})
    assert conversation.messages[1] == Message("assistant", "", {"tool_calls": [CALL]})
    assert conversation.messages[2].to_template() == {"role": "tool", "content": "4", "name": "add"}


def test_the_id_of_a_call_and_calls_without_arguments_are_kept():
    calls = [{"id": "1", "name": "now"}, {"id": "2", "function": {"name": "now", "arguments": ""}, "index": None}]
    found = read({"messages": [user("q"), assistant("", tool_calls=calls)]}).messages[1].extra["tool_calls"]
    empty = {"type": "function", "function": {"name": "now", "arguments": {}}}
    assert found == [{"id": "1", **empty}, {"id": "2", **empty}]


def test_tool_turns_of_sharegpt():
    turns = [human("q"), gpt("a"), {"from": "observation", "value": "o"}, {"from": "function_response", "value": "p"}]
    roles = [m.role for m in read({"conversations": [*turns, gpt("b")]}).messages]
    assert roles == ["user", "assistant", "tool", "tool", "assistant"]


FUNCTION = {"name": "add", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize("tools", [[TOOL], [FUNCTION], json.dumps([TOOL]), json.dumps([FUNCTION]), [{**TOOL, "x": 1}]])
def test_tools_have_one_form_however_they_are_written(tools):
    [found] = read({"messages": CHAT, "tools": tools}).tools
    assert found["type"] == "function"
    assert found["function"] == FUNCTION


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools(tools):
    assert read({"conversations": CHAT, "tools": tools}).tools is None


ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ipython": "ipython",
    "tool": "tool",
    "function": "function",
}


@pytest.mark.parametrize(("name", "role"), ROLES.items())
def test_roles(name, role):
    turns = [human("q"), gpt("a"), {"from": name, "value": "x"}, gpt("b")]
    assert read({"conversations": turns}).messages[2].role == role


def test_system_and_developer_may_open_together():
    turns = [{"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, *CHAT]
    assert [m.role for m in read({"messages": turns}).messages] == ["system", "developer", "user", "assistant"]
    greeting = [{"role": "system", "content": "s"}, assistant("hello"), *CHAT]
    assert len(read({"messages": greeting}).messages) == 4


# Choices between formats


def test_what_is_chosen_and_ignored_is_said():
    detected = detect(rows({"question": "q", "answer": "a", "messages": CHAT, "id": 1}))
    assert detected.format is Format.MESSAGES
    assert detected.also == (Format.QUESTION_ANSWER,)
    assert detected.ignored == ("question", "answer", "id")
    assert detected.sentence() == (
        "format: chat `messages` with role and content; the columns would also fit question/answer "
        "(`--set format=question/answer`); columns not read: question, answer, id (`--map NAME=COLUMN` reads one)"
    )
    said = "format: plain `text`, all of it trained, without a chat template: continued pretraining"
    assert detect(rows({"text": "t"})).sentence() == said


def test_columns_of_another_name_are_said():
    sentence = detect(rows({"query": "q", "response": "a"})).sentence()
    assert sentence.endswith("(question from `query`, answer from `response`)")


def test_ignored_columns_of_later_rows_are_named_too():
    assert detect(rows({"prompt": "p", "completion": "c"}, {"prompt": "", "completion": "", "w": 1})).ignored == ("w",)


def test_a_format_can_be_asked_for():
    data = rows({"question": "q", "answer": "a", "messages": CHAT})
    detected = detect(data, format=Format.QUESTION_ANSWER)
    assert detected.format is Format.QUESTION_ANSWER
    assert detected.ignored == ("messages",)
    assert detect(rows({"prompt": CHAT, "completion": CHAT}), format=Format.PROMPT_COMPLETION).format is (
        Format.PROMPT_COMPLETION_MESSAGES
    )


def test_question_and_answer_stay_supervised_data():
    assert detect(rows({"question": "q", "answer": "a", "prompt": "p"})).format is Format.QUESTION_ANSWER


def test_labels_that_are_none_are_no_kto():
    detected = detect(rows({"prompt": "p", "completion": "c", "label": "sports"}))
    assert detected.format is Format.PROMPT_COMPLETION
    assert detected.ignored == ("label",)


def test_undesirable_answers_are_not_trained_and_no_defect():
    data = rows({"messages": CHAT, "label": 1}, {"messages": CHAT, "label": 0})
    with pytest.raises(NotTrained, match="x.jsonl:2: the answer is labelled undesirable"):
        to_conversation(data[1], detect(data))
    result = to_conversations(data)
    assert (len(result.items), result.dropped, result.not_trained) == (1, (), 1)


def test_null_columns_do_not_decide():
    first = {"messages": None, "text": "t", "prompt": None, "completion": None}
    assert detect(rows(first, first)).format is Format.TEXT
    assert detect(rows(first, {**first, "messages": CHAT})).format is Format.MESSAGES
    assert detect(rows({}, {"text": "t"})).format is Format.TEXT


def test_optional_columns_may_come_later():
    conversation = read({"instruction": "q", "output": "a"}, {"instruction": "q", "input": "i", "output": "a"})
    assert conversation.messages[0].content == "q\n\ni"


# The user's names


def test_columns_are_mapped():
    record = {"Frage": "q", "Antwort": "a", "Rolle": "s", "messages": [], "prompt": "another"}
    detected = detect(rows(record), mapping={"prompt": "Frage", "completion": "Antwort", "system": "Rolle"})
    assert detected.format is Format.PROMPT_COMPLETION
    assert detected.mapping == {"prompt": "Frage", "completion": "Antwort", "system": "Rolle"}
    assert detected.ignored == ("messages", "prompt")
    assert to_conversation(rows(record)[0], detected).messages == SYSTEM
    assert "prompt from `Frage`, completion from `Antwort`" in detected.sentence()


MAPPED = [
    ({"Frage": "q", "answer": "a"}, {"question": "Frage"}, Format.QUESTION_ANSWER),
    ({"chat": CHAT}, {"messages": "chat"}, Format.MESSAGES),
    ({"chat": [human("q"), gpt("a")]}, {"conversations": "chat"}, Format.SHAREGPT),
    ({"inhalt": "t"}, {"text": "inhalt"}, Format.TEXT),
    ({"prompt": "q", "completion": "a", "good": True}, {"label": "good"}, Format.KTO),
    ({"prompt": "q", "good": "a", "bad": "b"}, {"chosen": "good", "rejected": "bad"}, Format.PREFERENCE),
    ({"messages": CHAT, "problem": "q", "x": "a"}, {"answer": "x"}, Format.PROMPT_ANSWER),
    ({"messages": CHAT, "prompt": "q", "completion": "a"}, {"messages": ""}, Format.PROMPT_COMPLETION),
    ({"both": "q"}, {"prompt": "both", "completion": "both"}, Format.PROMPT_COMPLETION),
]


@pytest.mark.parametrize(("record", "mapping", "format"), MAPPED)
def test_a_mapping_decides_which_formats_there_are(record, mapping, format):
    detected = detect(rows(record), mapping=mapping)
    assert detected.format is format
    assert to_conversation(rows(record)[0], detected).messages[0].content in ("q", "t")


def test_a_name_can_be_left_unread():
    record = {"messages": CHAT, "system": "linux"}
    detected = detect(rows(record), mapping={"system": ""})
    assert to_conversation(rows(record)[0], detected).messages == PAIR
    assert detected.ignored == ("system",)


QA = {"question": "q", "answer": "a"}
WRONG_WISHES = [
    ([QA], {"mapping": {"promt": "question"}}, "map: promt=question: `promt` is no name that is read; did you mean"),
    ([QA], {"mapping": {"zzz": "question"}}, "names are messages, label, system"),
    (
        [QA],
        {"mapping": {"prompt": "qestion"}},
        "no column `qestion`; did you mean `question`? the columns are question",
    ),
    ([QA], {"mapping": {"prompt": "question", "text": "answer"}}, "map: no format reads `prompt` and `text` together"),
    ([QA], {"mapping": {"prompt": "question", "label": "answer"}}, "kto needs `completion`, and the columns are"),
    (
        [{**QA, "good": "maybe"}],
        {"mapping": {"prompt": "question", "completion": "answer", "label": "good"}},
        "the label `good` is neither true nor false in the one row",
    ),
    ([QA], {"mapping": {"prompt": "question", "completion": "answer"}, "format": Format.TEXT}, "format=text does not"),
    ([QA], {"mapping": {"text": ""}, "format": Format.TEXT}, "format=text cannot be read without `text`"),
    ([QA], {"mapping": {"completion": "answer"}}, "prompt/completion needs `prompt`, and the columns are question"),
    ([QA], {"format": Format.ALPACA}, "format=alpaca needs `instruction` and `output`, and the columns are question"),
    ([QA], {"format": Format.TEXT}, "name the column: `--map text=COLUMN`"),
    ([QA], {"format": Format.PREFERENCE}, "format=preference needs `chosen` and `rejected`"),
    ([QA], {"format": Format.KTO}, "format=kto needs `messages` and `label`"),
    ([{"text": None}], {"format": Format.TEXT}, "`text` is null in the one row; name another with `--map text="),
    ([{"prompt": "p", "completion": "c"}], {"format": Format.PROMPT_COMPLETION_MESSAGES}, "the columns hold texts"),
]


@pytest.mark.parametrize(("records", "options", "part"), WRONG_WISHES)
def test_wishes_that_cannot_be_met_are_one_sentence(records, options, part):
    with pytest.raises(InputError) as raised:
        detect(rows(*records), **options)
    assert part in str(raised.value)


# Rows of another schema

NO_FORMAT = [
    ([{"a": 1}], "x.jsonl:1: no format is known for these columns (a)", "--map prompt=COLUMN"),
    ([{}], "x.jsonl:1: no format is known for these columns (none)", "understood are: messages"),
    ([{str(i): 0 for i in range(30)}], "x.jsonl:1: no format is known", "19 and 10 more"),
    ([{"question": None, "answer": "a"}] * 3, "x.jsonl:1: `question` is null in the 3 rows", "--map question="),
    ([{"question": None, "answer": "a"}] * 1001, "x.jsonl:1: `question` is null in the first 1,000 rows", ""),
    ([{"question": "q"}, {"answer": "a"}], "x.jsonl:1: none of the 2 rows has values in `question` and `answer`", ""),
    ([], "the dataset has no rows", ""),
]


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize(("records", "start", "part"), NO_FORMAT)
def test_no_format_is_an_error_under_any_policy(records, start, part, policy):
    with pytest.raises(InputError) as raised:
        to_conversations(rows(*records), policy)
    assert str(raised.value).startswith(start)
    assert part in str(raised.value)


MIXED = [
    ([QA, QA, {"prompt": "p", "completion": "c"}], "x.jsonl:3: mixed schemas: `question` is missing, and the row has"),
    ([QA, {"question": "q", "response": "a"}], "x.jsonl:2: mixed schemas: `answer` is missing"),
    ([QA, {"question": None, "answer": None, "messages": CHAT}], "x.jsonl:2: mixed schemas: `question` is null"),
    ([{"messages": CHAT}, {"text": "t"}], "the row has the columns of text (text); x.jsonl:1 and the rows like it are"),
    (
        [{"prompt": "p", "completion": "c"}, {"prompt": [user("p")], "completion": [assistant("c")]}],
        "make both columns texts in every row",
    ),
    ([{"prompt": [user("p")], "completion": [assistant("c")]}, {"prompt": "p", "completion": "c"}], "is a text"),
    ([{"prompt": "p", "completion": [assistant("c")]}], "x.jsonl:1: mixed schemas: `prompt` is a text"),
]


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize(("records", "part"), MIXED)
def test_rows_of_another_schema_are_errors_under_any_policy(records, part, policy):
    with pytest.raises(MixedSchema) as raised:
        to_conversations(rows(*records), policy)
    assert part in str(raised.value)


def test_a_schema_that_changes_late_is_named_at_its_first_row():
    data = rows(QA, QA)
    late = Row({"instruction": "q", "output": "a"}, "x.jsonl:100001")
    with pytest.raises(MixedSchema) as raised:
        to_conversation(late, detect(data))
    assert str(raised.value) == (
        "x.jsonl:100001: mixed schemas: `question` is missing, and the row has the columns of alpaca "
        "(instruction, output); x.jsonl:1 and the rows like it are question/answer; put the two into files of their own"
    )


def test_a_row_that_only_lacks_its_answer_is_no_other_schema():
    first = {"question": "q", "answer": "a", "text": "t"}
    data = rows(first, {**first, "answer": None}, first)
    assert [d.what for d in to_conversations(data, Policy.DROP).dropped] == ["the row has no answer: `answer` is null"]


# Groups


@pytest.mark.parametrize(("value", "group"), [("a", "a"), (3, "3"), (True, "True"), (0.5, "0.5")])
def test_rows_are_grouped_by_a_column(value, group):
    row = rows({"question": "q", "answer": "a", "by": value})[0]
    assert to_conversation(row, detect([row]), "by").group == group
    assert to_conversation(row, detect([row])).group is None


@pytest.mark.parametrize("value", [None, [1], {}, float("nan"), "\ud800"])
def test_what_cannot_be_a_group(value):
    row = rows({"question": "q", "answer": "a", "by": value})[0]
    with pytest.raises(InputError, match="x.jsonl:1: .*by"):
        to_conversation(row, detect([row]), "by")
    with pytest.raises(InputError, match="the group `of` is missing; the row's columns are question, answer, by"):
        to_conversation(row, detect([row]), "of")


def test_detected_without_anything_to_add():
    assert Detected(Format.TEXT).sentence().startswith("format: plain `text`")

"""Preference pairs, judged answers (KTO), and prompts with answers (RL)."""

import json
from pathlib import Path

import pytest

from welltuned.data.conversation import Message
from welltuned.data.formats import Format, detect, to_conversation, to_judged, to_preference, to_prompt
from welltuned.data.source import Row, read_rows
from welltuned.errors import InputError

DPO_DEMO = Path(__file__).resolve().parents[3] / "shared" / "data" / "dpo_en_demo.json"


def rows(*records):
    return [Row(record, f"x.jsonl:{i}") for i, record in enumerate(records, start=1)]


def preference(record, **options):
    [row] = rows(record)
    return to_preference(row, detect([row], **options))


def judged(record):
    [row] = rows(record)
    return to_judged(row, detect([row]))


def prompt(record, **options):
    [row] = rows(record)
    return to_prompt(row, detect([row], **options))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def texts(messages):
    return [(m.role[0], m.content) for m in messages]


def hh(*turns):
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


Q, A, B = user("q"), assistant("a"), assistant("b")
PAIRS = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"question": "q", "chosen": "a", "rejected": "b"},
    {"input": "q", "chosen": "a", "rejected": "b"},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    {"prompt": [Q], "chosen": "a", "rejected": "b"},
    {"prompt": [Q], "chosen": [A], "rejected": [B]},
    {"prompt": "q", "chosen": [A], "rejected": [B]},
    {"prompt": "q", "chosen": A, "rejected": B},
    {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]},
    {"prompt": " q", "chosen": [Q, A], "rejected": [Q, B]},
    {"chosen": [Q, A], "rejected": [Q, B]},
    {"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B]), "messages": [Q, A]},
    {"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]},
    {"messages": [Q], "chosen": A, "rejected": B},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": B},
    {"conversations": [Q], "chosen": "a", "rejected": "b", "system": ""},
    {"chosen": hh("q", "a"), "rejected": hh("q", "b")},
    {"prompt": hh("q", ""), "chosen": "a", "rejected": "b"},
    {"prompt": hh("q", ""), "chosen": hh("q", "a"), "rejected": hh("q", "b")},
]


@pytest.mark.parametrize("record", PAIRS)
def test_every_shape_of_a_pair(record):
    if isinstance(record["chosen"], str) and record["chosen"].startswith("["):
        record = {**record, "chosen": json.loads(record["chosen"]), "rejected": json.loads(record["rejected"])}
    pair = preference(record)
    assert texts(pair.chosen.messages) == [("u", "q"), ("a", "a")]
    assert texts(pair.rejected.messages) == [("u", "q"), ("a", "b")]
    assert pair.chosen.trained_from == pair.rejected.trained_from == 1
    assert pair.chosen.format is Format.PREFERENCE
    [row] = rows(record)
    assert to_conversation(row, detect([row])) == pair.chosen


LONG = [
    ({"prompt": [system("s"), Q, A, Q], "chosen": "a", "rejected": "b"}, 4),
    ({"chosen": [system("s"), Q, A, Q, A], "rejected": [system("s"), Q, A, Q, B]}, 4),
    ({"system": "s", "chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]}, 4),
    ({"system": "s", "prompt": [Q, A, Q], "chosen": [A], "rejected": [B]}, 4),
    ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, 2),
    ({"instruction": "q", "history": [["q", "a"]], "system": "s", "chosen": "a", "rejected": "b"}, 4),
    ({"prompt": "q", "system": "s", "chosen": [system("s"), Q, A], "rejected": [system("s"), Q, B]}, 2),
    ({"chosen": hh("q", "a", "q", "a", "r", "c"), "rejected": hh("q", "a", "q", "b")}, 3),
]


@pytest.mark.parametrize(("record", "start"), LONG)
def test_the_prompt_is_all_that_both_begin_with(record, start):
    pair = preference(record)
    assert pair.chosen.trained_from == pair.rejected.trained_from == start
    assert pair.chosen.messages[:start] == pair.rejected.messages[:start]
    assert pair.chosen.messages[start].content == "a"
    assert pair.rejected.messages[start].content == "b"
    assert (pair.chosen.messages[0].role == "system") is (
        "s" in (record.get("system"), pair.chosen.messages[0].content)
    )


BAD_PAIRS = [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "`chosen` and `rejected` are the same"),
    ({"chosen": [Q, A], "rejected": [Q, A]}, "`chosen` and `rejected` are the same"),
    ({"chosen": "a", "rejected": "b"}, "the pair has no prompt: `chosen` begins with the answer; name the prompt's"),
    ({"chosen": [Q, A], "rejected": [user("r"), B]}, "do not begin with the same prompt"),
    ({"chosen": [Q, A], "rejected": [Q, A, Q, B]}, "`chosen` ends where the other goes on"),
    ({"chosen": [Q, A, Q, B], "rejected": [Q, A]}, "`rejected` ends where the other goes on"),
    ({"chosen": [Q, A, Q, A], "rejected": [Q, A, user("r"), B]}, "first differ in a user message"),
    ({"prompt": "q", "chosen": [Q, A], "rejected": "b"}, "`chosen` begins with a prompt, and the other"),
    (
        {"prompt": "other", "chosen": [Q, A], "rejected": [Q, B]},
        "`prompt` is not in what `chosen` and `rejected` begin",
    ),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "the row has no answer (`rejected` is empty)"),
    ({"prompt": "q", "chosen": "a", "rejected": 3}, "`rejected` is a number"),
    ({"prompt": "q", "chosen": "a", "rejected": []}, "`rejected` is empty"),
    ({"prompt": "q", "chosen": A, "rejected": Q}, "`rejected` begins with a prompt"),
    (
        {"prompt": "q", "chosen": "a", "rejected": {"from": "elf", "value": "b"}},
        "`rejected` has the unknown role 'elf'",
    ),
    ({"prompt": [A], "chosen": "a", "rejected": "b"}, "begins with an assistant message"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "`prompt` is empty; it must be a list of messages"),
    ({"chosen": hh("q", ""), "rejected": hh("q", "b")}, "the row has an empty answer (`chosen`)"),
    ({"system": "t", "chosen": [system("s"), Q, A], "rejected": [system("s"), Q, B]}, "two system messages"),
]


@pytest.mark.parametrize(("record", "part"), BAD_PAIRS)
def test_bad_pairs_are_one_sentence(record, part):
    [row] = rows(record)
    with pytest.raises(InputError) as raised:
        to_preference(row, detect([row]))
    assert str(raised.value).startswith("x.jsonl:1: ")
    assert part in str(raised.value)


def test_a_prompt_that_the_pair_contradicts_can_be_left_unread():
    record = {"prompt": "other", "chosen": [Q, A], "rejected": [Q, B]}
    assert preference(record, mapping={"prompt": ""}).chosen.trained_from == 1


def test_a_prompt_under_another_name():
    record = {"anfrage": "q", "gut": "a", "schlecht": "b"}
    mapping = {"prompt": "anfrage", "chosen": "gut", "rejected": "schlecht"}
    assert texts(preference(record, mapping=mapping).rejected.messages) == [("u", "q"), ("a", "b")]


def test_only_pairs_are_pairs_and_only_labels_judge():
    [row] = rows({"question": "q", "answer": "a"})
    with pytest.raises(InputError, match="the rows are question/answer; preference needs preference pairs"):
        to_preference(row, detect([row]))
    with pytest.raises(InputError, match="the rows are question/answer; kto needs answers with a label"):
        to_judged(row, detect([row]))


@pytest.mark.skipif(not DPO_DEMO.exists(), reason="the demo data are not on this machine")
def test_the_demo_of_llama_factory():
    data = read_rows(str(DPO_DEMO))
    detected = detect(data)
    assert detected.format is Format.PREFERENCE
    pairs = [to_preference(row, detected) for row in data]
    assert all(pair.chosen.messages[pair.chosen.trained_from].role == "assistant" for pair in pairs)
    assert all(pair.chosen != pair.rejected for pair in pairs)


# KTO

LABELS = [
    (True, True),
    (False, False),
    (1, True),
    (0, False),
    (1.0, True),
    ("true", True),
    ("False", False),
    ("0", False),
]


@pytest.mark.parametrize(("label", "desirable"), LABELS)
def test_labels(label, desirable):
    found = judged({"prompt": "q", "completion": "a", "label": label})
    assert found.desirable is desirable
    assert texts(found.conversation.messages) == [("u", "q"), ("a", "a")]
    assert found.conversation.trained_from == 1


@pytest.mark.parametrize("label", ["yes", 2, -1, 0.5, [], {}, "", float("nan"), None])
def test_what_is_no_label(label):
    data = rows({"messages": [Q, A], "label": True}, {"messages": [Q, A], "label": label})
    with pytest.raises(InputError, match="x.jsonl:2: .*label"):
        to_judged(data[1], detect(data))


JUDGED = [
    ({"messages": [Q, A, Q, B], "label": 1}, 3),
    ({"conversations": [system("s"), Q, A], "label": 1}, 2),
    ({"prompt": [Q, A, Q], "completion": [B], "label": 1}, 3),
    ({"prompt": "q", "completion": B, "label": 1}, 1),
    (
        {
            "messages": [Q, {**assistant(""), "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "4"}, B],
            "label": 0,
        },
        1,
    ),
]


@pytest.mark.parametrize(("record", "start"), JUDGED)
def test_the_answer_to_the_last_question_is_judged(record, start):
    conversation = judged(record).conversation
    assert conversation.trained_from == start
    assert conversation.messages[-1].content in ("a", "b")


def test_a_judged_conversation_must_end_with_an_answer():
    with pytest.raises(InputError, match="no answer"):
        judged({"messages": [Q, A, Q], "label": 1})


# Prompts for RL

PROMPTS = [
    ({"prompt": "q", "answer": "4"}, "4"),
    ({"prompt": "q", "answer": 4}, "4"),
    ({"problem": "q", "solution": 0.5}, "0.5"),
    ({"prompt": [Q], "ground_truth": "4"}, "4"),
    ({"prompt": "q"}, None),
    ({"question": "q", "answer": "4"}, "4"),
    ({"question": "q", "answer": 4}, "4"),
    ({"instruction": "q", "output": "4"}, "4"),
    ({"prompt": "q", "completion": "4"}, "4"),
    ({"messages": [Q, assistant("4")]}, "4"),
    ({"messages": [Q], "answer": "4"}, "4"),
    ({"messages": [Q], "id": "4"}, None),
    (
        {
            "conversations": [
                Q,
                {**assistant(""), "tool_calls": [{"name": "f"}]},
                {"role": "tool", "content": "5"},
                assistant("4"),
            ]
        },
        "4",
    ),
    ({"prompt": "q", "chosen": "4", "rejected": "5"}, "4"),
    ({"messages": [Q, assistant("4")], "label": True}, "4"),
    ({"messages": [Q, assistant("4")], "label": False}, None),
]


@pytest.mark.parametrize(("record", "answer"), PROMPTS)
def test_prompts_of_any_format(record, answer):
    found = prompt(record)
    assert found.messages == (Message("user", "q"),)
    assert found.answer == answer
    assert found.record == record
    assert found.origin == "x.jsonl:1"


def test_the_last_question_is_the_prompt_and_an_earlier_answer_is_not_its():
    found = prompt({"messages": [system("s"), Q, A, Q, B]})
    assert (len(found.messages), found.answer) == (4, "b")
    found = prompt({"messages": [Q, A, Q]})
    assert (len(found.messages), found.answer) == (3, None)


def test_an_answers_column_can_be_named():
    assert prompt({"messages": [Q], "x": "4", "answer": "5"}, mapping={"answer": "x"}).answer == "4"


BAD_PROMPTS = [
    ({"text": "t"}, "there are no prompts in them; name the prompt's column"),
    ({"prompt": "q", "answer": ["4"]}, "`answer` is a list; it must be text"),
    ({"prompt": "q", "answer": True}, "`answer` is a boolean"),
    ({"prompt": "q", "answer": float("nan")}, "`answer` is a number"),
    ({"prompt": 3, "answer": "4"}, "`prompt` is a number"),
    ({"messages": [A]}, "the row has no prompt"),
]


@pytest.mark.parametrize(("record", "part"), BAD_PROMPTS)
def test_bad_prompts_are_one_sentence(record, part):
    with pytest.raises(InputError) as raised:
        prompt(record)
    assert str(raised.value).startswith("x.jsonl:1: ")
    assert part in str(raised.value)


def test_a_prompt_alone_teaches_no_answer():
    [row] = rows({"prompt": "q", "other": "a"})
    assert detect([row]).sentence().startswith("format: `prompt` alone, without answers; columns not read: other")
    with pytest.raises(InputError, match="only `prompt` is read; name the answer's column with `--map completion="):
        to_conversation(row, detect([row]))

"""Thinking blocks and tool calls: trained as they are generated, and never lost unseen."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from welltuned.data.conversation import Conversation, Kind, Message
from welltuned.data.render import LossOn, Renderer, one_per_answer, render, trained_texts
from welltuned.errors import InputError

families = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("families.py"))))
CALL = {"tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {"key": "a b"}}}]}
TOOLS = (
    {"type": "function", "function": {"name": "look_up", "description": "finds", "parameters": {"type": "object"}}},
)


def turns(*messages, **options):
    return Conversation(tuple(messages), "x.jsonl:6", **options)


def user(text):
    return Message("user", text)


def said(text, **extra):
    return Message("assistant", text, extra)


def trained(name, conversation, loss_on=LossOn.ASSISTANT):
    tokenizer = families.tokenizer_of(name)
    example = render(conversation, tokenizer, loss_on=loss_on)
    return trained_texts(example, tokenizer), example.found


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_qwen3_trains_the_thinking_of_the_last_turn(field):
    texts, found = trained("qwen3", turns(user("q"), said("a", **{field: "hm"})))
    assert texts == ["<think>\nhm\n</think>\n\na<|im_end|>"]
    assert Kind.LOST_THINKING not in found


def test_qwen3_thinking_in_the_content_and_none_at_all():
    assert trained("qwen3", turns(user("q"), said("<think>\nhm\n</think>\n\na")))[0] == [
        "<think>\nhm\n</think>\n\na<|im_end|>"
    ]
    assert trained("qwen3", turns(user("q"), said("a"))) == (["<think>\n\n</think>\n\na<|im_end|>"], frozenset())


THOUGHTFUL = turns(
    user("q"), said("one", reasoning_content="first"), user("r"), said("two", reasoning_content="second")
)
PLAIN = turns(user("q"), said("one"), user("r"), said("two"))


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
@pytest.mark.parametrize("conversation", [THOUGHTFUL, PLAIN], ids=["thoughtful", "plain"])
def test_turns_that_look_otherwise_once_others_follow_are_refused_or_trained_one_by_one(name, conversation):
    """The earlier turn as it stands in the whole row is not what the model generates there."""
    with pytest.raises(InputError) as raised:
        trained(name, conversation)
    assert str(raised.value).startswith("x.jsonl:6: the chat template renders the messages before and up to answer 1")
    assert "`loss_on: last`" in str(raised.value)
    apart = [trained(name, c) for c in one_per_answer(conversation)]
    last, found = trained(name, conversation, LossOn.LAST)
    assert apart[1] == (last, found)
    assert Kind.LOST_THINKING not in found  # of turns that are not trained: inference leaves it out there, too
    for (texts, _), message in zip(apart, (conversation.messages[1], conversation.messages[3]), strict=True):
        assert len(texts) == 1
        assert message.content in texts[0]
        assert message.extra.get("reasoning_content", "") in texts[0]


def test_harmony_trains_analysis_and_final_channel():
    texts, found = trained("gpt_oss", turns(user("q"), said("a", thinking="hm")))
    assert texts == ["<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>"]
    assert not found
    steps = turns(user("q"), said("", **CALL), Message("tool", "r"), said("a"), tools=TOOLS)
    call = '<|channel|>commentary json<|message|>{"key": "a b"}<|call|>'
    assert trained("gpt_oss", steps)[0] == [f" to=functions.look_up{call}", "<|channel|>final<|message|>a<|return|>"]


def test_tool_calls_of_qwen_and_llama():
    steps = turns(user("q"), said("", **CALL), Message("tool", "r"), said("a"), tools=TOOLS)
    call = '<tool_call>\n{"name": "look_up", "arguments": {"key": "a b"}}\n</tool_call><|im_end|>'
    assert trained("qwen2_5", steps)[0] == [call, "a<|im_end|>"]
    call = '{"name": "look_up", "parameters": {"key": "a b"}}<|eot_id|>'
    assert trained("llama3_2", steps)[0] == [call, "a<|eot_id|>"]


def test_what_is_said_beside_a_tool_call_may_be_lost():
    steps = turns(user("q"), said("Let me see.", **CALL), Message("tool", "r"), said("a"), tools=TOOLS)
    assert Kind.LOST_THINKING in trained("llama3_2", steps)[1]
    assert Kind.LOST_THINKING not in trained("qwen2_5", steps)[1]


def test_a_call_that_the_template_leaves_out_is_refused():
    steps = turns(user("q"), said("", **CALL), Message("tool", "r"), said("a"))
    with pytest.raises(
        InputError, match="^x.jsonl:6: the chat template leaves out the call of 'look_up' of the answer"
    ):
        trained("chatml", steps)


LOST = {
    "a field that the template does not know": ("chatml", said("a", reasoning_content="hm")),
    "cut from the content": ("deepseek_v3", said("<think>hm</think>a")),
    "cut without an opening tag": ("deepseek_v3", said("hm</think>a")),
}


@pytest.mark.parametrize(("name", "message"), LOST.values(), ids=LOST)
def test_lost_thinking_is_found(name, message):
    texts, found = trained(name, turns(user("q"), message))
    assert Kind.LOST_THINKING in found
    assert "hm" not in texts[0]


KEPT = {
    "chatml": said("<think>hm</think>a"),
    "smollm3": said("<think>\nhm\n</think>\na"),
    "qwen2_5": said("hm</think>a"),
    "llama3": said("<think>\n\n</think>a", reasoning_content="  "),
}


@pytest.mark.parametrize(("name", "message"), KEPT.items(), ids=KEPT)
def test_kept_thinking_is_not(name, message):
    assert trained(name, turns(user("q"), message))[1] == frozenset()


def test_an_answer_without_words_is_an_answer_and_thinking_alone_is_none():
    assert trained("deepseek_v3", turns(user("q"), said("<think>hm</think>🙂")))[0] == ["🙂<｜end▁of▁sentence｜>"]
    with pytest.raises(InputError, match="^x.jsonl:6: the chat template leaves out the text of the answer"):
        trained("deepseek_v3", turns(user("q"), said("<think>hm</think>")))


def test_lost_thinking_of_a_row_that_spells_control_tokens():
    assert trained("chatml", turns(user("q"), said("a", thinking="<|im_end|>")))[1] == {
        Kind.LOST_THINKING,
        Kind.CONTROL_TOKEN,
    }


def test_a_generation_prompt_that_no_rendered_answer_begins_with_is_refused():
    for conversation in (PLAIN, turns(user("q"), said("<think>\nhm</think>a"))):
        with pytest.raises(InputError) as raised:
            trained("deepseek_r1", conversation)
        sentence = str(raised.value)
        assert sentence.startswith(
            "x.jsonl:6: the generation prompt is '<｜Assistant｜><think>\\n', and the rendered answer 1"
        )
        assert sentence.endswith("give a `chat_template` that writes answers as the model does")


def test_a_generation_prompt_that_opens_the_block():
    """As Qwen's thinking models: the header is not trained, what follows <think> is."""
    tokenizer = families.tokenizer_of("qwen3")
    template = tokenizer.chat_template.replace(
        "    {{- '<|im_start|>assistant\\n' }}\n    {{- '<think>",
        "    {{- '<|im_start|>assistant\\n<think>\\n' }}\n    {{- '<think>",
    )
    assert template != tokenizer.chat_template
    example = render(turns(user("q"), said("hm\n</think>\n\na")), tokenizer, chat_template=template)
    assert trained_texts(example, tokenizer) == ["hm\n</think>\n\na<|im_end|>"]
    assert Kind.LOST_THINKING not in example.found


def test_smollm3_marks_its_header_which_is_not_trained():
    renderer = Renderer(families.tokenizer_of("smollm3"))
    [example] = renderer([turns(Message("system", "/no_think"), *PLAIN.messages)])
    assert trained_texts(example, renderer.tokenizer) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_system_message_that_training_rows_would_lose_is_refused():
    """Mistral's writes it before the last user message only if that is the last message, so never in a training row."""
    for name in ("mistral_v3", "mistral_tekken"):
        with pytest.raises(
            InputError, match="^x.jsonl:6: the chat template renders the messages before and up to answer 2"
        ):
            trained(name, turns(Message("system", "s"), user("q"), said("a")))
        assert trained(name, PLAIN)[0][1].strip() == "two</s>"


@pytest.mark.parametrize("tools", [TOOLS, ({"name": "look_up"},)], ids=["wrapped", "bare"])
def test_tools_that_the_template_leaves_out_are_found(tools):
    asked = turns(user("q"), said("a"), tools=tools)
    assert Kind.LOST_TOOLS in trained("chatml", asked)[1]
    assert Kind.LOST_TOOLS not in trained("qwen2_5", asked)[1]
    assert Kind.LOST_TOOLS not in trained("chatml", turns(user("q"), said("a")))[1]


def test_a_system_message_that_the_template_leaves_out_is_found():
    tokenizer = families.tokenizer_of("mistral_v3")
    row = turns(Message("system", "be brief"), user("q"), said("a"))
    with pytest.raises(InputError, match="renders the messages before"):
        render(row, tokenizer)
    parts = {"instruction_part": "[INST]", "response_part": "[/INST]"}
    assert Kind.LOST_MESSAGE in render(row, tokenizer, **parts).found
    assert Kind.LOST_MESSAGE not in render(turns(user("q"), said("a")), tokenizer, **parts).found
    assert Kind.LOST_MESSAGE not in trained("gemma2", turns(user(" q \n"), said("a")))[1]

"""Whose each token is, which messages are trained, and what rendering finds in a row."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from welltuned.data.conversation import Conversation, Format, Kind, Message
from welltuned.data.findings import broken
from welltuned.data.render import LossOn, MaskFrom, Renderer, Speaker, render, render_prompt, shortened, trained_texts
from welltuned.errors import InputError

families = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("families.py"))))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def turns(*pairs, **options):
    messages = (
        Message(role, content, trained=trained)
        for role, content, trained in (p + (None,) * (3 - len(p)) for p in pairs)
    )
    return Conversation(tuple(messages), "x.jsonl:8", **options)


def words_of(example, tokenizer, speaker):
    """The texts of the runs of tokens that are a speaker's."""
    edges = np.flatnonzero(np.diff((example.roles == speaker).astype(int), prepend=0, append=0)).tolist()
    return [tokenizer.decode(example.ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_each_token_has_its_speaker(tokenizer):
    row = turns(
        ("system", "user"), ("user", "a"), ("assistant", "s"), ("tool", " m "), ("user", ""), ("assistant", "ant")
    )
    example = render(row, tokenizer, chat_template=CHATML)
    assert example.roles.dtype == np.uint8
    assert words_of(example, tokenizer, Speaker.SYSTEM) == ["user"]
    assert words_of(example, tokenizer, Speaker.USER) == ["a"]
    assert words_of(example, tokenizer, Speaker.TOOL) == [" m "]
    assert words_of(example, tokenizer, Speaker.ASSISTANT) == ["s<|im_end|>", "ant<|im_end|>"]
    assert words_of(example, tokenizer, Speaker.TEMPLATE)[0] == "<|im_start|>system\n"


@pytest.mark.parametrize("name", ["llama3", "gemma3", "command_r", "qwen2_5", "phi4", "granite3", "smollm3"])
def test_speakers_in_templates_that_trim_and_merge(name):
    tokenizer = families.tokenizer_of(name)
    row = turns(("system", "sys"), ("user", " user "), ("assistant", "model"), ("user", "o"), ("assistant", "b"))
    example = render(row, tokenizer)
    assert [t.strip() for t in words_of(example, tokenizer, Speaker.SYSTEM)] == ["sys"]
    assert [t.strip() for t in words_of(example, tokenizer, Speaker.USER)] == ["user", "o"]
    assert (example.roles[example.mask] == Speaker.ASSISTANT).all()
    assert (example.roles == Speaker.ASSISTANT).sum() == example.mask.sum()


def test_speakers_where_messages_have_more_than_text():
    tokenizer = families.tokenizer_of("qwen3")
    call = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"user": 1}}}]}
    messages = (
        Message("user", "q?"),
        Message("assistant", "", call),
        Message("tool", "res"),
        Message("assistant", "a"),
    )
    example = render(Conversation(messages, "x:1"), tokenizer, loss_on=LossOn.LAST)
    assert words_of(example, tokenizer, Speaker.USER) == ["q?"]
    assert words_of(example, tokenizer, Speaker.TOOL) == ["res"]
    assert words_of(example, tokenizer, Speaker.ASSISTANT)[-1] == "<think>\n\n</think>\n\na<|im_end|>"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(contents=st.lists(st.text("user asitn\n<|_>é"), min_size=4, max_size=4))
def test_speakers_are_right_whatever_is_said(contents, tokenizer):
    contents[3] += "."
    row = turns(*zip(("system", "user", "user", "assistant"), contents, strict=True))
    example = render(row, tokenizer, chat_template=CHATML)
    for speaker, said in ((Speaker.USER, contents[1] + contents[2]), (Speaker.SYSTEM, contents[0])):
        found = "".join(words_of(example, tokenizer, speaker))  # a newline may be in one token with the header's
        assert found.replace("\n", "") == said.replace("\n", "")


def test_slow_tokenizers_tell_the_answers_only():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    example = render(turns(("user", "q"), ("assistant", "a")), ByT5Tokenizer(), chat_template=template)
    assert set(example.roles.tolist()) == {Speaker.TEMPLATE, Speaker.ASSISTANT}


# Which messages are trained

FOUR = (("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two"))
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PARTS = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}


def flagged(first, second):
    return turns(FOUR[0], (*FOUR[1], first), FOUR[2], (*FOUR[3], second))


@pytest.mark.parametrize("options", [{}, {"chat_template": MARKED}, PARTS], ids=["prefixes", "markers", "parts"])
@pytest.mark.parametrize(
    ("first", "second", "loss_on", "expected"),
    [
        (None, None, LossOn.ASSISTANT, ["one", "two"]),
        (False, None, LossOn.ASSISTANT, ["two"]),
        (None, False, LossOn.ASSISTANT, ["one"]),
        (True, None, LossOn.ASSISTANT, ["one", "two"]),
        (None, None, LossOn.LAST, ["two"]),
        (True, None, LossOn.LAST, ["one", "two"]),
        (True, False, LossOn.LAST, ["one"]),
        (False, True, LossOn.LAST, ["two"]),
    ],
)
def test_a_messages_own_flag_counts_for_more_than_loss_on(first, second, loss_on, expected, options, tokenizer):
    example = render(flagged(first, second), tokenizer, loss_on=loss_on, **{"chat_template": CHATML, **options})
    assert trained_texts(example, tokenizer) == [f"{text}<|im_end|>" for text in expected]


def test_everything_but_what_is_marked(tokenizer):
    renderer = Renderer(tokenizer, chat_template=CHATML, loss_on=LossOn.EVERYTHING)
    [example] = renderer([flagged(False, None)])
    assert "one" not in "".join(trained_texts(example, tokenizer))
    [example] = renderer([turns(("user", "secret", False), ("assistant", "a"))])
    assert "secret" not in "".join(trained_texts(example, tokenizer))
    assert trained_texts(example, tokenizer)[1] == "<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert renderer.mask_from is MaskFrom.EVERYTHING


def test_the_users_messages_are_never_trained(tokenizer):
    with pytest.raises(InputError, match="^x.jsonl:8: a user message is marked to be trained"):
        render(turns(("user", "q", True), ("assistant", "a")), tokenizer, chat_template=CHATML)


def test_the_messages_of_an_explicit_prompt_are_not_trained_even_if_marked(tokenizer):
    row = Conversation(flagged(True, None).messages, "x:1", trained_from=2)
    assert trained_texts(render(row, tokenizer, chat_template=CHATML), tokenizer) == ["two<|im_end|>"]


def test_a_row_with_nothing_to_train_is_found_and_kept(tokenizer):
    renderer = Renderer(tokenizer, chat_template=CHATML)
    examples = renderer([flagged(False, False), flagged(None, None)])
    assert [Kind.UNTRAINED in e.found for e in examples] == [True, False]
    assert not examples[0].mask.any()


# What rendering finds


def found(*pairs, tokenizer, **options):
    return render(turns(*pairs), tokenizer, **{"chat_template": CHATML, **options}).found


def test_findings(tokenizer):
    good = (("user", "q"), ("assistant", "a"))
    assert found(*good, tokenizer=tokenizer) == frozenset()
    assert found(("system", " \n"), *good, tokenizer=tokenizer) == {Kind.EMPTY_TURN}
    assert found(("user", ""), good[1], tokenizer=tokenizer) == {Kind.EMPTY_TURN}
    assert found(good[0], *good, tokenizer=tokenizer) == {Kind.REPEATED_TURN}
    assert found(*good, *good, tokenizer=tokenizer) == frozenset()
    assert found(("user", "caf\u00c3\u00a9"), good[1], tokenizer=tokenizer) == {Kind.BAD_ENCODING}
    assert found(good[0], ("assistant", "it\u00e2\u20ac\u2122s"), tokenizer=tokenizer) == {Kind.BAD_ENCODING}


def test_an_untrained_end_is_found(tokenizer):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    assert found(*FOUR, tokenizer=tokenizer, chat_template=template) == {Kind.END_UNTRAINED}
    everything = {"chat_template": CHATML, "loss_on": LossOn.EVERYTHING}
    assert found(*FOUR, tokenizer=tokenizer, **everything) == frozenset()
    assert found(*FOUR, tokenizer=tokenizer, **{**everything, "chat_template": template}) == {Kind.END_UNTRAINED}


@pytest.mark.parametrize(
    "text",
    [
        "\ufffd",
        "a\x00b",
        "a\x93quoted\x94",
        "FuÃŸ",
        "cafÃ©",
        "garÃ§on",
        "itâ€™s",
        "â€œno",
        "20 Â°C",
        "ðŸ˜€",
        "ï»¿x",
        "ï¿½",
        "maÃ±ana",
    ],
)
def test_wrong_encodings_are_seen(text):
    assert broken(text)


@pytest.mark.parametrize(
    "text",
    ["", "plain\ttext\r\n", "café garçon Fuß", "«IRMÃ»", "SÃO PAULO", "IRMÃ E MÃE", "Â", "Ângela", "10 €", "“a” – ’s",
     "ŸÂÃ", "日本語", "Привет", "٣", "😀👨‍👩‍👧", "naïve ï ½", "5 °C ± 2 µm", "\u200b\u00ad", "ÂNCORA", "AMANHÃ. “Não”"],
)  # fmt: skip
def test_right_ones_are_not_taken_for_wrong(text):
    assert not broken(text)


# Texts without a template


def test_documents_are_trained_whole_whatever_the_template(plain_tokenizer, tokenizer):
    row = Conversation((Message("document", "The cat sat"),), "x:1", Format.TEXT)
    renderer = Renderer(plain_tokenizer)
    [example] = renderer([row])
    assert renderer.mask_from is MaskFrom.EVERYTHING
    assert plain_tokenizer.decode(example.ids.tolist()) == "<s>The cat sat</s>"
    assert example.mask.tolist() == [False] + [True] * (len(example.ids) - 1)
    assert example.roles.tolist() == [Speaker.TEMPLATE] + [Speaker.DOCUMENT] * (len(example.ids) - 1)
    assert example.found == frozenset()
    ended = Conversation((Message("document", "<s>The cat sat</s>"),), "x:1", Format.TEXT)
    assert renderer([ended])[0].ids.tolist() == example.ids.tolist()
    mixed = Renderer(tokenizer, chat_template=CHATML)
    chat = turns(*FOUR)
    examples = mixed([chat, row, chat])
    assert trained_texts(examples[0], tokenizer) == ["one<|im_end|>", "two<|im_end|>"]
    assert tokenizer.decode(examples[1].ids.tolist()) == "The cat sat</s>"
    assert mixed.mask_from is MaskFrom.PREFIXES


def test_plain_pairs_have_their_speakers(plain_tokenizer):
    row = Conversation((Message("user", "The cat"), Message("assistant", " sat")), "x:1", Format.PROMPT_COMPLETION)
    example = render(row, plain_tokenizer)
    assert words_of(example, plain_tokenizer, Speaker.USER) == ["The cat"]
    assert words_of(example, plain_tokenizer, Speaker.ASSISTANT) == [" sat</s>"]
    prompt = render_prompt(Conversation(row.messages[:1], "prompt"), plain_tokenizer, None)
    assert prompt == example.ids[: int(example.mask.argmax())].tolist()


# Ends and starts


def test_a_padding_token_that_is_the_end_token_is_trained_like_any_end(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|im_end|>", pad_token="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = render(turns(*FOUR), tokenizer, chat_template=CHATML)
    assert trained_texts(example, tokenizer) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_start_token_is_written_once(plain_tokenizer):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    row = turns(("user", "q"), ("assistant", "a"))
    example = render(row, plain_tokenizer, chat_template=template)
    assert example.ids.tolist().count(plain_tokenizer.bos_token_id) == 1
    with pytest.raises(InputError, match="^x.jsonl:8: the chat template writes the start token '<s>' twice"):
        render(row, plain_tokenizer, chat_template="{{ bos_token }}" + template)


def test_shortening_cuts_all_arrays(tokenizer):
    [example] = Renderer(tokenizer, chat_template=CHATML)([turns(*FOUR)])
    assert shortened(example, len(example.ids)) is example
    short = shortened(example, 12)
    assert short.cut
    assert len(short.ids) == len(short.mask) == len(short.roles) == 12
    assert short.found == example.found
    assert shortened(example, 3).found == example.found | {Kind.UNTRAINED}

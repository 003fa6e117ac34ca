"""Chat templates that are out of the ordinary: what they write after the last turn, leave out, or render otherwise."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from welltuned.data.conversation import Conversation, Kind, Message
from welltuned.data.render import LossOn, MaskFrom, Renderer, render, render_all, trained_texts
from welltuned.data.templates import Prompt, closing_text, try_render_texts
from welltuned.errors import InputError

families = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("families.py"))))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def turns(*texts, first="user"):
    roles = ["user", "assistant"] * len(texts)
    return Conversation(tuple(Message(r, t) for r, t in zip(roles, texts, strict=False)), "x.jsonl:2")


ONE, TWO = turns("1", "one"), turns("1", "one", "2", "two")


def test_every_family_has_its_template():
    assert {path.stem for path in families.TEMPLATES.glob("*.jinja")} == set(families.FAMILIES)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_families_write_after_the_last_turn(name):
    tokenizer = families.tokenizer_of(name)
    assert closing_text(tokenizer, tokenizer.chat_template).strip() == families.FAMILIES[name].closing


@pytest.mark.parametrize("name", ["phi3", "phi4_mini"])
def test_the_end_of_the_text_is_not_the_answers(name):
    tokenizer = families.tokenizer_of(name)
    example = render(TWO, tokenizer)
    assert [t.strip() for t in trained_texts(example, tokenizer)] == ["one<|end|>", "two<|end|>"]
    assert example.ids[-1] == tokenizer.eos_token_id
    assert not example.mask[-1]


@pytest.mark.parametrize("conversation", [ONE, TWO])
def test_a_generation_prompt_that_is_always_there_is_not_trained(conversation, tokenizer):
    template = CHATML.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
    example = render(conversation, tokenizer, chat_template=template)
    expected = trained_texts(render(conversation, tokenizer, chat_template=CHATML), tokenizer)
    assert trained_texts(example, tokenizer) == expected
    assert tokenizer.decode(example.ids.tolist()).endswith("<|im_start|>assistant\n")
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    assert trained_texts(render(conversation, tokenizer, chat_template=template, **parts), tokenizer) == expected
    template = PLAIN.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
    example = render(conversation, tokenizer, chat_template=template)
    assert [t.strip() for t in trained_texts(example, tokenizer)] == [t.removesuffix("<|im_end|>") for t in expected]


def test_a_template_that_leaves_the_answers_text_out(tokenizer):
    template = CHATML.replace("m.content", "(m.content if m.role == 'user' else '')")
    with pytest.raises(InputError, match="^x.jsonl:2: the chat template leaves out the text of the answer .message 1."):
        render(ONE, tokenizer, chat_template=template)


def test_a_template_that_leaves_the_answers_out_leaves_nothing_to_train(tokenizer):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    [example] = Renderer(tokenizer, chat_template=template)([ONE])
    assert example.found == {Kind.UNTRAINED}


def test_answers_that_are_control_tokens_only_are_answers(tokenizer):
    assert trained_texts(render(turns("1", "<s>"), tokenizer, chat_template=CHATML), tokenizer) == ["<s><|im_end|>"]


UNSTABLE = {
    "a header only where the user is last": "{% if messages[-1].role == 'user' %}{{ 'Answer this.\n' }}{% endif %}"
    + CHATML,
    "how many messages there are": "{{ messages | length }}" + CHATML,
    "the last message first": CHATML.replace("in messages", "in messages[::-1]"),
}


@pytest.mark.parametrize("template", UNSTABLE.values(), ids=UNSTABLE)
def test_what_depends_on_the_turns_to_come_is_refused(template, tokenizer):
    for conversation, loss_on in ((ONE, LossOn.ASSISTANT), (TWO, LossOn.LAST)):
        with pytest.raises(
            InputError, match="^x.jsonl:2: the chat template renders the messages before and up to answer"
        ):
            render(conversation, tokenizer, chat_template=template, loss_on=loss_on)


def test_merged_turns(tokenizer):
    template = (
        "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}"
        "{{ '<|im_start|>' + m.role + '\\n' }}{% else %}{{ '\\n\\n' }}{% endif %}{{ m.content }}"
        "{% if loop.last or messages[loop.index0 + 1].role != m.role %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    users = Conversation((Message("user", "0"), *ONE.messages), "x:1")
    assert trained_texts(render(users, tokenizer, chat_template=template), tokenizer) == ["one<|im_end|>"]
    answers = Conversation((*ONE.messages, Message("assistant", "more")), "x.jsonl:2")
    with pytest.raises(InputError, match="^x.jsonl:2: "):  # the model would have to go on where it has stopped
        render(answers, tokenizer, chat_template=template)


def test_a_system_message_merged_into_the_users(tokenizer):
    template = (
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{{ messages[0].content + '\\n\\n' if loop.first and messages[0].role == 'system' else '' }}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    row = Conversation((Message("system", "s"), *TWO.messages), "x:1")
    assert trained_texts(render(row, tokenizer, chat_template=template), tokenizer) == [
        "one<|im_end|>",
        "two<|im_end|>",
    ]


def test_dates_do_no_harm(tokenizer):
    example = render(TWO, tokenizer, chat_template="{{ strftime_now('%d %b %Y') + '\\n' }}" + CHATML)
    assert trained_texts(example, tokenizer) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_prompt_that_the_template_refuses_is_no_answers_beginning(tokenizer):
    """A template that wants an answer last can still be trained by its markers, or its parts."""
    refusing = "{% if messages[-1].role == 'user' %}{{ raise_exception('no answer') }}{% endif %}" + CHATML
    with pytest.raises(InputError, match="^x.jsonl:2: the chat template cannot render this row .no answer"):
        render(ONE, tokenizer, chat_template=refusing)
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    assert trained_texts(render(ONE, tokenizer, chat_template=refusing, **parts), tokenizer) == ["one<|im_end|>"]
    marked = (
        "{% if messages[-1].role == 'user' %}{{ raise_exception('no answer') }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{% endfor %}"
    )
    rendering = render_all([ONE], tokenizer, chat_template=marked)
    assert rendering.mask_from is MaskFrom.MARKERS
    assert trained_texts(rendering.examples[0], tokenizer) == ["one<|im_end|>"]


HEADERS_MARKED = {
    "the end of the header": "{{ '<|im_start|>assistant' }}{% generation %}{{ '\\n' + m.content + '<|im_end|>' }}",
    "the header": "{% generation %}{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}",
    "the end of the text": "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{{ eos_token if loop.last else '' }}",
}


@pytest.mark.parametrize("answer", HEADERS_MARKED.values(), ids=HEADERS_MARKED)
def test_markers_that_cover_more_than_is_generated(answer, tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{% endgeneration %}{% else %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    for conversation, expected in ((ONE, ["one<|im_end|>"]), (TWO, ["one<|im_end|>", "two<|im_end|>"])):
        rendering = render_all([conversation], tokenizer, chat_template=template)
        assert rendering.mask_from is MaskFrom.MARKERS_CHECKED
        assert trained_texts(rendering.examples[0], tokenizer) == expected


def test_unchecked_markers_do_not_train_the_header(tokenizer):
    """The end of the last answer is another, so renders up to the first say nothing; its block has the header."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '<|im_start|>assistant\\n' + m.content + ('</s>' if loop.last else '<|im_end|>') }}"
        "{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    rendering = render_all([TWO], tokenizer, chat_template=template)
    assert rendering.mask_from is MaskFrom.MARKERS
    assert trained_texts(rendering.examples[0], tokenizer) == ["one<|im_end|>", "two</s>"]


def test_rendering_goes_on_after_a_row_that_fails(tokenizer):
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('bad row') }}{% endif %}" + CHATML
    prompts = [Prompt(turns(text, "a"), 2) for text in ("1", "bad", "2")]
    texts = try_render_texts(tokenizer, template, prompts)
    assert [isinstance(text, InputError) for text in texts] == [False, True, False]
    with pytest.raises(InputError, match="bad row"):
        render_all([p.conversation for p in prompts], tokenizer, chat_template=template)

"""Property: over chat templates of every kind, exactly the answers and their end-of-turn tokens are trained."""

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from welltuned.data.conversation import Conversation, Message
from welltuned.data.render import LossOn, MaskFrom, render, render_all, trained_texts
from welltuned.errors import InputError


@dataclass(frozen=True)
class Case:
    template: str
    end: str
    trims: bool = False  # the template strips each content
    system: bool = True
    mask_from: MaskFrom = MaskFrom.PREFIXES


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
    "+ m.content | trim + '<|eot_id|>' %}{{ bos_token + text if loop.first else text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim "
    "+ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
TRIMMING = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + ' ' + m.content.strip() + '  <|im_end|>\\n\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant ' -}}{%- endif -%}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As SmolLM3's: the header and the newline after the turn are inside the block too.
MARKED_WITH_HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%}"
    "{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{%- endgeneration -%}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CASES = {
    "chatml": Case(CHATML, "<|im_end|>"),
    "llama3": Case(LLAMA3, "<|eot_id|>", trims=True),
    "zephyr": Case(ZEPHYR, "</s>"),
    "gemma": Case(GEMMA, "<end_of_turn>", trims=True, system=False),
    "trimming": Case(TRIMMING, "  <|im_end|>", trims=True),
    "marked": Case(MARKED, "<|im_end|>", mask_from=MaskFrom.MARKERS_CHECKED),
    "marked with header": Case(MARKED_WITH_HEADER, "<|im_end|>", mask_from=MaskFrom.MARKERS_CHECKED),
}
texts = st.one_of(
    st.text(alphabet="ab2 \n\té🙂漢.,<|>/", max_size=12),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12),
)
answers = texts.filter(lambda text: text.strip())


@st.composite
def conversations(draw, system=True):
    messages = [Message("system", draw(texts))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(texts)), Message("assistant", draw(answers))]
    return Conversation(tuple(messages), "x.jsonl:1")


def said(message, case):
    return (message.content.strip() if case.trims else message.content) + case.end


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_exactly_the_answers_and_their_ends_are_trained(name, data, tokenizer):
    case = CASES[name]
    conversation = data.draw(conversations(case.system))
    rendering = render_all([conversation], tokenizer, chat_template=case.template)
    example = rendering.examples[0]
    assert rendering.mask_from is case.mask_from
    assert trained_texts(example, tokenizer) == [said(m, case) for m in conversation.messages if m.role == "assistant"]
    check_inference_parity(example, conversation, tokenizer, case, rendering.boundary_splits)


def check_inference_parity(example, conversation, tokenizer, case, splits):
    """What comes before the first answer are the ids that inference gives the model; the whole is the template's."""
    chat = [m.to_template() for m in conversation.messages]
    first = next(i for i, m in enumerate(conversation.messages) if m.role == "assistant")
    prompt = tokenizer.apply_chat_template(
        chat[:first], chat_template=case.template, add_generation_prompt=True, return_dict=False
    )
    assert example.ids[: int(example.mask.argmax())].tolist() == prompt
    whole = tokenizer.apply_chat_template(chat, chat_template=case.template, tokenize=False)
    assert tokenizer.decode(example.ids.tolist()) == whole
    if not splits:
        assert example.ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_only_the_last_answer(name, data, tokenizer):
    case = CASES[name]
    conversation = data.draw(conversations(case.system))
    example = render(conversation, tokenizer, chat_template=case.template, loss_on=LossOn.LAST)
    assert trained_texts(example, tokenizer) == [said(conversation.messages[-1], case)]


@pytest.mark.parametrize("name", ["chatml", "marked"])
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_given_parts_find_the_same_mask(name, data, tokenizer):
    conversation = data.draw(conversations())
    template = CASES[name].template
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    by_structure = render(conversation, tokenizer, chat_template=template)
    by_parts = render(conversation, tokenizer, chat_template=template, **parts)
    assert by_structure.ids.tolist() == by_parts.ids.tolist()
    assert by_structure.mask.tolist() == by_parts.mask.tolist()


TWO_TURNS = Conversation(
    (Message("user", "1"), Message("assistant", "one"), Message("user", "2"), Message("assistant", "two")), "x.jsonl:9"
)
ONE_TURN = Conversation(TWO_TURNS.messages[:2], "x.jsonl:9")
# Only the last turn gets an end token, earlier ones another (as gpt-oss's <|return|> and <|end|>).
LAST_DIFFERS = CHATML.replace(
    "m.content + '<|im_end|>\\n'", "m.content + ('</s>' if loop.last and m.role == 'assistant' else '<|im_end|>\\n')"
)
DROPS_HISTORY = CHATML.replace("in messages", "in messages[-2:]")
UPPERCASES_THE_LAST = CHATML.replace("m.content", "(m.content | upper if loop.last else m.content)")


@pytest.mark.parametrize("template", [LAST_DIFFERS, DROPS_HISTORY, UPPERCASES_THE_LAST])
def test_templates_that_are_not_prefix_stable_fail_closed(template, tokenizer):
    with pytest.raises(InputError) as raised:
        render(TWO_TURNS, tokenizer, chat_template=template)
    assert str(raised.value).startswith("x.jsonl:9: the chat template renders the messages before and up to answer")
    assert "`instruction_part` and `response_part`" in str(raised.value)


def test_an_unstable_template_still_trains_the_last_turn_or_by_parts(tokenizer):
    example = render(TWO_TURNS, tokenizer, chat_template=LAST_DIFFERS, loss_on=LossOn.LAST)
    assert trained_texts(example, tokenizer) == ["two</s>"]
    example = render(
        TWO_TURNS,
        tokenizer,
        chat_template=LAST_DIFFERS,
        instruction_part="<|im_start|>user\n",
        response_part="<|im_start|>assistant\n",
    )
    assert trained_texts(example, tokenizer) == ["one<|im_end|>", "two</s>"]


def test_an_unstable_template_with_markers_uses_them(tokenizer):
    template = MARKED.replace("m.content + '<|im_end|>' }}", "m.content + ('</s>' if loop.last else '<|im_end|>') }}")
    rendering = render_all([TWO_TURNS], tokenizer, chat_template=template)
    assert rendering.mask_from is MaskFrom.MARKERS
    assert trained_texts(rendering.examples[0], tokenizer) == ["one<|im_end|>", "two</s>"]


WRONG_MARKERS = {
    "end left out": MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}"),
    "first letter left out": MARKED.replace(
        "{% generation %}{{ m.content", "{{ m.content[0] }}{% generation %}{{ m.content[1:]"
    ),
    "the user is marked": MARKED.replace("m.role == 'assistant' %}", "m.role == 'user' %}").replace(
        "assistant\\n' }}{% gen", "user\\n' }}{% gen"
    ),
    "nothing is marked": MARKED.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'nobody' %}"),
}


@pytest.mark.parametrize("template", WRONG_MARKERS.values(), ids=WRONG_MARKERS)
def test_markers_that_disagree_with_inference_are_refused(template, tokenizer):
    with pytest.raises(InputError, match="x.jsonl:9: the template's generation markers cover"):
        render(ONE_TURN, tokenizer, chat_template=template)


def test_a_templates_own_refusal_names_the_row(tokenizer):
    with_system = Conversation((Message("system", "s"), *ONE_TURN.messages), "x.jsonl:4")
    with pytest.raises(InputError, match="^x.jsonl:4: the chat template cannot render this row .System role not supp"):
        render_all([ONE_TURN, with_system], tokenizer, chat_template=GEMMA)
    with pytest.raises(InputError, match="^x.jsonl:4: the chat template cannot render this row"):
        render_all(
            [ONE_TURN, with_system],
            tokenizer,
            chat_template=CHATML.replace("m.content", "m.content + m.nothing if m.role == 'system' else m.content"),
        )
    with pytest.raises(InputError, match="^chat_template: line 1 is not valid jinja"):
        render(ONE_TURN, tokenizer, chat_template="{% for m in messages %}")


def test_a_turn_closed_by_ordinary_text_trains_that_text(tokenizer):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert trained_texts(render(TWO_TURNS, tokenizer, chat_template=template), tokenizer) == [" one\n", " two\n"]


def test_an_answer_that_begins_with_the_headers_newline_is_split_there(tokenizer):
    """'\\n' + '\\n\\n72' would be fewer tokens; at inference the header's newline is a token of its own."""
    conversation = Conversation((Message("user", "1"), Message("assistant", "\n\n72")), "x.jsonl:1")
    rendering = render_all([conversation], tokenizer, chat_template=CHATML)
    assert rendering.boundary_splits == 1
    assert trained_texts(rendering.examples[0], tokenizer) == ["\n\n72<|im_end|>"]


def test_a_header_that_is_tokenised_otherwise_before_a_word_is_split_there(tokenizer):
    """GPT-2's rule: '\\n\\n' is one token where the prompt ends, and two before the first word of the answer."""
    rendering = render_all([ONE_TURN], tokenizer, chat_template=LLAMA3)
    assert rendering.boundary_splits == 1
    check_inference_parity(rendering.examples[0], ONE_TURN, tokenizer, CASES["llama3"], splits=1)


def test_tool_turns_are_not_trained_and_parts_that_cannot_tell_are_refused(tokenizer):
    messages = (Message("user", "1"), Message("assistant", "call"), Message("tool", "data"), Message("assistant", "a"))
    conversation = Conversation(messages, "x.jsonl:5")
    expected = ["call<|im_end|>", "a<|im_end|>"]
    assert trained_texts(render(conversation, tokenizer, chat_template=CHATML), tokenizer) == expected
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    with pytest.raises(InputError, match="x.jsonl:5: with these parts the tool turn .message 2. would be trained"):
        render(conversation, tokenizer, chat_template=CHATML, **parts)
    parts["instruction_part"] = "<|im_start|>"
    example = render(conversation, tokenizer, chat_template=CHATML, **parts)
    assert trained_texts(example, tokenizer) == expected


@pytest.mark.parametrize(
    ("instruction", "response", "message"),
    [
        ("<|im_start|>user\n", "[/INST]", "x.jsonl:9: `response_part` '[/INST]' does not occur in the rendered row"),
        ("[INST]", "<|im_start|>assistant\n", "x.jsonl:9: `instruction_part` '[INST]' does not occur"),
        ("<|im_start|>user\n", "<|im_start|>", "x.jsonl:9: `response_part` occurs 4 times for 2 assistant messages"),
        ("<|im_start|>user\n", None, "`response_part` is missing"),
        (None, "x", "`instruction_part` is missing"),
        ("", "x", "must not be empty"),
    ],
)
def test_wrong_parts_are_refused(instruction, response, message, tokenizer):
    with pytest.raises(InputError) as raised:
        render(TWO_TURNS, tokenizer, chat_template=CHATML, instruction_part=instruction, response_part=response)
    assert str(raised.value).startswith(message) or message in str(raised.value)


def test_phi3_like_end_token_that_takes_in_the_newline_after_it(make_tokenizer):
    from tokenizers import AddedToken

    special = [AddedToken(t, rstrip=True, special=True) for t in ("<|end|>", "<|user|>", "<|assistant|>")]
    tokenizer = make_tokenizer(["</s>", *special], eos_token="</s>")
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    example = render(TWO_TURNS, tokenizer, chat_template=template)
    assert trained_texts(example, tokenizer) == ["one<|end|>", "two<|end|>"]
    conversation = Conversation((Message("user", "1"), Message("assistant", "\none")), "x.jsonl:1")
    assert trained_texts(render(conversation, tokenizer, chat_template=template), tokenizer) == ["\none<|end|>"]


@pytest.mark.parametrize("answer", ["one", "\none", "one two 🙂é", "4", "  two spaces"])
def test_sentencepiece_like_tokenizers(answer, sentencepiece_like_tokenizer):
    tokenizer = sentencepiece_like_tokenizer
    messages = (Message("user", "1"), Message("assistant", answer), Message("user", "2"), Message("assistant", "b"))
    example = render(Conversation(messages, "x:1"), tokenizer, chat_template=ZEPHYR)
    runs = trained_texts(example, tokenizer)
    assert [r.lstrip(" ") for r in runs] == [answer.lstrip(" ") + "</s>", "b</s>"]  # decoding strips a leading space
    prompt = tokenizer.apply_chat_template(
        [messages[0].to_template()], chat_template=ZEPHYR, add_generation_prompt=True, return_dict=False
    )
    assert example.ids[: int(example.mask.argmax())].tolist() == prompt


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_leading_spaces_that_offsets_leave_out_are_trained(trim_offsets, make_tokenizer):
    tokenizer = make_tokenizer(trim_offsets=trim_offsets, eos_token="</s>", bos_token="<s>")
    messages = (Message("user", "1 "), Message("assistant", "  the cat  "))
    example = render(Conversation(messages, "x:1"), tokenizer, chat_template=CHATML)
    assert trained_texts(example, tokenizer) == ["  the cat  <|im_end|>"]

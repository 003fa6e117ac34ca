"""Over the templates of many model families: ids and mask equal a slow reference that shares no code with the renderer.

The reference renders each row twice, once with every control token that the row itself spells overwritten by letters of
the same length. So it knows which control tokens are the template's, cuts the text there and wherever an answer begins
or ends, and tokenises the pieces one by one with a tokenizer that has no control tokens at all.
"""

import json
import re
import runpy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer

from welltuned.data.conversation import Conversation, Kind, Message
from welltuned.data.render import LossOn, Renderer, render_prompt
from welltuned.errors import InputError

families = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("families.py"))))
FAMILIES, tokenizer_of = families.FAMILIES, families.tokenizer_of
SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")  # a tokenizer's, not Python's


@cache
def renderer_of(name, loss_on=LossOn.ASSISTANT):
    return Renderer(tokenizer_of(name), loss_on=loss_on)


# The reference


def controls(family):
    """Strings that no row may say; in answers, all but the thinking tags of those that are not special."""
    return [*family.special, *(t for t in family.plain if "｜" in t and "tool" not in t)]


def overwritten(value, family):
    pattern = "|".join(map(re.escape, sorted(controls(family), key=len, reverse=True)))
    return json.loads(re.sub(pattern, lambda m: "Q" * len(m.group()), json.dumps(value, ensure_ascii=False)))


def reference(conversation, name, loss_on):
    """(ids, mask) or None where the answers' characters cannot be told from renders of the turns before them."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    chat = [m.to_template() for m in conversation.messages]
    tools = None if conversation.tools is None else list(conversation.tools)

    def render(messages, generation_prompt=False, tools=tools):
        return tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generation_prompt, tokenize=False
        )

    masked, masked_tools = overwritten(chat, family), overwritten(tools, family)
    real, blind = render(chat), render(masked, tools=masked_tools)
    assert len(real) == len(blind)
    answers = [i for i, m in enumerate(chat) if m["role"] == "assistant"]
    wanted = answers[-1:] if loss_on is LossOn.LAST else answers
    borders, trained = {}, []
    for i in answers:
        before = render(masked[:i], True, masked_tools)
        upto = render(masked[: i + 1], False, masked_tools)
        upto = upto.removesuffix(family.closing) if family.closing else upto
        if blind.startswith(before) and blind.startswith(upto):
            end = len(upto)
            if upto.rstrip().endswith((*family.special, *family.plain)):
                end = len(upto.rstrip())
            borders |= {len(before): "start", end: borders.get(end, "end")}
            if i in wanted:
                trained.append((len(before), end))
        elif i in wanted and loss_on is not LossOn.EVERYTHING:
            return None
    if loss_on is LossOn.EVERYTHING:
        trained = [(0, len(real))]
    return assemble(real, blind, borders, trained, family, tokenizer)


def assemble(real, blind, borders, trained, family, tokenizer):
    pattern = "|".join(map(re.escape, sorted((*family.special, *family.plain), key=len, reverse=True)))
    places = {m.start(): m.group() for m in re.finditer(pattern, blind)}
    edges = sorted({0, len(real), *borders, *places, *(a + len(t) for a, t in places.items())})
    ids, mask = [], []
    fresh, strip = True, False  # after a control token or at the start; after one that takes in whitespace
    for start, end in zip(edges, edges[1:], strict=False):
        opening = borders.get(start) == "start"
        if opening and strip and SPACE.match(real[start:end]):
            strip = fresh = False  # the control token must not take in the answer's own whitespace
        inside = any(a <= start and end <= b for a, b in trained)
        if start in places:
            piece = [tokenizer.convert_tokens_to_ids(places[start])]
            fresh, strip = True, family.rstrip and places[start] in family.special
        else:
            text = SPACE.sub("", real[start:end], 1) if strip and SPACE.match(real[start:end]) else real[start:end]
            if end in places and family.lstrip and places[end] in family.special:
                text = re.sub(f"{SPACE.pattern}$", "", text)
            piece = bare_ids(text, family.model, fresh, start == 0) if text else []
            fresh, strip = (fresh, strip) if not text else (False, False)
        ids += piece
        mask += [inside] * len(piece)
    return ids, [False, *mask[1:]]


@cache
def bare(kind):
    return Tokenizer.from_str(families.raw_model(kind))


def bare_ids(text, kind, fresh, first):
    if kind in ("always", "first"):
        prefixed = first or (fresh and kind == "always")
        kind = "always" if prefixed else "never"
    return bare(kind).encode(text, add_special_tokens=False).ids


# Random conversations


def texts(family):
    spelled = st.sampled_from([*family.special, *family.plain, "<|im_end|>", "</s>", "<|user|>"])
    words = st.one_of(
        st.text(alphabet="ab2 \n\té🙂漢.,<|>/[]｜", max_size=10),
        st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=8),
        st.sampled_from(["The cat", " sat on ", "2 + 2?", "\n\n", " ", "user", "assistant", "#### 72"]),
    )
    return st.one_of(words, st.tuples(words, spelled, words).map("".join), st.tuples(words, words).map("".join))


CALL = {"tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {"key": "a b"}}}]}
TOOLS = (
    {"type": "function", "function": {"name": "look_up", "description": "finds", "parameters": {"type": "object"}}},
)


@st.composite
def conversations(draw, name):
    family = FAMILIES[name]
    text = texts(family)
    # DeepSeek's template takes what is before </think> away; an answer that has nothing else is refused, elsewhere.
    said = text.filter(lambda t: re.sub("<think>|<｜.*?｜>", "", t.split("</think>")[-1]).strip())
    messages = [Message("system", draw(text))] if family.system and draw(st.booleans()) else []
    with_tools = family.tools and draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(text)))
        if with_tools and draw(st.booleans()):
            messages += [Message("assistant", "", CALL), Message("tool", draw(text))]
        messages.append(Message("assistant", draw(said)))
    return Conversation(tuple(messages), "x.jsonl:1", tools=TOOLS if with_tools else None)


def whole_text(conversation, name):
    chat = [m.to_template() for m in conversation.messages]
    tools = conversation.tools and list(conversation.tools)
    return tokenizer_of(name).apply_chat_template(chat, tools=tools, tokenize=False)


def spells_control(conversation, family):
    texts = [(m.role, m.content) for m in conversation.messages]
    return any(token in text for token in controls(family) for _, text in texts)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("loss_on", LossOn)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_ids_and_mask_equal_the_reference(name, loss_on, data):
    family = FAMILIES[name]
    conversation = data.draw(conversations(name))
    try:
        expected = reference(conversation, name, loss_on)
    except TemplateError:
        with pytest.raises(InputError, match="^x.jsonl:1: the chat template cannot render this row"):
            renderer_of(name, loss_on)([conversation])
        return
    if expected is None:
        assert not family.steady
        with pytest.raises(InputError, match="^x.jsonl:1: the (chat template renders|generation prompt is)"):
            renderer_of(name, loss_on)([conversation])
        return
    [example] = renderer_of(name, loss_on)([conversation])
    assert example.ids.tolist() == expected[0]
    assert example.mask.tolist() == expected[1]
    assert (Kind.CONTROL_TOKEN in example.found) == spells_control(conversation, family)
    assert Kind.UNTRAINED not in example.found
    assert Kind.END_UNTRAINED not in example.found
    if family.model in ("gpt2", "llama3") and not family.lstrip and not family.rstrip:
        chat = [m.to_template() for m in conversation.messages]
        whole = tokenizer_of(name).apply_chat_template(
            chat, tools=conversation.tools and list(conversation.tools), tokenize=False
        )
        assert tokenizer_of(name).decode(example.ids.tolist()) == whole


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_each_answer_follows_the_ids_that_inference_gives_the_model(name, data):
    conversation = data.draw(conversations(name))
    renderer = renderer_of(name)
    try:
        [example] = renderer([conversation])
    except InputError:
        return
    firsts = [i for i in range(1, len(example.mask)) if example.mask[i] and not example.mask[i - 1]]
    answers = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    assert len(firsts) == len(answers)
    for first, index in zip(firsts, answers, strict=True):
        prompt = replace(conversation, messages=conversation.messages[:index])
        assert renderer.prompt(prompt) == example.ids[:first].tolist()
    assert render_prompt(prompt, tokenizer_of(name), tokenizer_of(name).chat_template) == example.ids[:first].tolist()

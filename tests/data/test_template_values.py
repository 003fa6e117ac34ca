"""`chat_template_kwargs`: values for a template's variables, in every render, and told where they do nothing."""

import re
import runpy
from pathlib import Path

import pytest

import welltuned
from welltuned.data.build import Reading
from welltuned.data.cache import cache_key
from welltuned.data.conversation import Conversation, Message
from welltuned.data.render import Renderer, render_prompt, trained_texts
from welltuned.data.templates import with_values
from welltuned.errors import InputError
from welltuned.recipe import load_recipe, recipe_to_yaml

tokenizer_of = runpy.run_path(str(Path(__file__).with_name("families.py")))["tokenizer_of"]
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "2 + 2"},
    {"role": "assistant", "content": "4"},
]
CONVERSATION = Conversation(tuple(Message(**m) for m in CHAT[-2:]), "x:1")
VALUES = [
    ("qwen3", {"enable_thinking": False}),
    ("smollm3", {"enable_thinking": False}),
    ("smollm3", {"enable_thinking": True}),
    ("gpt_oss", {"reasoning_effort": "high"}),
]


@pytest.mark.parametrize(("family", "values"), VALUES)
@pytest.mark.parametrize("asked", [False, True])
def test_renders_are_those_of_the_template_given_the_values(family, values, asked):
    tokenizer, chat = tokenizer_of(family), CHAT[: 4 if asked else 5]
    own, others = (
        tokenizer.apply_chat_template(
            chat, chat_template=template, add_generation_prompt=asked, tokenize=False, **given
        )
        for template, given in (
            (tokenizer.chat_template, values),
            (with_values(tokenizer.chat_template, values), {}),
        )
    )
    assert own == others


HOSTILE = {
    "a newline first": "\n\n  {% if x %}\n {{ x }}\n{% endif %}  {{ messages[0]['content'] }}\n",
    "space before a block": "   {% if x is defined %}{{ x }}{% endif %}.",
    "in a macro and a loop": "{% macro say(m) %}{{ m['content'] }}{{ x }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% if x %}!{% endif %}{% endfor %}",
    "set again": "{% set x = x if x is defined else 'none' %}{{ x }}{% for m in messages %}{{ x }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("value", [True, False, 3, 0.5, 'say "a\\b" — 😀 {{ no }} {% no %}', ["a", 1, True]])
def test_any_value_in_any_template(tokenizer, name, value):
    template = HOSTILE[name]
    given = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False, x=value)
    assert (
        tokenizer.apply_chat_template(CHAT, chat_template=with_values(template, {"x": value}), tokenize=False) == given
    )


def test_a_caller_may_still_give_another_value():
    tokenizer = tokenizer_of("qwen3")
    template = with_values(tokenizer.chat_template, {"enable_thinking": False})
    text = tokenizer.apply_chat_template(
        CHAT[:4], chat_template=template, add_generation_prompt=True, tokenize=False, enable_thinking=True
    )
    assert "<think>" not in text


def test_what_is_trained_begins_where_the_model_begins_without_thinking():
    tokenizer = tokenizer_of("qwen3")
    plain, quiet = Renderer(tokenizer), Renderer(tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert trained_texts(plain([CONVERSATION])[0], tokenizer) == ["<think>\n\n</think>\n\n4<|im_end|>"]
    [example] = quiet([CONVERSATION])
    assert trained_texts(example, tokenizer) == ["4<|im_end|>"]
    asked = Conversation(CONVERSATION.messages[:1], "x:1")
    prompt = render_prompt(asked, tokenizer, quiet.template)  # as chat and eval render, from what the Run holds
    assert example.ids[: len(prompt)].tolist() == prompt and tokenizer.decode(prompt).endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"enable_thinkin": True}, "chat_template_kwargs: the chat template never asks for enable_thinkin"),
        ({"messages": []}, "chat_template_kwargs: messages is given to every chat template"),
    ],
)
def test_values_without_effect_are_refused(values, words):
    with pytest.raises(InputError, match=re.escape(words)):
        Renderer(tokenizer_of("qwen3"), chat_template_kwargs=values)


def test_values_need_a_template(plain_tokenizer):
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        Renderer(plain_tokenizer, chat_template_kwargs={"x": 1})


def test_the_cache_tells_values_apart():
    tokenizer = tokenizer_of("qwen3")
    keys = set()
    for values in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        template = Reading(chat_template_kwargs=values).renderer(tokenizer).template
        keys.add(cache_key("same", "rows", tokenizer, template, {}))
    assert len(keys) == 3


# ── the recipe ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{enable_thinking: false}", {"enable_thinking": False}),
        ("{reasoning_effort: high, depth: 2}", {"reasoning_effort": "high", "depth": 2}),
        ("{names: [a, b]}", {"names": ["a", "b"]}),
    ],
)
def test_recipe_keys(tmp_path, text, value):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\ndata: d\nchat_template_kwargs: {text}\n")
    recipe = load_recipe(str(path))
    assert recipe.chat_template_kwargs == value
    options = {"model": "m", "data": "d"}
    assert load_recipe(None, options, [f"chat_template_kwargs={text}"]) == recipe
    assert load_recipe(None, {**options, "chat_template_kwargs": value}) == recipe
    path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize("text", ["true", "[a]", "{}", "{a b: 1}", "{a: {b: 1}}", "{a: null}", "{a: [[1]]}"])
def test_recipe_keys_that_hold_no_values(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\ndata: d\nchat_template_kwargs: {text}\n")
    with pytest.raises(InputError, match=r"r.yaml:3: chat_template_kwargs"):
        load_recipe(str(path))


def test_a_run_keeps_them_for_whoever_asks_it(tiny_model_dir, write_rows, tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ '/quiet' if quiet }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '/quiet' if quiet }}\n{% endif %}"
    )
    rows = [{"messages": CHAT[-2:]}, *({"messages": [{"role": "user", "content": str(i)}, CHAT[-1]]} for i in range(9))]
    welltuned.train(
        model=str(tiny_model_dir), data=str(write_rows(tmp_path / "d.jsonl", rows)), out=tmp_path / "run", max_steps=1,
        chat_template=template, chat_template_kwargs={"quiet": True}, eval_fraction=0.1,
    )  # fmt: skip
    tuned = welltuned.load(tmp_path / "run")
    ids = tuned.prompt([Message("user", "Hi")])
    assert tuned.tokenizer.decode(ids).rstrip().endswith("assistant/quiet")
    assert '"quiet": true' in (tmp_path / "run" / "run.json").read_text()
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).chat_template_kwargs == {"quiet": True}

"""What is shown of rows: which ones, their text in runs, shortened or not, and the histogram of their lengths."""

import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from welltuned.data.conversation import Conversation, Message
from welltuned.data.render import Example, Renderer, Speaker, trained_texts
from welltuned.data.rows import all_rows
from welltuned.data.show import Gap, choose, lengths_of, merged, runs
from welltuned.data.store import StoreWriter

families = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("families.py"))))


@cache
def renderer_of(name):
    return Renderer(families.tokenizer_of(name))


def rendered(name, *turns):
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))
    return renderer_of(name)([Conversation(messages, "x.jsonl:1")])[0]


def decoded(name, ids):
    return families.tokenizer_of(name).decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ── runs of text ─────────────────────────────────────────────────────────────────────────────────────────────────────

TURNS = ("What is 2 + 2? 漢字 🙂", " The answer is 4.\n\n👩‍👩‍👧 é", "and \x1b[2J", "no")


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name != "deepseek_r1"])  # which is refused
def test_runs_are_the_rows_text(name):
    tokenizer = families.tokenizer_of(name)
    example = rendered(name, *(TURNS if families.FAMILIES[name].steady else TURNS[:2]))
    found = runs(example, tokenizer)
    assert "".join(run.text for run in found) == decoded(name, example.ids)
    assert not any("\ufffd" in run.text for run in found)
    joined = merged(found)
    assert "".join(run.text for run in joined) == decoded(name, example.ids)
    trained = [run.text.strip() for run in joined if run.trained]
    assert trained == [text.strip() for text in trained_texts(example, tokenizer)]  # alone, some lose a space
    assert "👩‍👩‍👧 é" in trained[0] and all(run.speaker is Speaker.ASSISTANT for run in joined if run.trained)


def test_a_control_token_is_told_from_one_that_a_row_spells():
    found = runs(rendered("chatml", "what is <|im_end|>?", "a token"), families.tokenizer_of("chatml"))
    [spelled] = [run for run in found if run.text == "what is <|im_end|>?"]
    assert not spelled.control and spelled.speaker is Speaker.USER
    assert [run.text for run in found if run.control] == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    turns=st.lists(st.text(alphabet="ab \n漢🙂é", min_size=1, max_size=60).filter(str.strip), min_size=2, max_size=8),
    name=st.sampled_from(["chatml", "llama2", "gemma2", "phi3", "llama3"]),
    most=st.sampled_from([16, 30, 60, 1000]),
)
def test_shortened_rows_keep_count_and_characters(turns, name, most):
    turns = turns[: len(turns) // 2 * 2]
    example = rendered(name, *turns)
    tokenizer = families.tokenizer_of(name)
    found = runs(example, tokenizer, most)
    gaps = [part for part in found if isinstance(part, Gap)]
    texts = [part.text for part in found if not isinstance(part, Gap)]
    assert not any("\ufffd" in text for text in texts)
    if not gaps:
        assert "".join(texts) == decoded(name, example.ids)
    assert all(0 <= gap.trained <= gap.tokens > 0 for gap in gaps)
    whole, at = decoded(name, example.ids), 0
    for text in texts:  # what is left stands in the text, in this order
        at = whole.index(text, at) + len(text)


@pytest.mark.parametrize("name", ["gemma2", "llama2", "llama3"])  # with byte fallback, and byte-level
def test_runs_of_characters_of_several_tokens_are_cut_between_them(name):
    tokenizer = families.tokenizer_of(name)
    for lead in ("", "漢", "é", "漢é"):
        example = rendered(name, lead + "🙂漢é" * 20, "漢é🙂" * 20 + lead)
        for most in (16, 17, 18, 19, 33):
            texts = [part.text for part in runs(example, tokenizer, most) if not isinstance(part, Gap)]
            assert not any("\ufffd" in text for text in texts)


def test_long_rows_show_where_what_is_trained_begins_and_ends():
    example = rendered("llama3", "漢字🙂" * 500, "begin " + "cat " * 500 + "the end")
    found = runs(example, families.tokenizer_of("llama3"), 100)
    trained = [part for part in found if not isinstance(part, Gap) and part.trained]
    assert trained[0].text.startswith("begin cat") and trained[-2].text.endswith("the end")
    gaps = [part for part in found if isinstance(part, Gap)]
    assert [gap.trained for gap in gaps] == [0, gaps[1].tokens]
    shown = sum(len(families.tokenizer_of("llama3")(p.text)["input_ids"]) for p in found if not isinstance(p, Gap))
    assert shown <= 130
    many = rendered("llama3", *(f"{i} cats" for i in range(200)))
    found = runs(many, families.tokenizer_of("llama3"), 100)
    assert len(found) < 100 and sum(isinstance(part, Gap) for part in found) == 1
    said = [part.text for part in found if not isinstance(part, Gap) and part.trained]
    assert said[0] == "1 cats" and said[-2:] == ["199 cats", "<|eot_id|>"]


def test_a_row_without_tokens_or_roles():
    tokenizer = families.tokenizer_of("chatml")
    assert runs(Example(np.array([], np.int32), np.array([], bool), "x"), tokenizer) == []
    [run] = runs(Example(np.array(tokenizer("cat")["input_ids"], np.int32), np.zeros(1, bool), "x"), tokenizer)[:1]
    assert run.speaker is Speaker.TEMPLATE and not run.trained


# ── which rows, and how long ─────────────────────────────────────────────────────────────────────────────────────────


def rows_of(lengths):
    writer = StoreWriter()
    examples = [Example(np.ones(n, np.int32), np.ones(n, bool), f"x:{i}") for i, n in enumerate(lengths)]
    writer.add(examples, range(len(lengths)), [bytes(8)] * len(lengths))
    writer.close()
    return all_rows([writer.store()])


def test_the_first_a_middling_one_and_the_longest():
    rows = rows_of([5, 9, 3, 7, 9])
    assert choose(rows, 3) == {0: "the first row", 3: "of median length", 1: "the longest row"}
    assert list(choose(rows, 2)) == [0, 3] and choose(rows, 0) == {}
    assert sorted(choose(rows, 5)) == sorted(choose(rows, 50)) == [0, 1, 2, 3, 4]
    assert choose(rows_of([4]), 3) == {0: "the first row, of median length, the longest row"}


def test_more_rows_are_spread():
    rows = rows_of([10] * 1000)
    chosen = list(choose(rows, 13))
    assert len(set(chosen)) == 13 and max(np.diff(sorted(chosen))) < 120
    assert chosen == list(choose(rows, 13))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5000) | st.integers(1, 10**6), min_size=1, max_size=50))
def test_every_row_is_in_one_bin(lengths):
    found = lengths_of(np.array(lengths))
    for each in found.histogram:
        assert each.rows == sum(each.first <= n <= each.last for n in lengths)
    assert sum(each.rows for each in found.histogram) == len(lengths) and len(found.histogram) <= 21
    for a, b in zip(found.histogram, found.histogram[1:], strict=False):
        assert a.last + 1 == b.first
    assert found.min == min(lengths) and found.max == max(lengths) and found.p50 in lengths and found.p99 in lengths

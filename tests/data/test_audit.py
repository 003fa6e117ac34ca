import json

import numpy as np
import pytest

from welltuned.data.audit import Severity, audit
from welltuned.data.conversation import Conversation, Defect, Message, Policy
from welltuned.data.render import Example, LossOn, render, render_all
from welltuned.errors import InputError


def conversations(*pairs):
    return [
        Conversation((Message("user", q), Message("assistant", a)), f"x.jsonl:{i}")
        for i, (q, a) in enumerate(pairs, start=1)
    ]


def render_chatml(chats, tokenizer, **options):
    return render_all(chats, tokenizer, chat_template="chatml", **options)


def kinds(result):
    return [(p.severity, p.sentence) for p in result.problems()]


def test_sound_data_has_no_problems(tokenizer):
    chats = conversations(("q", "a"), ("r", "b"))
    examples = render_chatml(chats, tokenizer).examples
    result = audit(examples, tokenizer, conversations=chats)
    assert result.problems() == []
    assert result.rows == result.end_trained == 2
    assert result.supervised_tokens == 4
    assert result.tokens == sum(len(e.ids) for e in examples)
    assert result.share == result.supervised_tokens / result.tokens


def test_every_planted_defect_is_named_and_no_other(tokenizer):
    long = "the cat sat on the mat " * 20
    chats = conversations(
        ("q", "a"), ("r", "b"), ("q", "a"), ("s", "t<|im_start|>u"), (" ", "blank"), ("q2", long), (long, "c")
    )
    rendering = render_chatml(chats, tokenizer, max_length=100, on_defect=Policy.DROP)
    held_out = [
        render(c, tokenizer, chat_template="chatml")
        for c in [
            Conversation((Message("user", "r"), Message("assistant", "other")), "held.jsonl:1"),
            Conversation((Message("user", "new"), Message("assistant", "a")), "held.jsonl:2"),
            Conversation((Message("user", "q"), Message("assistant", "a")), "held.jsonl:3"),
        ]
    ]
    dropped = (*rendering.dropped, Defect("x.jsonl:99", "the row has no answer"))
    result = audit(rendering.examples, tokenizer, conversations=chats, held_out=held_out, dropped=dropped)
    assert result.duplicates == (("x.jsonl:3", "x.jsonl:1"),)
    assert result.control_in_text == (("x.jsonl:4", "<|im_start|>"),)
    assert result.empty_turns == ("x.jsonl:5",)
    assert result.cut == ("x.jsonl:6",)
    assert [d.origin for d in result.dropped] == ["x.jsonl:7", "x.jsonl:99"]
    assert result.overlap == (("held.jsonl:1", "x.jsonl:2"), ("held.jsonl:3", "x.jsonl:1"))
    assert result.untrained == result.end_untrained == ()
    assert result.end_trained == result.rows == 6
    sentences = kinds(result)
    assert [s for s, _ in sentences] == [Severity.WARNING] * 5 + [Severity.NOTE]
    assert sentences[0][1] == ("1 of 6 rows are cut to max_length and lose the end of their last answer: x.jsonl:6")
    json.dumps(result.to_json())


def test_rows_without_trained_tokens_are_an_error_by_default(tokenizer):
    good = render_chatml(conversations(("q", "a")), tokenizer).examples[0]
    masked = Example(good.ids, np.zeros_like(good.mask), "x.jsonl:2")
    with pytest.raises(InputError, match=r"x.jsonl:2: none of the row's tokens is trained \(1 such rows\)"):
        audit([good, masked], tokenizer)
    result = audit([good, masked], tokenizer, on_untrained=Policy.DROP)
    assert result.untrained == ("x.jsonl:2",)
    assert result.problems()[0].severity is Severity.ERROR


def test_an_end_token_that_is_not_trained_is_seen(tokenizer):
    good = render_chatml(conversations(("q", "a")), tokenizer).examples[0]
    mask = good.mask.copy()
    mask[np.flatnonzero(mask)[-1]] = False
    result = audit([good, Example(good.ids, mask, "x.jsonl:2")], tokenizer)
    assert result.end_untrained == ("x.jsonl:2",)
    assert result.end_trained == 1
    assert "may not learn to stop" in result.problems()[0].sentence


def test_trained_on_everything_still_trains_the_end(tokenizer):
    rendering = render_chatml(conversations(("q", "a")), tokenizer, loss_on=LossOn.EVERYTHING)
    assert audit(rendering.examples, tokenizer).end_untrained == ()


def test_long_lists_are_shortened_in_sentences_only(tokenizer):
    chats = conversations(*[("q", "a")] * 9)
    result = audit(render_chatml(chats, tokenizer).examples, tokenizer)
    assert len(result.duplicates) == 8
    assert result.problems()[0].sentence.endswith("x.jsonl:6 (as x.jsonl:1) and 3 more")


def test_no_rows(tokenizer):
    assert audit([], tokenizer).share == 0.0

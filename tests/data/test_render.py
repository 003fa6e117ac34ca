"""Golden ids and masks with SmolLM2's real tokenizer; plain text; chat_template values; lengths; slow tokenizers."""

import time
from pathlib import Path

import numpy as np
import pytest

from welltuned.data.conversation import Conversation, Format, Message, Policy
from welltuned.data.formats import to_conversations
from welltuned.data.render import LossOn, MaskFrom, Overlong, render, render_all, trained_runs, trained_texts
from welltuned.data.source import Row, read_rows
from welltuned.data.templates import CHATML, resolve_chat_template
from welltuned.errors import InputError

ROOT = Path(__file__).parents[2]
SHARED = next((p for p in (ROOT / "shared", ROOT.parent / "shared") if p.is_dir()), ROOT / "shared")
GSM8K = SHARED / "data" / "gsm8k_train.jsonl"


def pair(prompt, answer, format=Format.QUESTION_ANSWER, origin="x.jsonl:1"):
    return Conversation((Message("user", prompt), Message("assistant", answer)), origin, format)


TWO = Conversation(
    (*pair("What is 2 + 2?", "4").messages, Message("user", "And 3?"), Message("assistant", "5\n#### 5")), "x.jsonl:2"
)


GOLDEN_IDS = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198),
    *(1, 4093, 198, 1780, 314, 216, 34, 1232, 216, 34, 47, 2, 198),
    *(1, 520, 9531, 198, 1589, 314, 216, 36, 30, 2, 198),
]


def test_golden_chatml_of_smollm2(smollm2_tokenizer):
    example = render(pair("What is 2 + 2?", "It is 4."), smollm2_tokenizer)
    assert example.ids.dtype == np.int32
    assert example.mask.dtype == np.bool_
    assert example.ids.tolist() == GOLDEN_IDS
    assert trained_runs(example.mask) == [(len(GOLDEN_IDS) - 7, len(GOLDEN_IDS) - 1)]
    assert smollm2_tokenizer.decode(example.ids.tolist()) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    )
    assert trained_texts(example, smollm2_tokenizer) == ["It is 4.<|im_end|>"]


def test_every_answer_of_smollm2_or_the_last_or_everything(smollm2_tokenizer):
    assert trained_texts(render(TWO, smollm2_tokenizer), smollm2_tokenizer) == ["4<|im_end|>", "5\n#### 5<|im_end|>"]
    last = render(TWO, smollm2_tokenizer, loss_on=LossOn.LAST)
    assert trained_texts(last, smollm2_tokenizer) == ["5\n#### 5<|im_end|>"]
    everything = render(TWO, smollm2_tokenizer, loss_on=LossOn.EVERYTHING)
    assert everything.mask.tolist() == [False] + [True] * (len(everything.ids) - 1)


def test_messages_of_an_explicit_prompt_are_not_trained(smollm2_tokenizer):
    conversation = Conversation(TWO.messages, "x:1", Format.PROMPT_COMPLETION_MESSAGES, trained_from=2)
    assert trained_texts(render(conversation, smollm2_tokenizer), smollm2_tokenizer) == ["5\n#### 5<|im_end|>"]
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    assert trained_texts(render(conversation, smollm2_tokenizer, **parts), smollm2_tokenizer) == ["5\n#### 5<|im_end|>"]


def test_rows_keep_their_order_and_origins_over_chunks(tokenizer):
    conversations = [pair("q", f"answer {i}", origin=f"x.jsonl:{i}") for i in range(1100)]
    rendering = render_all(conversations, tokenizer, chat_template="chatml")
    assert [e.origin for e in rendering.examples] == [c.origin for c in conversations]
    assert trained_texts(rendering.examples[1099], tokenizer) == ["answer 1099<|im_end|>"]
    assert rendering.dropped == rendering.cut == ()


def test_no_rows(tokenizer):
    assert render_all([], tokenizer, chat_template="chatml").examples == []


# Plain text, for tokenizers without a chat template


@pytest.mark.parametrize(
    ("prompt", "completion"), [("The cat", " sat"), ("The answer is ", "4"), ("a\n", "\n\nb"), ("", "cat"), ("é", "é")]
)
def test_plain_text_has_one_start_and_one_end_token(prompt, completion, plain_tokenizer):
    rendering = render_all([pair(prompt, completion, Format.PROMPT_COMPLETION)], plain_tokenizer)
    example = rendering.examples[0]
    assert rendering.mask_from is MaskFrom.PLAIN
    assert plain_tokenizer.decode(example.ids.tolist()) == f"<s>{prompt}{completion}</s>"
    assert trained_texts(example, plain_tokenizer) == [completion + "</s>"]
    assert example.ids[: int(example.mask.argmax())].tolist() == plain_tokenizer(prompt)["input_ids"]


def test_plain_text_that_has_its_special_tokens_keeps_them_single(plain_tokenizer):
    example = render(pair("<s>cat", "dog</s>", Format.PROMPT_COMPLETION), plain_tokenizer)
    assert plain_tokenizer.decode(example.ids.tolist()) == "<s>catdog</s>"
    assert trained_texts(example, plain_tokenizer) == ["dog</s>"]


def test_plain_text_trained_whole(plain_tokenizer):
    example = render(pair("cat", "dog", Format.PROMPT_COMPLETION), plain_tokenizer, loss_on=LossOn.EVERYTHING)
    assert trained_texts(example, plain_tokenizer) == ["catdog</s>"]


def test_text_pairs_are_messages_where_there_is_a_template(smollm2_tokenizer):
    text = render(pair("q", "a", Format.PROMPT_COMPLETION), smollm2_tokenizer)
    assert text.ids.tolist() == render(pair("q", "a", Format.MESSAGES), smollm2_tokenizer).ids.tolist()


@pytest.mark.parametrize("format", [Format.MESSAGES, Format.QUESTION_ANSWER, Format.ALPACA])
def test_chats_need_a_template(format, plain_tokenizer):
    with pytest.raises(InputError, match="x.jsonl:1: the tokenizer has no chat template.*`chat_template: chatml`"):
        render(pair("q", "a", format), plain_tokenizer)


def test_parts_need_a_template_and_plain_text_an_end_token(plain_tokenizer, make_tokenizer):
    with pytest.raises(InputError, match="need a chat template"):
        render(pair("q", "a", Format.PROMPT_COMPLETION), plain_tokenizer, instruction_part="a", response_part="b")
    with pytest.raises(InputError, match="no end token"):
        render(pair("q", "a", Format.PROMPT_COMPLETION), make_tokenizer(["<s>"]))


# chat_template values


def test_chatml_by_name_inline_and_from_a_file(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    ids = [render(TWO, tokenizer, chat_template=t).ids.tolist() for t in ("chatml", CHATML, str(path))]
    assert ids[0] == ids[1] == ids[2]
    with pytest.raises(InputError, match="chat_template: .*missing.jinja is not a readable template"):
        render(TWO, tokenizer, chat_template=str(tmp_path / "missing.jinja"))


def test_chatml_ends_turns_with_the_models_end_token_where_it_has_no_im_end(plain_tokenizer):
    example = render(TWO, plain_tokenizer, chat_template="chatml")
    assert trained_texts(example, plain_tokenizer) == ["4</s>", "5\n#### 5</s>"]


def test_the_tokenizers_own_template_is_the_default(smollm2_tokenizer, plain_tokenizer):
    assert resolve_chat_template(smollm2_tokenizer) == smollm2_tokenizer.chat_template
    assert resolve_chat_template(plain_tokenizer) is None


# Lengths


def test_cut_rows_are_named_and_rows_cut_before_their_answer_are_defects(smollm2_tokenizer):
    long = pair("q", "word " * 50, origin="x.jsonl:2")
    rendering = render_all([pair("q", "a"), long], smollm2_tokenizer, max_length=60)
    assert rendering.cut == ("x.jsonl:2",)
    assert [len(e.ids) for e in rendering.examples][1] == 60
    assert rendering.examples[1].cut
    prompt_long = pair("word " * 100, "a", origin="x.jsonl:3")
    with pytest.raises(InputError, match="x.jsonl:3: none of the row's tokens is trained: cut to max_length 60"):
        render_all([long, prompt_long], smollm2_tokenizer, max_length=60)
    rendering = render_all([long, prompt_long], smollm2_tokenizer, max_length=60, on_defect=Policy.DROP)
    assert [d.origin for d in rendering.dropped] == ["x.jsonl:3"]
    assert [e.origin for e in rendering.examples] == ["x.jsonl:2"]


def test_overlong_rows_dropped_or_refused(smollm2_tokenizer):
    rows = [pair("q", "a"), pair("q", "word " * 50, origin="x.jsonl:2")]
    rendering = render_all(rows, smollm2_tokenizer, max_length=60, overlong=Overlong.DROP)
    assert [d.origin for d in rendering.dropped] == ["x.jsonl:2"]
    assert "more than max_length 60" in rendering.dropped[0].what
    with pytest.raises(InputError, match="x.jsonl:2: the row has .* tokens, more than max_length 60"):
        render_all(rows, smollm2_tokenizer, max_length=60, overlong=Overlong.ERROR)
    with pytest.raises(InputError, match="max_length is 1"):
        render_all(rows, smollm2_tokenizer, max_length=1)


def test_a_template_that_leaves_the_answer_out_is_a_defect(tokenizer):
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="x.jsonl:1: none of the row's tokens is trained"):
        render(pair("q", "a"), tokenizer, chat_template=template)


# Tokenizers without offsets


def test_slow_tokenizers_give_the_same_mask_from_pieces():
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    example = render(TWO, slow, chat_template=template)
    assert trained_texts(example, slow) == ["4</s>", "5\n#### 5</s>"]
    assert (
        example.ids.tolist()
        == slow(
            slow.apply_chat_template([m.to_template() for m in TWO.messages], chat_template=template, tokenize=False),
            add_special_tokens=False,
        )["input_ids"]
    )


# Real data


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not in shared/data of this checkout")
def test_gsm8k_trains_its_answers_in_seconds(smollm2_tokenizer):
    conversations = to_conversations(read_rows(str(GSM8K))).items
    start = time.perf_counter()
    rendering = render_all(conversations[:2000], smollm2_tokenizer)
    seconds = time.perf_counter() - start
    for conversation, example in zip(conversations[:2000:7], rendering.examples[::7], strict=True):
        assert trained_texts(example, smollm2_tokenizer) == [conversation.messages[1].content + "<|im_end|>"]
    assert seconds < 8  # 1.3 s on two idle cores; the margin is for busy ones


def test_render_takes_rows_read_from_a_file(smollm2_tokenizer):
    rows = [Row({"question": "q", "answer": "a"}, "x.jsonl:1")]
    example = render(to_conversations(rows).items[0], smollm2_tokenizer)
    assert trained_texts(example, smollm2_tokenizer) == ["a<|im_end|>"]

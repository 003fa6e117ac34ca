"""Every data format and every family's chat template, from the file to a finished and verified run on a small model."""

import json
import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

import welltuned
from welltuned.data.conversation import Format

families = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "data" / "families.py")))
FAMILIES = families.FAMILIES
PAIRS = [(f"{n} times the {colour} cat", f"the {colour} cat " * n) for colour in "abcdefghij" for n in (1, 2, 3, 4)]
UPDATES = 6
SYSTEM_AT_THE_END = (
    "mistral_v3",
    "mistral_tekken",
)  # they show a system message only while a user speaks last: refused
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"key": "cat"}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def takes_system(family):
    return family.system and family not in [FAMILIES[name] for name in SYSTEM_AT_THE_END]


def chat(question, answer, family):
    """With a system message, an earlier turn and a tool call where the family's template takes them."""
    system = [{"role": "system", "content": "The cat is here."}] if takes_system(family) else []
    before = [user(f"Say 4, then {question}."), assistant("The answer is 4.")] if family.steady else []
    if not (family.tools and family.steady):
        return {"messages": [*system, *before, user(question), assistant(answer)]}
    called = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "a cat"}]
    return {"messages": [*system, *before, user(question), *called, assistant(answer)], "tools": TOOLS}


def sharegpt(question, answer, family):
    turns = [("human", f"Say 4, then {question}."), ("gpt", "The answer is 4.")] if family.steady else []
    turns = [{"from": name, "value": text} for name, text in (*turns, ("human", question), ("gpt", answer))]
    return {"conversations": turns, **({"system": "The cat is here."} if takes_system(family) else {})}


def alpaca(question, answer, family):
    row = {"instruction": "Say it.", "input": question, "output": answer}
    return {**row, "history": [[f"Say 4, then {question}.", "4"]]} if family.steady else row


ROWS = {
    Format.MESSAGES: chat,
    Format.SHAREGPT: sharegpt,
    Format.PROMPT_COMPLETION: lambda q, a, _: {"prompt": q, "completion": a},
    Format.PROMPT_COMPLETION_MESSAGES: lambda q, a, _: {"prompt": [user(q)], "completion": [assistant(a)]},
    Format.QUESTION_ANSWER: lambda q, a, _: {"question": q, "answer": a},
    Format.ALPACA: alpaca,
    Format.TEXT: lambda q, a, _: {"text": f"{q}: {a}"},
    Format.PREFERENCE: lambda q, a, _: {"prompt": q, "chosen": a, "rejected": "no"},
    Format.KTO: lambda q, a, _: {"prompt": q, "completion": a, "label": "cat" in q and "a cat" not in q},
    Format.PROMPT_ANSWER: lambda q, a, _: {"prompt": [user(q)], "answer": a},
}


def template_of(name):
    """DeepSeek R1's opens every answer with <think> and takes thinking out of what was answered, so no rendered answer
    is what the model would say, and the rows are refused; with this change, which the error asks for, they train."""
    own = families.tokenizer_of(name).chat_template
    return own.replace("'<｜Assistant｜><think>\\n'", "'<｜Assistant｜>'") if name == "deepseek_r1" else None


@pytest.fixture(scope="module")
def model_of(make_model_dir):
    @cache
    def make(name):
        tokenizer = families.tokenizer_of(name)
        size = max(tokenizer.get_vocab().values()) + 1
        return str(make_model_dir(tokenizer=tokenizer, vocab_size=size, max_position_embeddings=1024))

    return make


@pytest.fixture
def trained(model_of, write_rows, tmp_path, one_thread):
    """A function that trains on rows of a format with a family's tokenizer and template, and checks how that ended."""

    def train(format, name):
        path = write_rows(tmp_path / "rows.jsonl", [ROWS[format](*pair, FAMILIES[name]) for pair in PAIRS])
        options = dict(learning_rate=2e-2, effective_batch_size=8, r=4, max_steps=UPDATES, eval_fraction=0.2)
        result = welltuned.train(
            model=model_of(name), data=path, out=tmp_path / "out", chat_template=template_of(name), **options
        )
        assert result.updates == UPDATES and result.after.loss < result.before.loss
        assert result.checks and all(check.change > 0 for check in result.checks)
        assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size > 0
        summary = json.loads((tmp_path / "out" / "run.json").read_text())
        audit = summary["audit"]
        assert audit["rows"] + audit["held_out_rows"] == (36 if format is Format.KTO else len(PAIRS))
        assert audit["end_trained"] == audit["rows"] and audit["problems"] == [] and audit["cut"] is None
        speakers = audit["speakers"]
        by = speakers["document" if format is Format.TEXT else "assistant"]
        assert 0 < by["trained"] == audit["supervised_tokens"] < audit["tokens"]
        assert (format is Format.TEXT) != (speakers["user"]["tokens"] > 0)
        assert any(note.startswith("format: ") for note in summary["notes"])
        return summary

    return train


@pytest.mark.parametrize("format", Format)
def test_every_format_trains(trained, format):
    summary = trained(format, "qwen2_5")
    assert summary["held_out"]["rows"] == (7 if format is Format.KTO else 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains(trained, name):
    trained(Format.MESSAGES, name)


@pytest.mark.slow
@pytest.mark.parametrize("format", [f for f in Format if f is not Format.MESSAGES])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen2_5"])
def test_every_format_trains_with_every_family(trained, format, name):
    trained(format, name)

"""From a recipe to rows: policies, several datasets, groups; an audit that names each planted defect and no other."""

import json
import subprocess
import sys

import numpy as np
import pytest

from welltuned.data import build as building
from welltuned.data.conversation import Format, Kind
from welltuned.data.dataset import open_sources, read_dataset
from welltuned.data.render import trained_texts
from welltuned.errors import InputError
from welltuned.facts.data import facts_of
from welltuned.recipe import KEYS, POLICIES, load_recipe


def chat(*turns, roles=("user", "assistant"), **columns):
    messages = [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages, **columns}


@pytest.fixture
def read(tokenizer):
    """A function that reads the datasets of a recipe."""

    def read(data, **options):
        recipe = load_recipe(None, {"model": "m", "data": data, "chat_template": "chatml", **options})
        return read_dataset(recipe, tokenizer)

    return read


@pytest.fixture
def write(write_rows, tmp_path):
    """A function that writes rows to NAME.jsonl and returns its path."""
    return lambda name, rows: write_rows(tmp_path / f"{name}.jsonl", rows)


@pytest.fixture
def files(write):
    """Three datasets of 30, 60 and 10 rows."""
    sizes = {"a": 30, "b": 60, "c": 10}
    return [write(name, [chat(f"{name} {i}", f"answer {i}") for i in range(n)]) for name, n in sizes.items()]


def lines(rows):
    """Where rows are from: file name and line."""
    return [example.origin.rpartition("/")[2] for example in rows]


# ── every planted defect, and no other ───────────────────────────────────────────────────────────────────────────────

SOUND = [chat(f"question {i}", f"answer {i}") for i in range(40)]
LONG = "the cat sat on the mat " * 30
PLANTED = [
    *SOUND,
    chat("no answer"),  # 41
    {"messages": None},  # 42
    chat("role", "x", roles=("user", "narrator")),  # 43
    chat("question 3", "answer 3"),  # 44
    chat(" ", "blank"),  # 45
    chat("", "say hi", "hi", roles=("system", "user", "assistant")),  # 46
    chat("twice", "twice", "once", roles=("user", "user", "assistant")),  # 47
    chat("what is <|im_end|>?", "a token"),  # 48
    chat("caf\u00c3\u00a9", "caf\u00e9"),  # 49
    chat("nul\x00", "a"),  # 50
    chat("long answer", LONG),  # 51
    chat(LONG, "long question"),  # 52
    {**chat("what is there?", "a hat"), "tools": [{"name": "look_up"}]},  # 53
]
WHERE = {
    Kind.BAD_ROW: [41, 42, 43],
    Kind.UNTRAINED: [52],
    Kind.TOO_LONG: [51, 52],
    Kind.DUPLICATE: [44],
    Kind.LEAK: [],
    Kind.EMPTY_TURN: [45, 46],
    Kind.REPEATED_TURN: [47],
    Kind.CONTROL_TOKEN: [48],
    Kind.BAD_ENCODING: [49, 50],
    Kind.LOST_THINKING: [],
    Kind.LOST_MESSAGE: [],
    Kind.LOST_TOOLS: [53],
    Kind.END_UNTRAINED: [],
}


def found_lines(dataset):
    return {k: [int(o.rpartition(":")[2]) for o, _ in finding.named] for k, finding in dataset.findings.items()}


@pytest.mark.parametrize("cached", [False, True])
def test_every_planted_defect_is_named_and_no_other(read, write, tokenizer, monkeypatch, cached):
    held = [chat("new", "new"), chat("question 7", "other"), chat("question 9", "answer 9")]
    options = dict(eval_data=write("held", held), on_bad_row="drop", on_untrained="drop")
    path = write("broken", PLANTED)
    if cached:
        monkeypatch.setattr(building, "SMALLEST_CACHED", 1)
        read(path, **options)
    dataset = read(path, **options).within(100)
    assert found_lines(dataset) == {**WHERE, Kind.LEAK: [2, 3], **dict.fromkeys(OF_PAIRS, [])}
    assert [other.rpartition(":")[2] for _, other in dataset.findings[Kind.LEAK].named] == ["8", "10"]
    report = dataset.audit()
    assert report.rows == len(PLANTED) - 4 and report.held_out_rows == 3 and report.cut.rows == 1
    kinds = {kind for kind, found in found_lines(dataset).items() if found}
    assert len(report.problems()) == len(kinds)
    json.dumps(report.to_json(), allow_nan=False)


OF_PAIRS = (Kind.EQUAL_PAIR, Kind.PROMPT_DIFFERS)
ELSEWHERE = (Kind.LEAK, Kind.LOST_MESSAGE, Kind.LOST_THINKING, Kind.END_UNTRAINED, *OF_PAIRS)


@pytest.mark.parametrize("kind", [k for k in Kind if k not in ELSEWHERE])
def test_each_kind_can_be_left_out_or_refused(read, write, kind):
    path = write("broken", PLANTED)
    others = {f"on_{k}": "drop" for k in (Kind.BAD_ROW, Kind.UNTRAINED)}
    everything = read(path, **others).within(100)
    dropping = {f"on_{k}": "drop" for k in Kind if (kind, k) != (Kind.UNTRAINED, Kind.TOO_LONG)}
    without = read(path, **{**dropping, "eval_fraction": 0.1}).within(100)
    gone = {f"broken.jsonl:{line}" for line in WHERE[kind]}
    assert gone and not gone & {*lines(without.train), *lines(without.held_out)}
    assert without.findings[kind].dropped == len(gone) == everything.findings[kind].rows
    with pytest.raises(InputError) as caught:
        read(path, **{**dropping, f"on_{kind}": "error"}).within(100)
    assert caught.value.where.endswith(f"broken.jsonl:{WHERE[kind][0]}")


def test_lost_thinking_and_an_end_that_is_not_trained(read, write):
    thinking = chat("why", "because")
    thinking["messages"][1]["reasoning_content"] = "let me see"
    dataset = read(write("x", [*SOUND, thinking]))
    assert found_lines(dataset)[Kind.LOST_THINKING] == [41]
    open_ended = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'user' %}{{ m['content'] }}<|im_end|>\n"
        "{% else %}{% generation %}{{ m['content'] }}{% endgeneration %}{% if m['content'] != 'answer 3' %}<|im_end|>"
        "{% endif %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    try:
        dataset = read(write("y", SOUND), chat_template=open_ended)
    except InputError as error:
        assert "end" in str(error) or "generation" in str(error)  # refused is as good
    else:
        assert found_lines(dataset)[Kind.END_UNTRAINED]


def test_a_template_that_refuses_a_row_makes_it_a_bad_row(read, write):
    template = (
        "{% for m in messages %}{% if m['content'] == 'answer 7' %}{{ raise_exception('not seven') }}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = write("x", SOUND)
    with pytest.raises(InputError, match="x.jsonl:8: .*not seven"):
        read(path, chat_template=template)
    dataset = read(path, chat_template=template, on_bad_row="drop")
    assert found_lines(dataset)[Kind.BAD_ROW] == [8] and len(dataset.train) + len(dataset.held_out) == 39
    assert "not seven" in dataset.findings[Kind.BAD_ROW].named[0][1]
    for row, conversation in zip(dataset.held_out, dataset.held_out_conversations(), strict=True):
        assert row.origin == conversation.origin  # numbered by the source's rows, those left out counted
    with pytest.raises(InputError, match="never"):
        read(path, chat_template="{{ raise_exception('never') }}", on_bad_row="drop")


def test_all_rows_bad(read, write):
    with pytest.raises(InputError, match=r"x.jsonl:1: all 3 rows have defects \(the row has no answer"):
        read(write("x", [chat("a"), chat("b"), chat("c")]), on_bad_row="drop")


def test_mixed_schemas_are_an_error_under_any_policy(read, write):
    rows = [*SOUND, {"prompt": "p", "completion": "c"}]
    with pytest.raises(InputError, match="x.jsonl:41: mixed schemas"):
        read(write("x", rows), on_bad_row="drop")


def test_nothing_left(read, write):
    with pytest.raises(InputError, match="no training row is left"):
        read(write("x", [chat(" ", f"{i}") for i in range(9)]), on_empty_turn="drop")
    with pytest.raises(InputError, match="no training row is within max_length 2"):
        read(write("y", SOUND), on_too_long="drop").within(2)
    with pytest.raises(InputError, match="held.jsonl: no held-out row is left"):
        read(write("z", SOUND), eval_data=write("held", [chat(" ", "x")]), on_empty_turn="drop")


def test_policies_hold_for_held_out_rows_too(read, write):
    path = write("x", SOUND)
    with pytest.raises(InputError, match="held.jsonl:2: the row has no answer"):
        read(path, eval_data=write("held", [chat("q", "a"), chat("r")]))
    dataset = read(path, eval_data=write("held", [chat("q", "a"), chat("r"), chat(" ", "x")]), on_bad_row="drop")
    assert len(dataset.held_out) == 2 and dataset.findings[Kind.EMPTY_TURN].of == 42
    short = read(path, eval_data=write("more", [chat("q", "a"), chat("r", LONG)]))
    cut = short.held_out_within(50)
    assert [len(e.ids) for e in cut.held_out][1] == 50 and "1 held-out rows are longer than 50 tokens" in cut.notes[-1]
    dropped = read(path, eval_data=write("most", [chat("q", "a"), chat("r", LONG)]), on_too_long="drop")
    assert len(dropped.held_out_within(50).held_out) == 1 and "were left out" in dropped.held_out_within(50).notes[-1]
    assert short.held_out_within(None) is short
    lost = read(path, eval_data=write("lost", [chat("q", "a"), chat(LONG, "r")]), on_untrained="drop")
    assert "1 of them lost their whole answers and were left out." in lost.held_out_within(50).notes[-1]
    assert found_lines(lost.held_out_within(50))[Kind.UNTRAINED] == [2]


# ── several datasets ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_several_datasets_each_held_out_of(read, files):
    dataset = read(files)
    assert dataset.train.sizes() == [27, 54, 9] and dataset.held_out.sizes() == [3, 6, 1]
    assert dataset.mixture.epoch_rows == 90 and not {*lines(dataset.train)} & {*lines(dataset.held_out)}
    facts = facts_of(dataset)
    assert [(part.rows, part.rows_of_epoch) for part in facts.mixture] == [(27, 27), (54, 54), (9, 9)]
    assert sum(part.share for part in facts.mixture) == pytest.approx(1, abs=1e-3) and facts.rows == 90
    assert facts.tokens == sum(part.tokens_of_epoch for part in facts.mixture)
    assert any("An epoch takes 27 of 27 rows of" in note for note in dataset.notes)


def test_weights_and_counts(read, files):
    dataset = read(files, data_weights=[1, 1, 1])
    assert dataset.mixture.quotas == (9, 9, 9) and facts_of(dataset).rows == 27
    dataset = read(files, data_rows=[10, 54, 18])
    facts = facts_of(dataset)
    assert dataset.mixture.quotas == (10, 54, 18) and facts.rows == 82
    assert any("18 of 9 rows of" in note and "c.jsonl (repeated)" in note for note in dataset.notes)
    counts = {name: 0 for name in "abc"}
    for step in range(dataset.mixture.steps_per_epoch(8)):
        for row in dataset.mixture.update(8, step):
            counts[lines([dataset.train[row]])[0][0]] += 1
    assert counts == {"a": 10, "b": 54, "c": 18}
    lengths = dataset.train.column("length")
    exact = sum(lengths[dataset.train.owner() == i].mean() * n for i, n in enumerate((10, 54, 18)))
    assert facts.tokens == pytest.approx(exact, abs=1)
    assert facts.length_min == lengths.min() and facts.length_max == lengths.max()


def test_one_dataset_of_which_an_epoch_takes_a_part(read, files):
    dataset = read(files[1], data_rows=20)
    assert dataset.mixture.quotas == (20,) and facts_of(dataset).rows == 20
    seen = [r for step in range(3) for r in dataset.mixture.update(20, step)]
    assert len({*seen}) == 54 and len(seen) == 60


def test_several_held_out_datasets_and_several_formats(read, files, write):
    other = write("other", [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)])
    dataset = read([files[0], other], eval_data=files[1:])
    assert len(dataset.train) == 35 and len(dataset.held_out) == 70
    assert dataset.formats == f"{Format.MESSAGES}, {Format.PROMPT_COMPLETION}"
    assert sum("format: " in note for note in dataset.notes) == 4
    held = dataset.held_out_conversations()
    assert [c.origin for c in held] == [e.origin for e in dataset.held_out] and len(held[:3]) == 3


def test_a_prompt_that_two_datasets_share_is_on_one_side(read, write):
    first, second = write("a", SOUND), write("b", [chat(f"question {i}", f"other {i}") for i in range(40)])
    dataset = read([first, second], eval_fraction=0.3)
    train, held = ({line.split(":")[1] for line in lines(rows)} for rows in (dataset.train, dataset.held_out))
    assert held and not train & held and dataset.findings[Kind.LEAK].rows == 0


# ── the recipe's other keys ──────────────────────────────────────────────────────────────────────────────────────────


def test_groups_stay_on_one_side(read, write):
    rows = [chat(f"question {i}", f"answer {i}", customer=f"c{i // 4}") for i in range(80)]
    dataset = read(write("x", rows), group_by="customer")
    train, held = ({(int(line.split(":")[1]) - 1) // 4 for line in lines(r)} for r in (dataset.train, dataset.held_out))
    assert len(dataset.held_out) == 8 and len(held) == 2 and not train & held
    assert any("rows that share the same `customer` stay on one side" in note for note in dataset.notes)
    with pytest.raises(InputError, match="y.jsonl:1"):
        read(write("y", SOUND), group_by="customer")


def test_map_format_and_loss(read, write, tokenizer):
    path = write("x", [{"Frage": f"f{i}", "Antwort": f"a{i}", "note": "n"} for i in range(12)])
    dataset = read(path, map=["prompt=Frage", "completion=Antwort"])
    assert dataset.reading.mapping == {"prompt": "Frage", "completion": "Antwort"}
    assert trained_texts(dataset.train[0], tokenizer)[0].startswith("a")
    turns = write("y", [chat("q", "one", "r", "two") for _ in range(9)])
    said = {
        loss_on: trained_texts(read(turns, loss_on=loss_on).train[0], tokenizer) for loss_on in ("assistant", "last")
    }
    assert len(said["assistant"]) == 2 and len(said["last"]) == 1
    whole = read(turns, loss_on="everything").train[0]
    assert whole.mask[1:].all() and read(turns, assistant_only_loss=False).train[0].mask[1:].all()
    with pytest.raises(InputError, match="format: unknown format 'shargpt'; did you mean sharegpt"):
        read(turns, format="shargpt")
    assert read(turns, format="messages").formats == "messages"


def test_answers_labelled_undesirable_are_left_out_and_said(read, write):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(40)]
    dataset = read(write("x", rows))
    assert len(dataset.train) + len(dataset.held_out) == 20 and not any(f.rows for f in dataset.findings.values())
    assert any("20 rows are left out, since their answers are labelled as undesirable" in n for n in dataset.notes)


def test_every_kind_has_its_key():
    assert set(POLICIES) == {f"on_{kind}" for kind in Kind} and set(POLICIES) < set(KEYS)


def test_sources_are_found_before_anything_slow(write):
    with pytest.raises(InputError, match="there is no such file"):
        open_sources(load_recipe(None, {"model": "m", "data": [write("x", SOUND), "nope.jsonl"]}))


def test_a_token_that_the_model_does_not_know(write, tokenizer):
    recipe = load_recipe(None, {"model": "m", "data": write("x", SOUND), "chat_template": "chatml"})
    largest = max(int(e.ids.max()) for e in read_dataset(recipe, tokenizer).train)
    with pytest.raises(InputError, match=rf"x.jsonl:\d+: the row has token {largest}, and the model's embedding ends"):
        read_dataset(recipe, tokenizer, embedding=largest)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

MEASURE = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from welltuned.data.dataset import read_dataset
from welltuned.facts.data import facts_of
from welltuned.recipe import load_recipe

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
recipe = load_recipe(None, {"model": "m", "data": sys.argv[2]})
small = read_dataset(load_recipe(None, {"model": "m", "data": sys.argv[3]}), tokenizer)  # brings what is loaded late
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
dataset = read_dataset(recipe, tokenizer)
dataset = dataset.within(facts_of(dataset).length_max)
rows = dataset.audit().rows
for step in range(50):
    [dataset.train[i] for i in dataset.mixture.update(16, step)]
print(json.dumps({"rows": rows, "bytes": status("VmHWM") - before}))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tiny_model_dir, rows, write, tmp_path):
    """200,000 short rows, 70 MB as text and more as tokens: what grows with them are a few numbers a row."""
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for number in range(200_000):
            file.write(json.dumps(chat(f"{number} times the red hat, please", "hat:red " * 8)) + "\n")
    small = write("small", rows)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny_model_dir), str(path), small], capture_output=True, text=True
    )
    found = json.loads(done.stdout or pytest.fail(done.stderr))
    assert found["rows"] == 200_000 - 512
    assert found["bytes"] < 150e6, found


def test_columns_are_exact_against_the_rows(read, write):
    """The numbers that the plan is made from are those of the examples that are trained on."""
    dataset = read(write("x", SOUND))
    facts, train = facts_of(dataset), list(dataset.train)
    assert facts.tokens == sum(len(e.ids) for e in train)
    assert facts.supervised_tokens == sum(int(e.mask[1:].sum()) for e in train) == dataset.audit().supervised_tokens
    assert facts.length_max == max(len(e.ids) for e in train) and facts.heldout_rows == len(dataset.held_out)
    assert np.array_equal(dataset.train.column("length"), [len(e.ids) for e in train])

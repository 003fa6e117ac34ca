"""`welltuned data`: what it shows to a person and to a program, how it ends, and that no row moves the cursor."""

import json
import re

import pytest
from rich.console import Console

import welltuned as package
from welltuned.cli import data as command
from welltuned.cli.safe import json_text, visible


def chat(question, answer, **columns):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


SOUND = [chat(f"question {i} of 30", f"answer {i}") for i in range(30)]


@pytest.fixture
def write(write_rows, tmp_path):
    return lambda rows, name="rows.jsonl": write_rows(tmp_path / name, rows)


@pytest.fixture
def shown(welltuned, tiny_model_dir):
    """A function that shows rows to a person: how that ended, and the lines."""

    def show(*arguments):
        said = welltuned("data", *arguments, "--model", tiny_model_dir)
        assert said.out == ""
        return said.code, [line.rstrip() for line in said.err.splitlines()]

    return show


@pytest.fixture
def document(welltuned, tiny_model_dir):
    """The same for a program."""

    def document(*arguments, code=0):
        said = welltuned("data", *arguments, "--model", tiny_model_dir, "--json")
        assert said.err == "" and said.code == code and said.out.count("\n") == 1
        return json.loads(said.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return document


# ── for people ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_person_sees_what_is_trained(shown, write):
    code, lines = shown(write(SOUND), "--row", "4")
    assert code == 0
    text = "\n".join(lines)
    for words in ("Data     messages", "format: chat `messages`", "27 training rows, 3 held out", "27 of 27 rows",
                  "no defect was found", "max_length", "cuts nothing (set by the advice)"):  # fmt: skip
        assert words in text, words
    at = next(i for i, line in enumerate(lines) if "rows.jsonl:4, a training row" in line)
    assert [line.strip() for line in lines[at + 1 : at + 5]] == [
        "template  <|im_start|>user↵",
        "user      question 3 of 30<|im_end|>↵",
        "template  <|im_start|>assistant↵",
        "assistant ⟦answer 3<|im_end|>⟧↵",
    ]


def test_three_rows_unless_told_otherwise(shown, write):
    path = write([*SOUND, chat("long", "answer " * 60)])
    for arguments, count in (((), 3), (("--show", 0), 0), (("--show", 1), 1), (("--show", 7), 7)):
        code, lines = shown(path, *arguments)
        titles = [line for line in lines if re.search(r"rows.jsonl:\d+, .*: \d+ tokens, \d+ trained", line)]
        assert code == 0 and len(titles) == len(set(titles)) == count
    assert "the first row" in titles[0] and "of median length" in titles[1] and "the longest row" in titles[2]


@pytest.mark.parametrize("terminal", ["xterm-256color", "dumb", None])
def test_colour_where_there_is_one_and_brackets_where_there_is_none(
    write, tiny_model_dir, monkeypatch, capsys, terminal
):
    found = package.inspect(model=str(tiny_model_dir), data=write(SOUND), rows=["4"])
    environment = {} if terminal is None else {"TERM": terminal}
    if terminal is None:
        environment = {"TERM": "xterm-256color", "NO_COLOR": "1"}
    console = Console(force_terminal=True, width=100, _environ=environment, highlight=False)
    monkeypatch.setattr(command, "console", console)
    command.print_inspection(found)
    text = capsys.readouterr().out
    coloured = terminal == "xterm-256color"
    assert ("\x1b[30;42manswer 3\x1b[0m" in text) == coloured  # black on green
    assert ("\x1b[2;9mquestion 3 of 30\x1b[0m" in text) == coloured  # dimmed and struck through
    assert ("\x1b[2;9;35m<|im_start|>\x1b[0m" in text) == coloured
    assert ("⟦answer 3<|im_end|>⟧" in text) != coloured


HOSTILE = (
    "clear \x1b[2J\x1b[1;1H \x9b31m bell\x07 back\x08 \r\u202e turned \u2066 tag\U000e0041 sep\u2028 nul\x00 ⟧ end"
)


@pytest.mark.parametrize("where", ["user", "answer", "role", "column", "file"])
def test_nothing_in_the_data_reaches_the_terminal_raw(shown, document, write, where):
    name = "rows\x1b[2J.jsonl" if where == "file" else "rows.jsonl"
    row = {
        "user": chat(HOSTILE, "fine"),
        "answer": chat("fine", HOSTILE),
        "role": {"messages": [{"role": HOSTILE, "content": "x"}, *SOUND[0]["messages"]]},
        "column": chat("fine", "x", **{HOSTILE: 1}),
        "file": {"messages": []},
    }[where]
    path = write([row, *SOUND] if where == "column" else [*SOUND[:4], row, *SOUND[4:]], name)
    code, lines = shown(path, "--row", "1" if where == "column" else "5")
    assert code == (1 if where in ("role", "file") else 0)
    for text in ("\n".join(lines), json.dumps(document(path, code=code), ensure_ascii=False)):
        assert "\\x1b" in text or "\\u001b" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2066-\u2069]", "\n".join(lines))


def test_json_on_a_terminal_is_safe_and_the_same(welltuned, tiny_model_dir, write):
    said = welltuned(
        "data", write([chat(HOSTILE, "é 漢 🙂 fine"), *SOUND]), "--row", "1", "--json", "--model", tiny_model_dir
    )
    assert (
        not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2066-\u2069]", said.out) and "漢 🙂" in said.out
    )
    [example] = json.loads(said.out)["examples"]
    assert HOSTILE in "".join(run["text"] for run in example["runs"])


def test_an_error_about_such_a_file_is_safe(welltuned, tiny_model_dir, tmp_path):
    said = welltuned("data", tmp_path / "no\x1b[2J.jsonl", "--model", tiny_model_dir)
    assert said.code == 2 and "\x1b" not in said.err and "\\x1b[2J" in said.err


def test_characters_of_several_tokens_and_other_scripts(shown, write):
    code, lines = shown(write([chat("漢字は？ 🙂👩‍👩‍👧", "مرحبا 🙂 é"), *SOUND]), "--row", "1")
    assert code == 0 and "user      漢字は？ 🙂👩‍👩‍👧<|im_end|>↵" in "\n".join(lines)
    assert "⟦مرحبا 🙂 é<|im_end|>⟧" in "\n".join(lines) and "\ufffd" not in "\n".join(lines)


def test_newlines_and_tabs_are_seen(shown, write):
    _, lines = shown(write([chat("a\tb\n\n\nc", "d\ne"), *SOUND]), "--row", "1")
    text = [line.strip() for line in lines]
    assert "user      a⇥ b↵↵↵" in text and "c<|im_end|>↵" in text
    assert "assistant ⟦d↵⟧" in text and "⟦e<|im_end|>⟧↵" in text


def test_long_rows_are_shortened_in_the_middle(shown, write):
    row = chat("start " + "q " * 900 + "stop", "begin " + "w " * 900 + "last")
    _, lines = shown(write([*SOUND, row]), "--row", "31")
    text = " ".join(" ".join(lines).split())
    assert re.search(r"start q .* … [\d,]+ tokens not shown, none of them trained … .*q stop<\|im_end\|>", text)
    assert re.search(r"⟦begin w .* … [\d,]+ tokens not shown, all of them trained … .*w last<\|im_end\|>⟧", text)
    assert len(lines) < 80


def test_a_cut_row_says_so(shown, write):
    path = write([*SOUND, chat("long", "answer " * 25)])
    code, lines = shown(path, "--set", "max_length=60", "--row", "31")
    text = " ".join(" ".join(lines).split())
    assert code == 0 and "60 tokens, " in text and re.search(r"cut from \d+", text)
    assert "max_length 60 cuts 1, 1 of which lose trained tokens (set by the user)" in text
    assert "longer than max_length" in text and "would cut none" in text


# ── errors that block, and rows that were asked for ──────────────────────────────────────────────────────────────────


def test_what_training_refuses_is_shown_and_ends_with_1(shown, document, write, welltuned, tiny_model_dir, tmp_path):
    path = write([*SOUND, {"messages": [{"role": "user", "content": "no answer"}]}, chat("b", "  ")])
    code, lines = shown(path)
    text = " ".join(" ".join(lines).split())
    assert (
        code == 1
        and "✗ 2 of 32 rows cannot be read as conversations; training refuses them (on_bad_row is error)" in text
    )
    assert "rows.jsonl:31" in text and "rows.jsonl:32" in text and text.endswith("for what is marked ✗ above.")
    found = document(path, code=1)
    assert found["blocked"] and found["audit"]["found"]["bad_row"]["done"] == "refused"
    assert found["audit"]["problems"][0]["severity"] == "error" and found["rows"] == 27
    trained = welltuned("train", "--model", tiny_model_dir, "--data", path, "--out", tmp_path / "out")
    assert trained.code == 2 and "rows.jsonl:31" in trained.err
    code, lines = shown(path, "--set", "on_bad_row=drop")
    assert code == 0 and "! 2 of 32 rows cannot be read as conversations; left out" in " ".join(" ".join(lines).split())


@pytest.mark.parametrize("kind", ["duplicate", "too_long", "leak", "control_token"])
def test_any_policy_of_error_blocks_and_shows_all(document, write, kind):
    path = write([*SOUND, SOUND[7], chat("long", "answer " * 60), chat("what is <|im_end|>?", "a token")])
    held = write([SOUND[3]], "held.jsonl")
    options = ("--eval-data", held, "--set", "max_length=60")
    whole = document(path, *options)
    found = document(path, *options, "--set", f"on_{kind}=error", code=1)
    assert not whole["blocked"] and found["rows"] == whole["rows"] == 33
    assert found["audit"]["found"][kind]["rows"] == 1 and found["audit"]["problems"][0]["severity"] == "error"
    assert [p["severity"] for p in found["audit"]["problems"]].count("error") == 1
    assert len(found["audit"]["problems"]) == len(whole["audit"]["problems"]) == 4


def test_data_of_which_nothing_is_trained_are_shown(shown, document, write, tmp_path):
    rows = [{"messages": [{**m, "train": False} for m in row["messages"]]} for row in SOUND]
    path = write(rows)
    code, lines = shown(path, "--show", "1")
    text = " ".join(" ".join(lines).split())
    assert code == 1 and "have no trained token" in text and "answer 0<|im_end|>↵" in text and "⟦answer" not in text
    found = document(path, code=1)
    assert found["supervised_tokens"] == 0 and found["max_length"] is None and found["share"] == 0


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("rows.jsonl:4", "rows.jsonl:4, a training row"),
        ("4", "rows.jsonl:4, a training row"),
        ("31", "rows.jsonl:31 cannot be read: the row has no answer"),
        ("32", "rows.jsonl:32, left out, since on_duplicate"),
    ],
)
def test_a_row_by_line_or_origin_whatever_became_of_it(shown, write, wanted, words):
    path = write([*SOUND, {"messages": [{"role": "user", "content": "x"}]}, SOUND[0]])
    code, lines = shown(path, "--row", wanted, "--set", "on_duplicate=drop", "--set", "eval_fraction=0.01")
    assert words in " ".join(" ".join(lines).split())


def test_a_held_out_row(shown, document, write):
    path = write(SOUND)
    every = document(path, *[word for n in range(1, 31) for word in ("--row", str(n))])["examples"]
    assert [example["origin"].rpartition(":")[2] for example in every] == [str(n) for n in range(1, 31)]
    assert [example["why"] for example in every].count("a held-out row") == 3


@pytest.mark.parametrize("wanted", ["99", "0", "other.jsonl:3", "ows.jsonl:3"])
def test_no_such_row(welltuned, tiny_model_dir, write, wanted):
    said = welltuned("data", write(SOUND), "--model", tiny_model_dir, "--row", wanted)
    assert (
        said.code == 2 and f"--row {wanted}: there is no such row" in said.complaints[0] and "rows.jsonl:1" in said.err
    )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("rows.json", '[{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]', "rows.json[1]"),
        ("rows.csv", "question,answer\nq,a\nr,b\n", "rows.csv:3"),
    ],
)
def test_rows_of_other_files(document, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    [example] = document(tmp_path / name, "--row", words)["examples"]
    assert example["origin"].endswith(words)


# ── for programs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_document(document, write):
    found = document(write(SOUND))
    assert found.keys() == {
        *("format", "notes", "blocked", "rows", "held_out_rows", "tokens", "supervised_tokens", "share", "max_length"),
        *("lengths", "by_speaker", "audit", "examples", "bad"),
    }
    assert (found["format"], found["rows"], found["held_out_rows"], found["blocked"]) == ("messages", 27, 3, False)
    assert found["lengths"].keys() == {"min", "p50", "p90", "p95", "p99", "max", "histogram"}
    assert sum(each["rows"] for each in found["lengths"]["histogram"]) == 27
    assert found["share"] == pytest.approx(found["supervised_tokens"] / found["tokens"], abs=1e-4)
    speakers = found["by_speaker"]
    assert sum(s["tokens"] for s in speakers.values()) == found["tokens"]
    assert speakers["assistant"]["trained"] == found["supervised_tokens"] and speakers["assistant"]["share"] == 1.0
    assert found["audit"]["found"].keys() >= {"bad_row", "duplicate", "leak"}
    first = found["examples"][0]
    assert first["origin"].endswith("rows.jsonl:1") and first["tokens"] == first["length"]
    assert first["runs"] == [
        {"text": "<|im_start|>user\n", "trained": False, "speaker": "template"},
        {"text": "question 0 of 30", "trained": False, "speaker": "user"},
        {"text": "<|im_end|>\n<|im_start|>assistant\n", "trained": False, "speaker": "template"},
        {"text": "answer 0<|im_end|>", "trained": True, "speaker": "assistant"},
        {"text": "\n", "trained": False, "speaker": "template"},
    ]


def test_the_same_as_a_run_records(document, write, welltuned, tiny_model_dir, tmp_path):
    path = write([*SOUND, SOUND[3], chat("what is <|im_end|>?", "a token")])
    given = ("--set", "on_duplicate=drop", "--set", "seed=5", "--set", "max_length=50")
    found = document(path, *given)
    said = welltuned("train", "--model", tiny_model_dir, "--data", path, "--out", tmp_path / "out", "--json", *given,
                     "--set", "max_steps=2")  # fmt: skip
    assert said.code == 0 and json.loads(said.out)["audit"] == found["audit"]
    plan = welltuned("plan", "--model", tiny_model_dir, "--data", path, *given, "--json")
    assert json.loads(plan.out)["choices"]["max_length"]["value"] == found["max_length"]


def test_options_that_say_how_data_are_read(document, write, tmp_path):
    rows = [
        {"Frage": f"f {i}", "Antwort": f"a {i}", "question": "q", "answer": "b", "text": "some text"} for i in range(20)
    ]
    path = write(rows)
    mapped = document(path, "--map", "prompt=Frage", "--map", "completion=Antwort", "--row", "3")
    assert mapped["format"] == "prompt/completion" and "f 2" in mapped["examples"][0]["runs"][1]["text"]
    assert document(path, "--set", "format=text")["by_speaker"]["document"]["share"] > 0.5
    (tmp_path / "folder").mkdir()
    for split, count in (("train", 20), ("test", 7)):
        (tmp_path / "folder" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SOUND[:count]))
    found = document(tmp_path / "folder", "--split", "test")
    assert found["rows"] + found["held_out_rows"] == 7
    both = document(tmp_path / "folder", "--split", "train", "--eval-data", tmp_path / "folder" / "test.jsonl")
    assert (both["rows"], both["held_out_rows"], both["audit"]["found"]["leak"]["rows"]) == (20, 7, 7)


def test_several_files_and_a_recipe(document, write, tmp_path, tiny_model_dir, welltuned):
    first, second = write(SOUND[:20], "a.jsonl"), write(SOUND[20:], "b.jsonl")
    found = document(first, second, "--row", "b.jsonl:2")
    assert found["rows"] + found["held_out_rows"] == 30 and found["examples"][0]["origin"].endswith("b.jsonl:2")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model_dir}\ndata: [{first}, {second}]\nmax_length: 50\n")
    said = welltuned("data", recipe, "--json")
    assert said.code == 0 and json.loads(said.out)["max_length"] == 50
    said = welltuned("data", recipe, recipe)
    assert said.code == 2 and "is a second recipe" in said.err


def test_unusable_input_ends_with_2(welltuned, tiny_model_dir, write, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"messages": []}\n{"mess\n')
    for arguments, words in (
        ((tmp_path / "none.jsonl",), "none.jsonl: there is no such file"),
        ((tmp_path / "broken.jsonl",), "broken.jsonl:1: all 2 rows have defects"),
        ((write([{"a": 1}], "a.jsonl"),), "no format is known"),
        ((write([*SOUND, {"prompt": "p", "completion": "c"}], "b.jsonl"),), "b.jsonl:31: mixed schemas"),
        ((write([{"messages": []}] * 3, "c.jsonl"),), "all 3 rows have defects"),
        ((write(SOUND), "--show", "-1"), "--show: must be 0 or more"),
        ((write(SOUND), "--set", "lerning_rate=1"), "did you mean 'learning_rate'"),
        ((), "names no data"),
    ):
        said = welltuned("data", *arguments, "--model", tiny_model_dir)
        assert said.code == 2 and words in said.complaints[0], words
        assert len(said.err.splitlines()) == 1 and said.out == ""


def test_from_python(tiny_model_dir, write):
    found = package.inspect(model=str(tiny_model_dir), data=write(SOUND), show=2)
    assert len(found.examples) == 2 and not found.blocked and found.audit.rows == 27
    assert "".join(run.text for run in found.text_of(found.examples[0])).count("answer 0") == 1


# ── text made harmless ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain ~", "plain ~"), ("é漢🙂👩‍👧 مرحبا", "é漢🙂👩‍👧 مرحبا"), ("\x1b[0m", "\\x1b[0m"), ("\x9b", "\\x9b"),
        ("\x7f\x00\r", "\\x7f\\x00\\x0d"), ("\u202e\u2028\ufeff", "\\u202e\\u2028\\ufeff"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
    ],
)  # fmt: skip
def test_visible(text, safe):
    assert visible(text) == safe
    assert json.loads(json_text(json.dumps(text, ensure_ascii=False))) == text

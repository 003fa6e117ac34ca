"""A dataset with every kind of defect in known rows, and beside each a row that only looks like it.

The audit names every planted row by file and line, and no other: through the command, through `prepare` and in the Run.
Each policy does what it says, and what it did is counted.
"""

import gzip
import json
from collections import defaultdict

import pytest

from welltuned.cli.main import main
from welltuned.data.conversation import Kind, Policy
from welltuned.errors import InputError
from welltuned.recipe import load_recipe
from welltuned.training.prepare import prepare

MAX_LENGTH = 150
# ChatML that leaves a turn open or its text out where the row says so, and never shows thinking that stands apart
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ '' if message.get('hidden') else message['content'] }}"
    "{% if not message.get('open') %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def row(*turns):
    return {"messages": list(turns)}


def chat(question, answer, **more):
    return row(turn("user", question), turn("assistant", answer, **more))


SOUND = [chat(f"{i} hats", f"hat:{i}") for i in range(20)]
LINE = json.dumps(SOUND[0]).encode()
LINES = b"\n".join(json.dumps(r).encode() for r in SOUND) + b"\n"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
PLANTED = [
    # lines that are no rows
    (LINE[:-2], {Kind.BAD_ROW}),
    (LINE + b" {}", {Kind.BAD_ROW}),
    (LINE.replace(b"hat", b"h\xe9t"), {Kind.BAD_ROW}),
    (LINE.replace(b"hats", b"\\ud800"), {Kind.BAD_ROW}),
    (LINE.replace(b"hats", b"a\x00b"), {Kind.BAD_ROW}),
    (LINE[:-1] + b', "x": NaN}', {Kind.BAD_ROW}),
    (LINE[:-1] + b', "messages": []}', {Kind.BAD_ROW}),
    (b"7", {Kind.BAD_ROW}),
    (b"[" * 100_000, {Kind.BAD_ROW}),
    # what cannot be read
    (row(turn("user", "no answer")), {Kind.BAD_ROW}),
    (row(), {Kind.BAD_ROW}),
    ({"messages": None}, {Kind.BAD_ROW}),
    (chat("null", None), {Kind.BAD_ROW}),
    (chat("blank", " \n"), {Kind.BAD_ROW}),
    (chat("number", 7), {Kind.BAD_ROW}),
    (row(turn("narrator", "role"), *SOUND[0]["messages"]), {Kind.BAD_ROW}),
    (row(turn("user", [{"type": "image", "image": "x.png"}]), turn("assistant", "a hat")), {Kind.BAD_ROW}),
    (chat("weight", "between", weight=0.5), {Kind.BAD_ROW}),
    (row(turn("user", "q", train=True), turn("assistant", "a")), {Kind.BAD_ROW}),
    # what teaches nothing
    (chat("not me", "nor me", train=False), {Kind.UNTRAINED}),
    (chat("not I", "nor I", weight=0), {Kind.UNTRAINED}),
    (row(turn("user", "1"), turn("assistant", "one", weight=0), turn("user", "2"), turn("assistant", "two")), set()),
    (chat("a red hat, " * 40, "long question"), {Kind.TOO_LONG, Kind.UNTRAINED}),
    # lengths
    (chat("long answer", "red cup, " * 40), {Kind.TOO_LONG}),
    (row(turn("user", "two answers"), turn("assistant", "one"), turn("user", "x" * 200), turn("assistant", "two")),
     {Kind.TOO_LONG}),
    # repeats
    (chat("3 hats", "hat:3"), {Kind.DUPLICATE}),
    (chat("3 hats", "hat:3"), {Kind.DUPLICATE}),
    (chat("3 hats", "hats:3"), set()),
    (chat("3 hats ", "hat:3"), set()),
    # turns
    (chat("", "blank user"), {Kind.EMPTY_TURN}),
    (row(turn("system", " \t"), turn("user", "blank system"), turn("assistant", "a")), {Kind.EMPTY_TURN}),
    (row(turn("user", "twice"), turn("user", "twice"), turn("assistant", "once")), {Kind.REPEATED_TURN}),
    (row(turn("user", "twice"), turn("assistant", "yes"), turn("user", "twice"), turn("assistant", "yes")), set()),
    (row(turn("user", "two"), turn("user", "turns"), turn("assistant", "one")), set()),
    # control tokens in a row's own text
    (chat("what is <|im_end|>?", "a token"), {Kind.CONTROL_TOKEN}),
    (row(turn("system", "<|im_start|>system"), turn("user", "who?"), turn("assistant", "me")), {Kind.CONTROL_TOKEN}),
    (chat("write it", "here: <|endoftext|>"), {Kind.CONTROL_TOKEN}),
    (chat("what is <|im_end|?", "almost |im_end|> one"), set()),
    # encodings
    (chat("caf\u00c3\u00a9", "a cup"), {Kind.BAD_ENCODING}),
    (chat("it\u00e2\u20ac\u2122s", "a hat"), {Kind.BAD_ENCODING}),
    (chat("lost \ufffd", "a hat"), {Kind.BAD_ENCODING}),
    (chat("nul \x00", "a hat"), {Kind.BAD_ENCODING}),
    (chat("a hat", "old \x92 quote"), {Kind.BAD_ENCODING}),
    (chat("S\u00c3O PAULO, \u00c2ngulo, \u00e2me", "caf\u00e9 \u6f22\u5b57 \U0001f642"), set()),
    # thinking
    (chat("why?", "because", reasoning_content="let me see"), {Kind.LOST_THINKING}),
    (chat("how?", "so", thinking="let me think"), {Kind.LOST_THINKING}),
    (chat("when?", "<think>\nlet me see\n</think>\n\nnow"), set()),
    # messages
    (row(turn("system", "be kind", hidden=True), turn("user", "who is it?"), turn("assistant", "me")),
     {Kind.LOST_MESSAGE}),
    # tools
    ({**chat("add", "1"), "tools": TOOLS}, {Kind.LOST_TOOLS}),
    ({**chat("no tools", "2"), "tools": []}, set()),
    # ends
    (chat("go on", "and on", open=True), {Kind.END_UNTRAINED}),
    (row(turn("user", "1"), turn("assistant", "one", open=True), turn("user", "2"), turn("assistant", "two")),
     {Kind.END_UNTRAINED}),
    (row(turn("user", "open", open=True), turn("assistant", "closed")), set()),
    # two at once
    (chat("\u00c3\u00a9 <|im_end|>", "both"), {Kind.BAD_ENCODING, Kind.CONTROL_TOKEN}),
]  # fmt: skip
HELD = [
    (chat("new", "new"), set()),
    (chat("5 hats", "other"), {Kind.LEAK}),
    (chat("7 hats", "hat:7"), {Kind.LEAK}),
    (chat("7 hat", "hat:7"), set()),
    (chat(" ", "blank"), {Kind.EMPTY_TURN}),
]
NAMES = ("rows.jsonl", "held.jsonl")


def planted():
    """Kind → where, in the order of the files."""
    where = defaultdict(list)
    for name, rows in zip(NAMES, ([*((r, set()) for r in SOUND), *PLANTED], HELD), strict=True):
        for line, (_, kinds) in enumerate(rows, start=1):
            for kind in kinds:
                where[kind].append(f"{name}:{line}")
    return dict(where)


WHERE = planted()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    for name, rows in zip(NAMES, ([*SOUND, *(r for r, _ in PLANTED)], [r for r, _ in HELD]), strict=True):
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
        (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def options(files, tiny_model_dir):
    return {
        "model": str(tiny_model_dir), "data": str(files / NAMES[0]), "eval_data": str(files / NAMES[1]),
        "max_length": MAX_LENGTH, "chat_template": TEMPLATE,
    }  # fmt: skip


@pytest.fixture(scope="module")
def given(files, tiny_model_dir):
    """The same for the command line, where `data` takes its files as arguments."""
    sets = ("--set", f"max_length={MAX_LENGTH}", "--set", f"chat_template={TEMPLATE}")
    return ("--model", str(tiny_model_dir), "--eval-data", str(files / NAMES[1]), *sets), str(files / NAMES[0])


@pytest.fixture
def command(capfd):
    def run(*arguments):
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        return code, *capfd.readouterr()

    return run


KINDS = [kind for kind in Kind if kind not in (Kind.EQUAL_PAIR, Kind.PROMPT_DIFFERS)]  # those are of pairs
NEVER_KEPT = {"bad_row", "untrained", "equal_pair"}


def policies(policy, **others):
    """Every kind's policy; those that cannot be kept are left out instead."""
    never = (Kind.BAD_ROW, Kind.UNTRAINED, Kind.EQUAL_PAIR)
    every = {f"on_{kind}": "drop" if kind in never and policy == "keep" else policy for kind in Kind}
    return {**every, **others}


def as_sets(chosen):
    return [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]


def short(origin):
    return origin.rpartition("/")[2]


def named(found):
    """Kind → where, from the audit's JSON."""
    return {
        Kind(kind): [short(origin if isinstance(origin, str) else origin[0]) for origin in finding["origins"]]
        for kind, finding in found.items()
        if finding["origins"]
    }


def gone(kinds):
    return {where for kind in kinds for where in WHERE[kind]}


# ── every row is named, and no other ─────────────────────────────────────────────────────────────────────────────────


def test_every_kind_is_planted():
    assert WHERE.keys() == set(KINDS)


def test_the_command_names_every_row_and_no_other(command, given):
    others, data = given
    code, out, err = command("data", data, *others, "--json")
    found = json.loads(out)
    assert code == 1 and err == "" and found["blocked"]
    assert named(found["audit"]["found"]) == WHERE
    assert {k for k, f in found["audit"]["found"].items() if f["policy"] == "error"} == NEVER_KEPT
    assert [p["severity"] for p in found["audit"]["problems"]].count("error") == 2
    code, out, err = command("data", data, *others)
    text = "".join(err.split())
    assert code == 1 and out == ""
    for kind, places in WHERE.items():
        assert f"on_{kind}" in text and places[0] in text or kind is Kind.TOO_LONG  # which the counts tell of
    assert f"2trainingrowsarelongerthanmax_length{MAX_LENGTH}andwerecut:" in text
    assert text.index("on_bad_rowiserror") < text.index("on_duplicate")  # the gravest first


def test_prepare_names_every_row_and_no_other(options):
    prepared = prepare(load_recipe(None, {**options, **policies("keep")}))
    assert named(prepared.audit.to_json()["found"]) == WHERE
    assert all(finding.rows == len(finding.named) for finding in prepared.audit.findings.values())


def test_what_a_row_repeats_is_named(options):
    audit = prepare(load_recipe(None, {**options, **policies("keep")})).audit
    beside = {kind: [short(text) for _, text in audit.findings[kind].named] for kind in (Kind.DUPLICATE, Kind.LEAK)}
    assert beside == {Kind.DUPLICATE: ["rows.jsonl:4"] * 2, Kind.LEAK: ["rows.jsonl:6", "rows.jsonl:8"]}


def test_no_defect_in_sound_rows(command, tiny_model_dir, write_rows, tmp_path):
    decoys = [r for r, kinds in [*PLANTED] if not kinds]
    path = write_rows(tmp_path / "sound.jsonl", [*SOUND, *decoys])
    code, out, _ = command("data", path, "--model", tiny_model_dir, "--json", "--set", f"chat_template={TEMPLATE}")
    found = json.loads(out)
    assert code == 0 and named(found["audit"]["found"]) == {} and found["audit"]["problems"] == []
    assert found["audit"]["end_trained"] == found["rows"]


# ── what each policy does ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_error_names_the_first_row_and_stops(options, command, given, tmp_path, kind):
    chosen = policies("keep", **{f"on_{kind}": "error"})
    with pytest.raises(InputError) as caught:
        prepare(load_recipe(None, {**options, **chosen}))
    assert short(caught.value.where) == WHERE[kind][0]
    others, data = given
    code, out, err = command("train", "--data", data, *others, *as_sets(chosen), "--out", tmp_path / "out")
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and WHERE[kind][0] + ": " in err
    assert not (tmp_path / "out").exists()
    code, out, _ = command("data", data, *others, *as_sets(chosen), "--json")
    found = json.loads(out)["audit"]
    assert code == 1 and found["found"][kind]["policy"] == "error" and named(found["found"])[kind] == WHERE[kind]
    assert found["problems"][0]["severity"] == "error" and f"(on_{kind} is error)" in found["problems"][0]["sentence"]


@pytest.mark.parametrize("kind", KINDS)
def test_drop_leaves_out_just_those_rows(options, kind):
    kept = prepare(load_recipe(None, {**options, **policies("keep")}))
    dropping = policies("keep", **{f"on_{kind}": "drop"})
    dropped = prepare(load_recipe(None, {**options, **dropping}))
    before, after = ({short(e.origin) for e in (*p.train, *p.held_out)} for p in (kept, dropped))
    expected = {"rows.jsonl:6", "rows.jsonl:8"} if kind is Kind.LEAK else gone([kind])
    if kind is Kind.LEAK:  # the training rows go: these two, and no other has such a prompt
        expected = {short(e.origin) for e in kept.train if short(e.origin) in expected}
    assert before - after == expected - gone([Kind.BAD_ROW, Kind.UNTRAINED]) and not after - before
    assert not after & expected
    finding = dropped.audit.findings[kind]
    assert (finding.policy, finding.rows) == (Policy.DROP, len(WHERE[kind]))
    assert finding.dropped == len(expected)
    assert finding.to_json()["done"] == "left out"
    [sentence] = [w for w in dropped.plan.warnings if f"(on_{kind})" in w]
    assert sentence.startswith(f"{len(WHERE[kind])} of ") and "left out" in sentence and WHERE[kind][0] in sentence


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (Kind.BAD_ROW, Kind.UNTRAINED)])
def test_keep_keeps_and_tells(options, kind):
    prepared = prepare(load_recipe(None, {**options, **policies("keep")}))
    left = {short(e.origin): e for e in (*prepared.train, *prepared.held_out)}
    finding = prepared.audit.findings[kind]
    assert (finding.policy, finding.dropped, finding.rows) == (Policy.KEEP, 0, len(WHERE[kind]))
    kept = [where for where in WHERE[kind] if where not in gone([Kind.UNTRAINED])]
    assert kept and all(where in left for where in kept)
    if kind is Kind.TOO_LONG:
        assert all(len(left[where].ids) == MAX_LENGTH and left[where].cut for where in kept)
        words = f"are longer than max_length {MAX_LENGTH} and were cut"
    else:
        words = f"kept (on_{kind})"
    assert sum(words in warning for warning in prepared.plan.warnings) == 1


@pytest.mark.parametrize("kind", [Kind.BAD_ROW, Kind.UNTRAINED])
def test_what_cannot_be_kept(options, kind):
    with pytest.raises(InputError, match=f"on_{kind} is 'keep'; it must be one of error, drop"):
        load_recipe(None, {**options, f"on_{kind}": "keep"})


# ── counted in the plan and in the Run ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_the_plan_and_the_run_tell_the_same(command, given, options, tmp_path, policy):
    others, data = given
    chosen = as_sets(policies(policy))
    code, out, _ = command("plan", "--data", data, *others, *chosen, "--json")
    warnings = json.loads(out)["warnings"]
    assert code == 0
    code, out, _ = command("data", data, *others, *chosen, "--json")
    shown = json.loads(out)
    assert code == 0 and not shown["blocked"]
    train = ("train", "--data", data, *others, *chosen, "--out", tmp_path / "out", "--set", "max_steps=2")
    code, out, _ = command(*train, "--set", "learning_rate=1e-2", "--json")
    run = json.loads(out)
    assert code == 0 and run == json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["audit"] == shown["audit"]
    sentences = [problem["sentence"] for problem in run["audit"]["problems"]]
    assert set(sentences) <= set(warnings) and set(sentences) <= set(run["notes"])
    assert [w for w in warnings if w in sentences] == sentences  # the gravest first, here and there
    for kind, finding in run["audit"]["found"].items():
        assert finding["rows"] >= finding["dropped"] >= 0 and finding["policy"] == policies(policy)[f"on_{kind}"]
        assert (finding["dropped"] > 0) == (finding["policy"] == "drop" and finding["rows"] > 0)
    if policy == "keep":
        assert named(run["audit"]["found"]) == WHERE
    whole = len(SOUND) + len(PLANTED)
    lost = sum(f["dropped"] for f in run["audit"]["found"].values()) - (policy == "drop")  # one row has two kinds
    held_lost = len(HELD) - run["audit"]["held_out_rows"]
    assert run["audit"]["rows"] == whole - lost + held_lost  # nobody is missing who was not counted


# ── what only files can have ─────────────────────────────────────────────────────────────────────────────────────────

BROKEN_FILES = {
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "utf16.jsonl"),
    "mixed.jsonl": (LINES + b'{"prompt": "p", "completion": "c"}\n', "mixed.jsonl:21: mixed schemas"),
    "empty.jsonl": (b"", "empty.jsonl: the file is empty"),
    "blank.jsonl": (b"\n \n", "blank.jsonl: "),
    "header.csv": (b"question,answer\n", "header.csv: "),
    "cut.json": (b"[" + LINE + b",", "cut.json"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-20], "cut.jsonl.gz"),
    "not_a.parquet": (LINES, "not_a.parquet"),
    "unknown.jsonl": (b'{"a": 1, "b": 2}\n', "no format is known"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_one_sentence_under_any_policy(command, tiny_model_dir, tmp_path, name):
    content, words = BROKEN_FILES[name]
    (tmp_path / name).write_bytes(content)
    others = ("--model", tiny_model_dir, *as_sets(policies("drop")))
    code, out, err = command("data", tmp_path / name, *others)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err
    assert command("plan", "--data", tmp_path / name, *others)[0::2] == (2, err)


def test_a_byte_order_mark_and_blank_lines_are_no_defect(command, tiny_model_dir, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"))
    code, out, _ = command("data", tmp_path / "x.jsonl", "--model", tiny_model_dir, "--json", "--row", "3")
    found = json.loads(out)
    assert code == 0 and found["audit"]["problems"] == [] and found["rows"] + found["held_out_rows"] == 20
    assert "1 hats" in found["examples"][0]["runs"][1]["text"]  # the line of the file, blank ones counted

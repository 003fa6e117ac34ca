"""The cache on disk: found again, never wrongly, never half-written, never larger than it may be."""

import copy
import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest

from welltuned.data import build as building
from welltuned.data import cache as module
from welltuned.data.build import Reading, read_store
from welltuned.data.cache import FOLDER_VARIABLE, Cache, cache_key, default_folder, tokenizer_digest
from welltuned.data.conversation import Kind, Policy
from welltuned.data.dataset import read_dataset
from welltuned.data.render import LossOn
from welltuned.data.source import open_source
from welltuned.data.store import ABOUT, TYPES
from welltuned.errors import InputError
from welltuned.recipe import Recipe, load_recipe

READING = Reading(chat_template="chatml")


@pytest.fixture(autouse=True)
def _all_is_cached(monkeypatch):
    monkeypatch.setattr(building, "SMALLEST_CACHED", 1)


@pytest.fixture
def source(data_file):
    return open_source(data_file)


@pytest.fixture
def built(monkeypatch):
    """A list that grows with every source that is tokenised."""
    real, made = building._built, []

    def counting(*arguments):
        made.append(arguments[1].name)
        return real(*arguments)

    monkeypatch.setattr(building, "_built", counting)
    return made


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(
        a.origin == b.origin and np.array_equal(a.ids, b.ids) and np.array_equal(a.mask, b.mask) for a, b in pairs
    )


def test_found_the_second_time(source, tokenizer, tmp_path, built):
    first = read_store(source, tokenizer, READING, cache=Cache(tmp_path))
    second = read_store(source, tokenizer, READING, cache=Cache(tmp_path))
    assert len(built) == 1 and len(first) == 80 and same(first, second) and first.about == second.about
    assert [sorted(p.name for p in place.iterdir()) for place in tmp_path.iterdir()] == [sorted([*TYPES, ABOUT])]


def test_small_sources_are_not_cached(source, tokenizer, tmp_path, monkeypatch, built):
    monkeypatch.setattr(building, "SMALLEST_CACHED", 10**6)
    for _ in range(2):
        read_store(source, tokenizer, READING, cache=Cache(tmp_path))
    assert len(built) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"loss_on": LossOn.EVERYTHING},
        {"loss_on": LossOn.LAST},
        {"chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
                          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"},
        {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"},
        {"format": "messages"},
        {"mapping": {"messages": "messages"}},
    ],
)  # fmt: skip
def test_another_reading_is_another_store(source, tokenizer, tmp_path, built, change):
    from welltuned.data.conversation import Format

    if "format" in change:
        change = {"format": Format.MESSAGES}
    read_store(source, tokenizer, READING, cache=Cache(tmp_path))
    read_store(source, tokenizer, replace(READING, **change), cache=Cache(tmp_path))
    assert len(built) == 2


def test_the_same_template_from_elsewhere_is_the_same_store(source, tokenizer, tmp_path, built):
    from welltuned.data.templates import CHATML

    (tmp_path / "template.jinja").write_text(CHATML)
    for template in ("chatml", CHATML, str(tmp_path / "template.jinja")):
        read_store(source, tokenizer, replace(READING, chat_template=template), cache=Cache(tmp_path / "cache"))
    assert len(built) == 1


def test_other_content_or_another_name_is_another_store(rows, write_rows, tokenizer, tmp_path, built):
    path = write_rows(tmp_path / "a.jsonl", rows)
    read_store(open_source(path), tokenizer, READING, cache=Cache(tmp_path / "cache"))
    write_rows(tmp_path / "a.jsonl", [*rows[:-1], rows[0]])  # the same number of rows
    changed = read_store(open_source(path), tokenizer, READING, cache=Cache(tmp_path / "cache"))
    other = read_store(
        open_source(write_rows(tmp_path / "b.jsonl", rows)), tokenizer, READING, cache=Cache(tmp_path / "cache")
    )
    assert len(built) == 3 and np.array_equal(changed[79].ids, changed[0].ids) and other[3].origin.endswith("b.jsonl:4")


def test_tokenizers_are_told_apart(tokenizer, make_tokenizer):
    digest = tokenizer_digest(tokenizer)
    assert digest == tokenizer_digest(copy.deepcopy(tokenizer))
    used = copy.deepcopy(tokenizer)
    used(["a", "b c"], truncation=True, max_length=3)
    assert tokenizer_digest(used) == digest  # what a caller asked for last is not the tokenizer
    others = [
        make_tokenizer(["<s>", "</s>", "<|im_start|>", "<|im_end|>"], bos_token="<s>", eos_token="</s>"),
        make_tokenizer(None, bos_token="<s>", eos_token="<|im_end|>"),
        make_tokenizer(None, trim_offsets=False, bos_token="<s>", eos_token="</s>"),
    ]
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert len({digest, *map(tokenizer_digest, [*others, more])}) == 5


def test_a_template_that_writes_the_date_is_another_every_day(tokenizer, monkeypatch):
    def key(template, day):
        monkeypatch.setattr(module.time, "strftime", lambda _: day)
        return cache_key("f", "n", tokenizer, template, {})

    dated = "{{ strftime_now('%d %b %Y') }}"
    assert key(dated, "2026-01-01") != key(dated, "2026-01-02") and key("x", "2026-01-01") == key("x", "2026-01-02")


@pytest.mark.parametrize("name", [*TYPES, ABOUT])
def test_what_is_damaged_is_made_again_and_said(source, tokenizer, tmp_path, built, name):
    first = read_store(source, tokenizer, READING, cache=Cache(tmp_path))
    [place] = tmp_path.iterdir()
    (place / name).write_bytes((place / name).read_bytes()[:-5])
    cache = Cache(tmp_path)
    second = read_store(source, tokenizer, READING, cache=cache)
    assert len(built) == 2 and same(first, second) and "are damaged: they are made again" in cache.notes[0]
    third = Cache(tmp_path)
    read_store(source, tokenizer, READING, cache=third)
    assert len(built) == 2 and not third.notes


def test_a_folder_that_cannot_be_written_is_said(source, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    assert len(read_store(source, tokenizer, READING, cache=cache)) == 80
    assert "cannot be written (Not a directory): the tokens are kept for this run only" in cache.notes[0]


def test_a_build_that_fails_leaves_nothing(rows, write_rows, tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*rows, {"messages": []}])
    with pytest.raises(InputError, match="a.jsonl:81"):
        read_store(open_source(path), tokenizer, READING, cache=Cache(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_two_processes_that_build_the_same(source, tokenizer, tmp_path):
    """Each has its own folder until the end; the second finds the place taken, and both read what they wrote."""
    cache = Cache(tmp_path)
    writers = [building._built(cache.begin(), source, tokenizer, READING, Policy.ERROR) for _ in range(2)]
    stores = [cache.publish("key", writer) for writer in writers]
    assert same(*stores) and [place.name for place in tmp_path.iterdir()] == ["key"]
    assert same(stores[0], cache.find("key")) and not cache.notes


def test_the_least_recently_used_go_first(data_file, tokenizer, tmp_path, monkeypatch):
    readings = [replace(READING, loss_on=loss_on) for loss_on in LossOn]

    def read(reading):
        cache = Cache(tmp_path)
        read_store(open_source(data_file), tokenizer, reading, cache=cache)
        return cache.notes

    def age(seconds):
        for place in tmp_path.iterdir():
            then = (place / ABOUT).stat().st_mtime - seconds
            os.utime(place / ABOUT, (then, then))

    read(readings[0])
    size = sum(file.stat().st_size for place in tmp_path.iterdir() for file in place.iterdir())
    monkeypatch.setattr(module, "MOST_BYTES", 2.5 * size)
    age(60)
    read(readings[1])
    age(60)
    read(readings[0])  # used again, so the other is older
    age(60)
    assert "were removed" in read(readings[2])[0] and len(list(tmp_path.iterdir())) == 2
    real, made = building._built, []
    monkeypatch.setattr(building, "_built", lambda *a: made.append(1) or real(*a))
    read(readings[0])
    assert not made
    read(readings[1])
    assert made
    monkeypatch.setattr(module, "MOST_BYTES", 0)
    assert len(list(tmp_path.iterdir())) == 2 and read(
        replace(READING, group_by=None, mapping={"messages": "messages"})
    )
    assert len(list(tmp_path.iterdir())) == 1  # what was just made stays, whatever its size


def test_what_a_dead_process_left_goes_and_what_another_writes_stays(source, tokenizer, tmp_path):
    for name, hours in (("dead", 30), ("alive", 1)):
        place = tmp_path / (module.BESIDE + name)
        place.mkdir()
        os.utime(place, (time.time() - hours * 3600,) * 2)
    (tmp_path / "not-ours.txt").write_text("mine")
    read_store(source, tokenizer, READING, cache=Cache(tmp_path))
    names = {place.name for place in tmp_path.iterdir()}
    assert len(names) == 3 and {module.BESIDE + "alive", "not-ours.txt"} < names


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "here"))
    assert default_folder() == tmp_path / "here"
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "welltuned" / "tokens"


# ── a cached dataset says what a fresh one says ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def broken(rows, write_rows, tmp_path):
    empty = {"messages": [{"role": "system", "content": " "}, *rows[4]["messages"]]}
    bad = {"messages": [{"role": "user", "content": "hello"}]}
    return write_rows(tmp_path / "broken.jsonl", [*rows, bad, rows[0], empty, {"messages": []}])


def test_the_audit_of_a_cached_dataset_equals_that_of_a_fresh_one(broken, tokenizer, tmp_path, built):
    recipe = load_recipe(None, {"model": "m", "data": broken, "chat_template": "chatml", "on_bad_row": "drop"})
    fresh, cached = (read_dataset(recipe, tokenizer, cache=Cache(tmp_path / "cache")) for _ in range(2))
    assert len(built) == 1 and fresh.notes == cached.notes
    assert json.dumps(fresh.audit().to_json()) == json.dumps(cached.audit().to_json())
    found = cached.findings
    assert found[Kind.BAD_ROW].rows == 2 and found[Kind.EMPTY_TURN].rows == 1 and found[Kind.DUPLICATE].rows == 1
    assert found[Kind.BAD_ROW].named[0][0].endswith("broken.jsonl:81") and found[Kind.BAD_ROW].named[0][1]
    assert fresh.held_out_conversations()[0] == cached.held_out_conversations()[0]


def test_a_policy_can_become_stricter_without_reading_again(broken, tokenizer, tmp_path, built):
    def read(**policies):
        recipe = Recipe(model="m", data=broken, chat_template="chatml", policies=policies)
        return read_dataset(recipe, tokenizer, cache=Cache(tmp_path / "cache"))

    with pytest.raises(InputError) as fresh:
        read()
    read(on_bad_row="drop")
    assert len(built) == 2
    with pytest.raises(InputError) as cached:
        read(on_bad_row="error")
    assert len(built) == 2 and str(fresh.value) == str(cached.value)

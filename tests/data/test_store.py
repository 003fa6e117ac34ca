"""Stores give back the examples that were put in, from memory and from files; rows are views of them."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from welltuned.data import store as module
from welltuned.data.conversation import Kind
from welltuned.data.render import Example, Speaker
from welltuned.data.rows import Part, Rows, all_rows
from welltuned.data.store import ABOUT, TYPES, About, BadRow, StoreWriter, digest, kind_bit, open_store


def example(length, seed=0, origin="x.jsonl:1", trained=0.5, found=()):
    draw = np.random.default_rng((seed, length))
    mask = draw.random(length) < trained
    mask[:1] = False
    return Example(
        draw.integers(0, 50_000, length).astype(np.int32),
        mask,
        origin,
        roles=draw.integers(0, len(Speaker), length).astype(np.uint8),
        found=frozenset(found),
    )


def write(examples, folder=None, chunk=3, **facts):
    writer = StoreWriter(folder)
    for start in range(0, len(examples), chunk):
        part = examples[start : start + chunk]
        rows = [10 * (start + i) for i in range(len(part))]
        writer.add(part, rows, [digest(str(r).encode()) for r in rows])
    writer.close(**facts)
    return writer.store()


def same(ours, theirs):
    assert ours.ids.dtype == np.int32 and ours.mask.dtype == bool and ours.roles.dtype == np.uint8
    assert np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.mask, theirs.mask)
    assert np.array_equal(ours.roles, theirs.roles)
    assert (ours.origin, ours.found, ours.cut) == (theirs.origin, theirs.found, theirs.cut)
    return True


MIXED = [
    example(7, 1, "train.jsonl:1", found=[Kind.EMPTY_TURN, Kind.END_UNTRAINED]),
    example(1, 2, "train.jsonl:2", found=[Kind.UNTRAINED]),
    example(300, 3, "über/数据.jsonl:3"),
    example(12, 4, "train.jsonl:4", trained=0.0, found=[Kind.UNTRAINED]),
    example(12, 5, "train.jsonl:5", trained=1.0, found=list(Kind)),
]


@pytest.fixture(params=["memory", "folder", "files", "spilled"])
def make(request, tmp_path, monkeypatch):
    """A function that writes examples and opens them, in each of the ways that they can lie."""

    def make(examples, **facts):
        folder = None
        if request.param in ("folder", "files"):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
        if request.param in ("files", "spilled"):
            monkeypatch.setattr(module, "IN_MEMORY", 10)
        return write(examples, folder, **facts)

    return make


def test_what_was_put_in_comes_out(make):
    found = make(MIXED, format_name="messages", bad=(BadRow("train.jsonl:9", "null", "mend"),), bad_rows=1)
    assert len(found) == 5 and all(same(a, b) for a, b in zip(found, MIXED, strict=True))
    assert same(found[-1], MIXED[-1]) and [e.origin for e in found[1:3]] == [e.origin for e in MIXED[1:3]]
    with pytest.raises(IndexError):
        found[5]
    assert found[2].ids.flags.writeable  # torch warns of arrays that are not
    about = found.about
    assert (about.rows, about.tokens) == (5, 332) and about.bad == (BadRow("train.jsonl:9", "null", "mend"),)
    largest = max(MIXED, key=lambda e: int(e.ids.max()))
    assert (about.largest_id, about.largest_id_origin) == (int(largest.ids.max()), largest.origin)


def test_columns(make):
    found = make(MIXED)
    assert found.column("length").tolist() == [7, 1, 300, 12, 12]
    assert found.column("trained").tolist() == [int(e.mask.sum()) for e in MIXED]
    assert found.column("row").tolist() == [0, 10, 20, 30, 40]
    assert found.column("first")[[1, 3, 4]].tolist() == [-1, -1, 1]
    assert found.column("last")[[1, 3, 4]].tolist() == [-1, -1, 11]
    assert [bool(bits & kind_bit(Kind.EMPTY_TURN)) for bits in found.column("found")] == [
        True,
        False,
        False,
        False,
        True,
    ]
    assert len(set(found.column("digest").tolist())) == 5
    assert found.column("group").tobytes() == b"".join(digest(str(r).encode()) for r in (0, 10, 20, 30, 40))


def test_prompts_are_what_comes_before_the_first_trained_token(make):
    ids = np.arange(10, dtype=np.int32)

    def of(ids, first, origin):
        mask = np.zeros(len(ids), bool)
        mask[first:] = True
        return Example(ids, mask, origin)

    same_prompt = np.concatenate([ids[:4], ids[:3] + 50])
    rows = [of(ids, 4, "a"), of(same_prompt, 4, "b"), of(ids, 5, "c"), of(ids, 1, "d"), of(ids + 1, 1, "e")]
    prompts = make(rows).column("prompt")
    assert prompts[0] == prompts[1] != prompts[2] and prompts[3] == prompts[4] == 0  # a start token is no prompt
    assert make(rows).column("digest")[0] == make(rows).column("digest")[2]
    assert make([of(ids, 4, "a")])[0].roles.tolist() == [0] * 10


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    chosen=st.sets(st.integers(0, 29)),
    limit=st.none() | st.integers(1, 40),
)
def test_tally_counts_the_marks(lengths, chosen, limit):
    examples = [example(n, i) for i, n in enumerate(lengths)]
    rows = np.array(sorted(i for i in chosen if i < len(examples)), np.int64)
    expected = np.zeros(16, int)
    for index in rows:
        e = examples[index]
        for trained, role in list(zip(e.mask, e.roles, strict=True))[:limit]:
            expected[int(trained) + 2 * int(role)] += 1
    found = write(examples)
    at_a_time = module.TOKENS_AT_A_TIME, module.RECORDS_AT_A_TIME
    try:
        for module.TOKENS_AT_A_TIME, module.RECORDS_AT_A_TIME in (at_a_time, (30, 4)):
            assert found.tally(rows, limit).tolist() == expected.tolist()
            assert found.column("length").tolist() == lengths
    finally:
        module.TOKENS_AT_A_TIME, module.RECORDS_AT_A_TIME = at_a_time


def test_an_empty_store_and_empty_calls(tmp_path):
    writer = StoreWriter()
    writer.add([], [], [])
    writer.close()
    assert len(writer.store()) == 0 and writer.store().column("length").tolist() == []
    (tmp_path / "s").mkdir()
    writer = StoreWriter(tmp_path / "s")
    writer.close()
    assert len(open_store(tmp_path / "s")) == 0


def test_a_long_origin_is_shortened():
    assert len(write([example(3, origin="x" * 10**5)])[0].origin) == 2**16 - 1
    assert write([example(3, origin="é" * 10**5)])[0].origin.startswith("éé")


def test_an_example_without_tokens():
    nothing = Example(np.empty(0, np.int32), np.empty(0, bool), "x.jsonl:1", found=frozenset([Kind.UNTRAINED]))
    found = write([nothing, nothing, example(5), nothing], chunk=2)
    assert [len(e.ids) for e in found] == [0, 0, 5, 0] and found.tally(np.arange(4)).sum() == 5


# ── on disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_that_are_removed_meanwhile_can_still_be_read(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(module, "IN_MEMORY", 10)
    (tmp_path / "s").mkdir()
    found = write(MIXED, tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    assert all(same(a, b) for a, b in zip(found, MIXED, strict=True))


def test_a_spilled_store_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 10)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    found = write(MIXED)
    assert same(found[2], MIXED[2]) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*TYPES, ABOUT])
@pytest.mark.parametrize("how", ["shorter", "longer", "empty", "gone"])
def test_a_store_that_is_not_whole_is_refused(tmp_path, name, how):
    write(MIXED, tmp_path)
    path = tmp_path / name
    if how == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes({"shorter": data[: len(data) // 2], "longer": data + data, "empty": b""}[how])
    with pytest.raises((OSError, ValueError, KeyError, TypeError)):
        open_store(tmp_path)


def test_about_another_version_is_refused(tmp_path):
    write(MIXED, tmp_path)
    (tmp_path / ABOUT).write_text(json.dumps({**json.loads(About().to_json()), "new": 1}))
    with pytest.raises(TypeError):
        open_store(tmp_path)


def test_a_full_disk_is_one_sentence(tmp_path):
    from welltuned.errors import InputError

    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    writer = StoreWriter(tmp_path)
    writer._files["ids"].close()
    writer._files["ids"] = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(InputError, match="cannot be written"):
        for _ in range(100):
            writer.add([example(10_000)], [0], [digest(b"")])


# ── views ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_of_two_stores_in_order_and_cut():
    first, second = write(MIXED), write([replace(e, origin=f"other:{i}") for i, e in enumerate(MIXED)])
    rows = Rows((Part(first, np.array([0, 2])), Part(second, np.array([1, 2, 4]))))
    origins = ["train.jsonl:1", "über/数据.jsonl:3", "other:1", "other:2", "other:4"]
    assert [e.origin for e in rows] == origins == [rows.origin(i) for i in range(5)]
    assert rows[-1].origin == "other:4" and len(rows) == 5 and rows.sizes() == [2, 3]
    assert rows.owner().tolist() == [0, 0, 1, 1, 1]
    assert [e.origin for e in rows[1:4]] == origins[1:4] and rows[::2].origin(1) == "other:1"
    assert rows.column("length").tolist() == [7, 300, 1, 300, 12]
    short = rows.within(10)
    assert [len(e.ids) for e in short] == [7, 10, 1, 10, 10] and [e.cut for e in short] == [
        False,
        True,
        False,
        True,
        True,
    ]
    assert short.column("length").tolist() == [7, 300, 1, 300, 12]
    kept = rows.where(rows.column("length") > 100)
    assert [e.origin for e in kept] == [origins[1], origins[3]] and kept.sizes() == [1, 1]
    assert int(short.tally().sum()) == 38 and len(all_rows([first, second])) == 10
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            rows[wrong]
    with pytest.raises(ValueError):
        rows[::-1]


def test_a_part_without_rows_stays():
    rows = all_rows([write(MIXED), write(MIXED)])
    none = np.zeros(10, bool)
    none[:5] = True
    assert rows.where(none).sizes() == [5, 0] and len(rows.where(none & False)) == 0
    assert rows.where(none)[4].origin == "train.jsonl:5"

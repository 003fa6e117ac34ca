import bz2
import gzip
import io
import json
import lzma
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from welltuned.data import source as source_module
from welltuned.data.source import open_source, read_rows
from welltuned.errors import InputError


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def test_jsonl_with_bom_blank_lines_and_crlf(tmp_path):
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "\xc3\xa9\xe2\x80\xa8"}')
    rows = read_rows(path)
    assert [r.record for r in rows] == [{"a": 1}, {"a": "é\u2028"}]
    assert [r.origin for r in rows] == [f"{path}:1", f"{path}:3"]


def test_json_list_and_object_with_one_list(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1},\n {"a": 2}]')
    assert [(r.record["a"], r.origin) for r in read_rows(path)] == [(1, f"{path}[0]"), (2, f"{path}[1]")]
    path = write(tmp_path, "b.json", '\ufeff{"version": 1, "data": [{"a": 1}]}')
    assert [(r.record["a"], r.origin) for r in read_rows(path)] == [(1, f"{path}.data[0]")]


def test_json_lines_under_a_json_name(tmp_path):
    path = write(tmp_path, "a.json", '{"a": 1}\n{"a": 2}\n')
    assert [r.origin for r in read_rows(path)] == [f"{path}:1", f"{path}:2"]


def test_csv_origin_is_the_line_where_the_record_begins(tmp_path):
    path = write(tmp_path, "a.csv", '\ufeffquestion,answer\n"two\nlines",x\n\ny,"a ""b"""\n')
    rows = read_rows(path)
    assert [r.record for r in rows] == [
        {"question": "two\nlines", "answer": "x"},
        {"question": "y", "answer": 'a "b"'},
    ]
    assert [r.origin for r in rows] == [f"{path}:2", f"{path}:5"]


def test_tsv_and_long_fields(tmp_path):
    path = write(tmp_path, "a.tsv", f"a\tb\n1,5\t{'x' * 200_000}\n")
    assert read_rows(path)[0].record == {"a": "1,5", "b": "x" * 200_000}


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"a": [1, 2]}), path)
    assert [(r.record, r.origin) for r in read_rows(path)] == [
        ({"a": 1}, f"{path} row 1"),
        ({"a": 2}, f"{path} row 2"),
    ]


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"a": "1"}'),
        ("a.ndjson", '{"a": "1"}'),
        ("a.csv", "a\n1"),
        ("a.tsv", "a\n1"),
        ("a.json", '[{"a":"1"}]'),
    ],
)
def test_text_files_may_be_compressed(tmp_path, name, text, suffix):
    path = write(tmp_path, name + suffix, PACKED[suffix](text.encode()))
    assert [r.record for r in read_rows(path)] == [{"a": "1"}]


def test_zstandard(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = str(tmp_path / "a.jsonl.zst")
    with pyarrow.output_stream(path, compression="zstd") as out:
        out.write(b'{"a": 1}\n{"a": 2}\n')
    assert [r.origin for r in read_rows(path)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_file_and_stream_in_several_batches(tmp_path, stream):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"a": range(2500), "b": [{"c": [str(i)]} for i in range(2500)]})
    path = str(tmp_path / "a.arrow")
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(path, "wb") as out, new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1100)
    rows = read_rows(path)
    assert [r.record for r in rows] == table.to_pylist()
    assert rows[2400].origin == f"{path} row 2401"


def test_parquet_in_row_groups(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"a": range(3000)}), path, row_group_size=1300)
    rows = read_rows(path)
    assert [r.record["a"] for r in rows] == list(range(3000))
    assert [r.origin for r in rows] == [f"{path} row {n}" for n in range(1, 3001)]


def test_json_texts_within_parquet_are_values(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kind = pyarrow.json_()  # what `datasets` makes of a column whose rows have different types
    one = pyarrow.array(['{"x": 1}', None], kind)
    many = pyarrow.ListArray.from_arrays([0, 2, 2], pyarrow.array(["[1]", '"s"'], kind))
    within = pyarrow.StructArray.from_arrays([one, pyarrow.array([1, 2])], ["j", "n"])
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"one": one, "many": many, "within": within}), path)
    assert [r.record for r in read_rows(path)] == [
        {"one": {"x": 1}, "many": [[1], "s"], "within": {"j": {"x": 1}, "n": 1}},
        {"one": None, "many": [], "within": {"j": None, "n": 2}},
    ]


def test_lines_that_end_in_carriage_returns(tmp_path):
    path = write(tmp_path, "a.csv", 'a,b\r1,"2\r3"\r4,5\r')
    assert [(r.record["b"], r.origin) for r in read_rows(path)] == [("2\r3", f"{path}:2"), ("5", f"{path}:4")]
    path = write(tmp_path, "b.csv", 'a,b\r\n1,"2\r3"\r\n4,5\r\n')  # a return within a field is no line end
    assert [(r.record["b"], r.origin) for r in read_rows(path)] == [("2\r3", f"{path}:2"), ("5", f"{path}:3")]


def test_the_csv_module_keeps_its_limit(tmp_path):
    import csv

    before = csv.field_size_limit()
    rows = open_source(write(tmp_path, "a.csv", f"a,b\n1,{'x' * 200_000}\n2,3\n")).rows()
    next(rows)
    assert csv.field_size_limit() == before


def test_a_source_is_read_as_often_as_needed(tmp_path):
    source = open_source(write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2}\n'))
    first, second = source.rows(), source.rows()
    assert [next(first).record["a"], next(second).record["a"], next(first).record["a"]] == [1, 1, 2]
    assert (source.size, source.note, source.skipped) == (18, None, ())


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path):
    rows = open_source(write(tmp_path, "a.jsonl", '{"a": 1}\n' * 100_000 + "{\n")).rows()
    assert sum(1 for _, _ in zip(range(100_000), rows, strict=False)) == 100_000
    with pytest.raises(InputError, match=r"a\.jsonl:100001: malformed JSON"):
        next(rows)


def test_memory_is_bounded_by_a_line(tmp_path):
    import tracemalloc

    path = tmp_path / "a.jsonl"
    path.write_bytes((json.dumps({"a": "x" * 1000}).encode() + b"\n") * 30_000)  # 30 MB
    source = open_source(str(path))
    tracemalloc.start()
    assert sum(1 for _ in source.rows()) == 30_000
    source.fingerprint()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def test_the_fingerprint_is_of_the_content(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n')
    first = open_source(path)
    assert first.fingerprint() == first.fingerprint() == open_source(path).fingerprint()
    write(tmp_path, "a.jsonl", '{"a": 2}\n')
    assert open_source(path).fingerprint() != first.fingerprint()
    assert first.fingerprint() == first.fingerprint()  # of what it was when it was read: it is read once
    other = write(tmp_path, "b.jsonl", '{"a": 2}\n')
    assert open_source(other).fingerprint() == open_source(path).fingerprint()
    other = write(tmp_path, "b.json", '{"a": 2}\n')  # the same bytes, but other rows
    assert open_source(other).fingerprint() != open_source(path).fingerprint()


def test_a_file_that_changes_is_not_read_on(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n' * 3)
    source = open_source(path)
    rows = source.rows()
    next(rows)
    with open(path, "a") as file:
        file.write('{"a": 4}\n')
    with pytest.raises(InputError, match="the file changed while it was read"):
        list(rows)
    with pytest.raises(InputError, match="the file changed while it was read"):
        source.fingerprint()


class Pipe(io.BytesIO):
    @property
    def buffer(self):
        return self


@pytest.mark.parametrize(
    ("data", "origins"),
    [
        ('{"a": 1}\n\n{"a": 2}\n', ["stdin:1", "stdin:3"]),
        ('{"messages": [{"role": "user"}]}', ["stdin:1"]),
        ('[{"a": 1}, {"a": 2}]', ["stdin[0]", "stdin[1]"]),
        ('{\n"data": [{"a": 1}]}', ["stdin.data[0]"]),
        ('prompt,completion\n"a\nb",c\nd,e\n', ["stdin:2", "stdin:4"]),
        ("prompt\tcompletion\na\tb\n", ["stdin:2"]),
        (gzip.compress(b'{"a": 1}\n{"a": 2}', mtime=0), ["stdin:1", "stdin:2"]),
    ],
)
def test_stdin_is_recognised_by_its_content(monkeypatch, data, origins):
    monkeypatch.setattr(sys, "stdin", Pipe(data.encode() if isinstance(data, str) else data))
    source = open_source("-")
    assert source.name == "stdin"
    assert [r.origin for r in source.rows()] == [r.origin for r in source.rows()] == origins
    assert source.fingerprint()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columnar_stdin(monkeypatch, tmp_path, suffix):
    pyarrow = pytest.importorskip("pyarrow")
    parquet, feather = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.feather")
    path = tmp_path / f"a.{suffix}"
    table = pyarrow.table({"a": [1, 2]})
    (parquet.write_table if suffix == "parquet" else feather.write_feather)(table, str(path))
    monkeypatch.setattr(sys, "stdin", Pipe(path.read_bytes()))
    assert [r.origin for r in read_rows("-")] == ["stdin row 1", "stdin row 2"]


def test_the_temporary_file_goes_with_its_source(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Pipe(b'{"a": 1}'))
    source = open_source("-")
    (file,) = source.files
    assert file.path.exists()
    del source
    assert not file.path.exists()


def test_a_named_pipe_is_read_once_and_kept(tmp_path):
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    write = partial(Path(path).write_bytes, b'{"a": 1}\n{"a": 2}\n')
    threading.Thread(target=write, daemon=True).start()
    source = open_source(path)
    assert [r.origin for r in source.rows()] == [r.origin for r in source.rows()] == [f"{path}:1", f"{path}:2"]


def test_process_substitution(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b'[{"a": 1}]')
    os.close(writing)
    path = f"/dev/fd/{reading}"
    if not os.path.exists(path):
        pytest.skip("this system has no /dev/fd")
    assert [r.origin for r in read_rows(path)] == [f"{path}[0]"]
    os.close(reading)


def test_a_large_json_file_is_said_to_be_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "LARGE_JSON", 5)
    path = write(tmp_path, "a.json", '[{"a": 1}]')
    assert open_source(path).note == f"{path} (0.0 GiB) is read whole into memory; JSON Lines would be streamed."
    assert open_source(str(tmp_path)).note is not None
    assert open_source(write(tmp_path, "a.jsonl", '{"a": 1}')).note is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.dictionaries(st.text(), VALUES, max_size=4), min_size=1, max_size=6),
    escaped=st.booleans(),
    indent=st.sampled_from([None, 2]),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".json.xz"]),
)
def test_what_json_writes_is_read_back(tmp_path, records, escaped, indent, suffix):
    if ".jsonl" in suffix:
        text = "".join(json.dumps(record, ensure_ascii=escaped) + "\n" for record in records)
    else:
        text = json.dumps(records, ensure_ascii=escaped, indent=indent)
    pack = PACKED["." + suffix.split(".")[2] if suffix.count(".") == 2 else ""]
    path = write(tmp_path, "a" + suffix, pack(text.encode()))
    assert [row.record for row in read_rows(path)] == records


def test_json_is_read_as_fast_as_the_standard_library_does(tmp_path):
    """A guard against a slow path by accident, with room for a busy machine; measured: 1.0 to 1.4 times json.loads."""
    chat = {"messages": [{"role": "user", "content": "why? " * 50}, {"role": "assistant", "content": "so.\n" * 60}]}
    path = write(tmp_path, "a.jsonl", (json.dumps(chat) + "\n") * 20_000)

    def seconds(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def plain():
        with open(path, "rb") as lines:
            return [json.loads(line) and None for line in lines]

    source = open_source(path)
    ours = min(seconds(lambda: [None for _ in source.rows()]) for _ in range(3))
    assert ours < 4 * min(seconds(plain) for _ in range(3))

import gzip
import json

import pytest

from welltuned.data.source import read_rows
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


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl.gz", '{"a": "1"}'), ("a.csv.gz", "a\n1"), ("a.json.gz", '[{"a": "1"}]')]
)
def test_compressed(tmp_path, name, text):
    path = write(tmp_path, name, gzip.compress(text.encode()))
    assert [r.record for r in read_rows(path)] == [{"a": "1"}]


BAD = [
    ("a.jsonl", "", "", "the file is empty"),
    ("a.jsonl", "\n \n", "", "has no rows"),
    ("a.jsonl", '{"a": 1}\n{"a": \n', ":2", "malformed JSON at column"),
    ("a.jsonl", '{"a": 1}\n\n[1]\n', ":3", "the row is a list, not an object"),
    ("a.jsonl", "null", ":1", "the row is null"),
    ("a.jsonl", '"text"', ":1", "the row is a string"),
    ("a.jsonl", "[\n", ":1", "a list over several lines belongs in a .json file"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ":2", "invalid UTF-8 (byte 0xff)"),
    ("a.jsonl", '{"a": 1}'.encode("utf-16"), ":1", "UTF-16"),
    ("a.jsonl", "[" * 100_000, ":1", "malformed JSON"),
    ("a.json", '[{"a": 1},\n{"a" 2}]', ":2", "malformed JSON"),
    ("a.json", "[]", "", "has no rows"),
    ("a.json", "[1]", "[0]", "the row is a number"),
    ("a.json", "3", "", "neither a list nor an object"),
    ("a.json", '{"a": [], "b": []}', "", "holds 2 lists"),
    ("a.json", '{"a": 1}', "", "holds no list"),
    ("a.json", b'[\n{"a": "\xc3"}]', ":2", "invalid UTF-8"),
    ("a.csv", "question,answer\n", "", "a header and no rows"),
    ("a.csv", "question,answer\na,b\n1,2,3\n", ":3", "3 fields, and the header has 2"),
    ("a.csv", "question,question\na,b\n", ":1", "appears twice"),
    ("a.csv", "question,\na,b\n", ":1", "a column has no name"),
    ("a.csv", 'a,b\n"x,y\n', ":2", "malformed CSV"),
    ("a.csv", b"a,b\nx,\xe9\n", ":2", "invalid UTF-8"),
    ("a.parquet", "PAR1 no", "", "not readable Parquet"),
    ("a.jsonl.gz", "not gzip", "", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}')[:-9], "", "cannot be read"),
    ("a.txt", "text", "", "the format is not known"),
    ("a.parquet.gz", "x", "", "the format is not known"),
]


@pytest.mark.parametrize(("name", "data", "place", "message"), BAD)
def test_bad_input_is_one_sentence_with_its_place(tmp_path, name, data, place, message):
    path = write(tmp_path, name, data)
    with pytest.raises(InputError) as raised:
        read_rows(path)
    assert str(raised.value).startswith(f"{path}{place}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_empty_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"a": []}), path)
    with pytest.raises(InputError, match="no rows"):
        read_rows(path)


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(InputError, match="did you mean train.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(InputError, match="does not exist either"):
        read_rows(str(tmp_path / "nowhere" / "train.jsonl"))


def test_folder_and_needless_options(tmp_path):
    with pytest.raises(InputError, match="this is a folder"):
        read_rows(str(tmp_path))
    path = write(tmp_path, "a.jsonl", json.dumps({"a": 1}))
    with pytest.raises(InputError, match="`split` belongs to hub datasets"):
        read_rows(path, split="train")


def test_hub_rows_and_failures(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(spec, name, split):
        calls.append((spec, name, split))
        if name == "missing":
            raise ValueError("BuilderConfig 'missing' not found.\nAvailable: ...")
        return [{"a": 1}, {"a": 2}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [r.origin for r in read_rows("openai/gsm8k", "main")] == [
        "openai/gsm8k/main:train row 1",
        "openai/gsm8k/main:train row 2",
    ]
    with pytest.raises(InputError, match="BuilderConfig 'missing' not found"):
        read_rows("openai/gsm8k", "missing", "test")
    assert calls == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "missing", "test")]

"""Every way in which a file can be wrong gives one sentence with the file, and the line where there is one."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import zipfile
from pathlib import Path

import pytest

from welltuned.data import readers
from welltuned.data.source import open_source, read_rows
from welltuned.errors import InputError


def zipped():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", '{"a": 1}\n')
    return out.getvalue()


GOOD = '{"a": 1}\n'
LATE = 100_000  # good rows before the bad one
BAD = [
    # JSON Lines: what a line is
    ("a.jsonl", "", "", "the file is empty"),
    ("a.jsonl", "\n \n", "", "has no rows"),
    ("a.jsonl", b"\xef\xbb\xbf", "", "has no rows"),
    ("a.jsonl", '{"a": 1}\n\n[1]\n', ":3", "the row is a list, not an object"),
    ("a.jsonl", '[{"a": 1}, {"a": 2}]\n', ":1", "a file that is one list is called .json"),
    ("a.jsonl", "null", ":1", "the row is null"),
    ("a.jsonl", '"text"', ":1", "the row is a string"),
    ("a.jsonl", GOOD + "3\n", ":2", "the row is a number"),
    ("a.jsonl", "true\n", ":1", "the row is a boolean"),
    ("a.jsonl", "[\n", ":1", "a list over several lines belongs in a .json file"),
    # JSON Lines: syntax
    ("a.jsonl", '{"a": 1}\n{"a": \n', ":2", "malformed JSON at column 6"),
    ("a.jsonl", GOOD + '{"a": "tex', ":2", "the file may have been cut off"),
    ("a.jsonl", GOOD + GOOD.strip() + GOOD, ":2", "malformed JSON at column 9 (Extra data)"),
    ("a.jsonl", "{'a': 1}\n", ":1", "malformed JSON at column 2"),
    ("a.jsonl", '{"a": 1,}\n', ":1", "malformed JSON"),
    ("a.jsonl", '{"a": "tab\there"}\n', ":1", "Invalid control character"),
    ("a.jsonl", '{"a": "\\x"}\n', ":1", "escape"),
    ("a.jsonl", '{\n  "a": 1\n}\n', ":1", "each line must be one JSON object"),
    ("a.jsonl", GOOD * LATE + "{\n" + GOOD, f":{LATE + 1}", "malformed JSON"),
    ("a.jsonl", "[" * 100_000, ":1", "malformed JSON (nested too deeply)"),
    ("a.jsonl", '{"a":' * 100_000, ":1", "malformed JSON (nested too deeply)"),
    # JSON Lines: what Python's parser lets pass
    ("a.jsonl", GOOD + '{"a": 1, "b": 2, "a": 3}\n', ":2", "the key `a` is given twice in one object"),
    ("a.jsonl", '{"m": [{"role": "user", "role": "user"}]}\n', ":1", "the key `role` is given twice"),
    ("a.jsonl", '{"a": NaN}\n', ":1", "NaN is no JSON number"),
    ("a.jsonl", '{"a": [-Infinity]}\n', ":1", "-Infinity is no JSON number"),
    ("a.jsonl", '{"a": 1e999}\n', ":1", "the number 1e999 is too large"),
    ("a.jsonl", '{"a": ' + "9" * 5000 + "}\n", ":1", "a number has more than 4300 digits"),
    ("a.jsonl", GOOD + '{"a": "\\ud800"}\n', ":2", "half of a surrogate pair (\\ud800) stands alone"),
    ("a.jsonl", '{"a": ["x", "\\uDFFF!"]}\n', ":1", "half of a surrogate pair (\\udfff)"),
    ("a.jsonl", '{"\\ud83d": 1}\n', ":1", "half of a surrogate pair (\\ud83d)"),
    # encodings
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ":2", "invalid UTF-8 (byte 0xff)"),
    ("a.jsonl", GOOD.encode() * LATE + b'{"a": "\xe9"}\n', f":{LATE + 1}", "invalid UTF-8 (byte 0xe9)"),
    ("a.jsonl", b'{"a": "\xed\xa0\x80"}\n', ":1", "invalid UTF-8"),  # a surrogate half as bytes
    ("a.jsonl", '{"a": 1}'.encode("utf-16"), ":1", "the file is UTF-16"),
    ("a.jsonl", b"\xfe\xff" + '{"a": 1}'.encode("utf-16-be"), ":1", "the file is UTF-16"),
    ("a.jsonl", '{"a": 1}'.encode("utf-16-le"), ":1", "NUL bytes"),
    ("a.jsonl", GOOD.encode() + b"\0" * 100, ":2", "the line holds NUL bytes"),
    ("a.jsonl", b'{"a": "x\0y"}\n', ":1", "the line holds NUL bytes"),
    # JSON
    ("a.json", '[{"a": 1},\n{"a" 2}]', ":2", "malformed JSON at column 6"),
    ("a.json", '[{"a": 1},\n {"a": 2}\n', ":2", "malformed JSON at column 10"),
    ("a.json", '[{"a": 1}\n{"a": 2}]', ":2", "Expecting ',' delimiter"),
    ("a.json", '[{"a": 1},]', ":1", "malformed JSON"),
    ("a.json", '[{"a": 1}]\n[2]', ":2", "Extra data"),
    ("a.json", "[", ":1", "malformed JSON"),
    ("a.json", " \n", ":1", "malformed JSON"),
    ("a.json", "[]", "", "has no rows"),
    ("a.json", '{"data": []}', "", "has no rows"),
    ("a.json", "[1]", "[0]", "the row is a number"),
    ("a.json", '[{"a": 1}, null]', "[1]", "the row is null"),
    ("a.json", '{"data": [{"a": 1}, "x"]}', ".data[1]", "the row is a string"),
    ("a.json", "3", "", "neither a list nor an object"),
    ("a.json", '{"a": [], "b": []}', "", "holds 2 lists"),
    ("a.json", '{"a": 1}', "", "holds no list"),
    ("a.json", b'[\n{"a": "\xc3"}]', ":2", "invalid UTF-8"),
    ("a.json", b'[\n{"a": "\0"}]', ":2", "NUL bytes"),
    ("a.json", '[{"a": 1}]'.encode("utf-16"), ":1", "UTF-16"),
    ("a.json", '[{"a": 1}, {"a": 1, "a": 2}]', "[1]", "the key `a` is given twice"),
    ("a.json", '{"data": [], "data": [{}]}', "", "the key `data` is given twice"),
    ("a.json", '[{"a": NaN}]', "[0]", "NaN is no JSON number"),
    ("a.json", "[" * 100_000, "[0]", "nested too deeply"),
    ("a.json", GOOD + GOOD + '{"a"\n', ":3", "malformed JSON"),  # JSON Lines under a .json name
    ("a.json", '{"a": 1, "a": 1}\n' + GOOD, ":1", "the key `a` is given twice"),
    # CSV
    ("a.csv", "question,answer\n", "", "a header and no rows"),
    ("a.csv", "question,answer\n\n\n", "", "a header and no rows"),
    ("a.csv", "\n\na,b\n", ":1", "a column has no name"),
    ("a.csv", "question,answer\na,b\n1,2,3\n", ":3", "3 fields, and the header has 2"),
    ("a.csv", "question,answer\na,b\n1\n", ":3", "1 fields, and the header has 2"),
    ("a.csv", "a,b\n" + "1,2\n" * LATE + "1\n", f":{LATE + 2}", "1 fields"),
    ("a.csv", "question,question\na,b\n", ":1", "the column `question` appears twice"),
    ("a.csv", "question,\na,b\n", ":1", "a column has no name"),
    ("a.csv", "question, \na,b\n", ":1", "a column has no name"),
    ("a.csv", 'a,b\n1,2\n"x,y\n3,4\n', ":3", "a quote that is opened in the record of this line is not closed"),
    ("a.csv", 'a,b\n"x"y,2\n', ":2", "malformed CSV"),
    ("a.csv", b"a,b\nx,\xe9\n", ":2", "invalid UTF-8"),
    ("a.csv", "a,b\nx,\0\n", ":2", "NUL bytes"),
    ("a.csv", "a,b\nx,y\n".encode("utf-16"), ":1", "UTF-16"),
    ("a.csv", "question;answer\na;b\n", ":1", "the columns seem to be separated by `;`"),
    ("a.csv", "question\tanswer\na\tb\n", ":1", "separated by tabs; call it .tsv"),
    ("a.csv", "question|answer\na|b\n", ":1", "separated by `|`"),
    ("a.tsv", "question,answer\na,b\n", ":1", "separated by `,`; call it .csv"),
    # Parquet and Arrow
    ("a.parquet", "PAR1 no", "", "not readable Parquet"),
    ("a.parquet", GOOD, "", "its content is JSON Lines; call it by the suffix of JSON Lines"),
    ("a.parquet", "some words", "", "its name says Parquet, and its content is not"),
    ("a.arrow", "ARROW1 no", "", "not readable Arrow"),
    ("a.arrow", "some words", "", "not readable Arrow"),
    # compression
    ("a.jsonl.gz", GOOD, "", "cannot be read: its name says gzip, and its content is JSON Lines"),
    ("a.jsonl.gz", "not gzip", "", "cannot be read: its name says gzip, and its content is not"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-9], ":2", "cannot be read from here on"),
    ("a.jsonl.gz", gzip.compress(os.urandom(9000).hex().encode())[:-3000], ":1", "cannot be read from here on"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode()) + b"rest", ":2", "cannot be read from here on"),
    ("a.json.gz", gzip.compress(b'[{"a": 1}]')[:-9], "", "cannot be read"),
    ("a.jsonl.bz2", bz2.compress(GOOD.encode())[:-4], ":2", "cannot be read from here on"),
    ("a.jsonl.xz", lzma.compress(GOOD.encode())[:-4], ":2", "cannot be read from here on"),
    ("a.csv.gz", gzip.compress(b"a,b\n1,2\n1\n"), ":3", "1 fields"),
    ("a.jsonl.gz", gzip.compress(b""), "", "has no rows"),
    ("a.jsonl", gzip.compress(GOOD.encode()), "", "its content is gzip; call it a.jsonl.gz"),
    ("a.jsonl", zipped(), "", "its content is a zip archive; unpack it first"),
    ("a.jsonl", "PAR1....", "", "its content is Parquet"),
    ("a.csv", b"%PDF-1.7", "", "its content is PDF"),
    # names
    ("a.txt", "text", "", "the format is not known"),
    ("a.zip", zipped(), "", "the format is not known from the file's name; unpack it"),
    ("a.xlsx", zipped(), "", "save the sheet as CSV"),
    ("a", GOOD, "", "its content looks like JSON Lines: call it a.jsonl"),
    ("train.data", "a,b\n1,2\n", "", "its content looks like CSV: call it train.data.csv"),
    ("a.bin", b"\x00\x01", "", "use .jsonl, .ndjson, .json"),
    ("a.parquet.gz", "x", "", "the format is not known"),
    ("a.gz", gzip.compress(GOOD.encode()), "", "the format is not known"),
]


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def sentence(work):
    with pytest.raises(InputError) as raised:
        work()
    text = str(raised.value)
    assert "\n" not in text and len(text) < 600
    return text


@pytest.mark.parametrize(("name", "data", "place", "message"), BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_one_sentence_with_its_place(tmp_path, name, data, place, message):
    path = write(tmp_path, name, data)
    found = sentence(lambda: read_rows(path))
    assert found.startswith(f"{path}{place}: ")
    assert message in found


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "\\ud83d\\ude00"}',  # a whole pair
        '{"a": "\\\\ud800"}',  # an escaped backslash, then letters
        '{"a": "\\ud55c"}',  # Hangul
        '{"a": "{\\"b\\": 1, \\"b\\": 2}"}',  # keys in a string are none
        '{"a": [{"b": 1}, {"b": 2}], "b": 3}',
        '{"a": "\\u0000"}',  # a character that other checks judge
        '{"a": 12345678901234567890123}',
        '  {"a": 1.5e300}  ',
        '{"a": ' + "[" * 400 + "]" * 400 + "}",
        json.dumps({"a": "x" * 10**6}),
    ],
)
def test_what_only_looks_wrong_is_read(tmp_path, text):
    assert [r.record for r in read_rows(write(tmp_path, "a.jsonl", text + "\n"))] == [json.loads(text)]


def test_a_line_of_100_megabytes(tmp_path):
    path = write(tmp_path, "a.jsonl", b'{"a": "' + b"x" * 10**8 + b'"}\n' + GOOD.encode())
    assert [len(str(r.record["a"])) for r in open_source(path).rows()] == [10**8, 1]


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    path = write(tmp_path, "a.jsonl", GOOD + '{"a": "' + "x" * 2000)
    assert sentence(lambda: read_rows(path)).startswith(f"{path}:2: the line is longer than 1,000 bytes")


def test_a_quote_that_is_never_closed_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_CSV_FIELD", 1000)
    path = write(tmp_path, "a.csv", 'a,b\n1,"2\n' + "3,4\n" * 1000)
    assert sentence(lambda: read_rows(path)).startswith(f"{path}:2: malformed CSV (a quote that is opened")


def test_columnar_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"a": ["x" * 100] * 1000}), path)
    whole = Path(path).read_bytes()
    write(tmp_path, "a.parquet", whole[:-50])
    assert sentence(lambda: read_rows(path)).startswith(f"{path}: the file is not readable Parquet (")
    write(tmp_path, "a.parquet", whole[:100] + b"\0" * 100 + whole[200:])
    assert sentence(lambda: read_rows(path)).startswith(f"{path}: the file is not readable Parquet (")
    parquet.write_table(pyarrow.table({"a": []}), path)
    assert sentence(lambda: read_rows(path)) == f"{path}: the dataset has no rows"
    twice = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["a", "a"])
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pyarrow.ipc.new_file(out, twice.schema) as writer:
        writer.write_table(twice)
    assert "the column `a` appears twice" in sentence(lambda: read_rows(str(tmp_path / "a.arrow")))


def test_a_columnar_row_that_is_no_text_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.array([b"good"] * 1500 + [b"\xff"] + [b"good"] * 10).view(pyarrow.string())
    path = str(tmp_path / "a.arrow")
    with pyarrow.OSFile(path, "wb") as out:
        table = pyarrow.table({"a": bad})
        with pyarrow.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    assert sentence(lambda: read_rows(path)) == f"{path} row 1501: invalid UTF-8"
    json_text = pyarrow.array(['{"a": 1}', '{"a": 1, "a": 2}']).cast(pyarrow.json_())
    with pyarrow.OSFile(path, "wb") as out:
        table = pyarrow.table({"a": json_text})
        with pyarrow.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    assert sentence(lambda: read_rows(path)).startswith(f"{path} row 2: not readable (the key `a` is given twice")


def test_truncated_arrow_names_the_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = str(tmp_path / "a.arrow")
    table = pyarrow.table({"a": ["x" * 100] * 3000})
    with pyarrow.OSFile(path, "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    write(tmp_path, "a.arrow", Path(path).read_bytes()[:-50_000])
    assert sentence(lambda: read_rows(path)).startswith(f"{path} row 2001: the file is not readable Arrow (")


def test_truncated_zstandard(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = str(tmp_path / "a.jsonl.zst")
    with pyarrow.output_stream(path, compression="zstd") as out:
        out.write(GOOD.encode() * 1000)
    write(tmp_path, "a.jsonl.zst", Path(path).read_bytes()[:-5])
    assert "cannot be read from here on (truncated" in sentence(lambda: read_rows(path)).lower()


@pytest.mark.parametrize("package", ["a.parquet", "a.jsonl.zst"])
def test_without_pyarrow(tmp_path, monkeypatch, package):
    data = b"PAR1" if package == "a.parquet" else b"\x28\xb5\x2f\xfd"
    path = write(tmp_path, package, data)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs the `pyarrow` package; pip install pyarrow" in sentence(lambda: read_rows(path))


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(InputError, match="there is no such file; did you mean train.jsonl"):
        open_source(str(tmp_path / "trian.jsonl"))
    with pytest.raises(InputError, match="does not exist either"):
        open_source(str(tmp_path / "nowhere" / "train.jsonl"))


def test_broken_link(tmp_path):
    link = tmp_path / "a.jsonl"
    link.symlink_to(tmp_path / "gone.jsonl")
    assert "gone.jsonl, which does not exist" in sentence(lambda: open_source(str(link)))
    assert "gone.jsonl, which does not exist" in sentence(lambda: open_source(str(tmp_path)))


@pytest.fixture
def nobody():
    """Reading as a user who may not: root may read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_no_permission(tmp_path, request):
    folder = tmp_path / "closed"
    folder.mkdir()
    path = write(folder, "a.jsonl", GOOD)
    os.chmod(path, 0)
    folder.chmod(0)
    request.getfixturevalue("nobody")
    for spec in (path, str(folder)):
        found = sentence(lambda spec=spec: open_source(spec))
        assert found.startswith(f"{spec}: ") and "permission denied" in found


def test_only_the_file_is_closed(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", GOOD)
    source = open_source(path)
    os.unlink(path)
    assert sentence(lambda: list(source.rows())).startswith(f"{path}: there is no such file")
    assert sentence(source.fingerprint).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the input is empty"),
        (b"hello world\n", "the input's format is not recognised"),
        (b"one, two and three\nfour\n", "the input's format is not recognised"),
        (b"\x00\x01\x02", "the input's format is not recognised"),
        (zipped(), "the input's format is not recognised"),
        (gzip.compress(b"hello", mtime=0)[:12], "cannot be read"),
        (b'{"a": 1}\n{"a"\n', "stdin:2: malformed JSON"),
    ],
)
def test_stdin(monkeypatch, data, message):
    class Pipe(io.BytesIO):
        @property
        def buffer(self):
            return self

    monkeypatch.setattr(sys, "stdin", Pipe(data))
    found = sentence(lambda: read_rows("-"))
    assert found.startswith("stdin") and message in found


def test_a_terminal_is_no_data(monkeypatch):
    class Terminal(io.BytesIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "nothing is piped into stdin" in sentence(lambda: read_rows("-"))


@pytest.mark.parametrize("spec", ["x" * 300, '{"messages": "hi"}\n', "no\nfile", "data/*.jsonl", "no[1].jsonl"])
def test_what_is_no_name_at_all(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence(lambda: open_source(spec))

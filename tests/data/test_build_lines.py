"""Lines that cannot be read at all are bad rows like any other: an error, or left out and counted."""

import json

import pytest

from welltuned.data.build import Reading, read_store
from welltuned.data.conversation import Policy
from welltuned.data.source import open_source
from welltuned.errors import InputError

GOOD = '{"prompt": "a hat", "completion": "red"}'


def store_of(path, tokenizer, policy):
    return read_store(open_source(str(path)), tokenizer, Reading(), policy)


@pytest.mark.parametrize("bad", ['{"prompt": ', "[1]", '{"prompt": NaN}', '"\\ud800"', "\x00"], ids=repr)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_broken_line_is_dropped_and_counted(tmp_path, tiny_tokenizer, bad, place):
    path = tmp_path / "rows.jsonl"
    lines = [GOOD, GOOD.replace("hat", "cup")]
    lines.insert(place, bad)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as error:
        store_of(path, tiny_tokenizer, Policy.ERROR)
    store = store_of(path, tiny_tokenizer, Policy.DROP)
    assert len(store) == 2
    assert store.about.bad_rows == 1
    assert [row.origin for row in store.about.bad] == [error.value.where] == [f"{path}:{place + 1}"]
    assert store.about.bad[0].what == error.value.what


def test_a_ragged_csv_row_is_dropped_and_counted(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b\nc\nd,e\n")
    store = store_of(path, tiny_tokenizer, Policy.DROP)
    assert (len(store), [row.origin for row in store.about.bad]) == (2, [f"{path}:3"])


def test_a_file_of_nothing_but_broken_lines(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps([1]) + "\n{\n")
    with pytest.raises(InputError, match="no row can be read"):
        store_of(path, tiny_tokenizer, Policy.DROP)


def test_the_rows_are_counted_as_they_are_rendered(tiny_tokenizer, tmp_path):
    path = tmp_path / "many.jsonl"
    row = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n'
    path.write_text(row * 1_200)
    told = []
    read_store(open_source(str(path)), tiny_tokenizer, Reading(), progress=lambda name, rows: told.append(rows))
    assert told[-1] == 1_200 and len(told) > 1 and told == sorted(told)

"""Folders and patterns: which files are read, in which order, of which split, and what is said about the others."""

import json
import os

import pytest

from welltuned.data.source import open_source, read_rows
from welltuned.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A function that writes files with one row each into `data/`, and returns that name."""
    monkeypatch.chdir(tmp_path)

    def make(*names, content=None):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = f"name\n{name}\n" if ".csv" in name else json.dumps({"name": name}) + "\n"
            path.write_text(text if content is None else content)
        return "data"

    return make


def names(spec, **options):
    return [row.record["name"] for row in read_rows(spec, **options)]


def fails(spec, **options):
    with pytest.raises(InputError) as raised:
        read_rows(spec, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_all_data_files_sorted_with_origins_that_can_be_opened(folder):
    source = open_source(folder("b.jsonl", "a/z.jsonl", "a/b/d.jsonl", "B.jsonl"))
    rows = list(source.rows())
    assert [row.origin for row in rows] == [
        "data/B.jsonl:1",
        "data/a/b/d.jsonl:1",
        "data/a/z.jsonl:1",
        "data/b.jsonl:1",
    ]
    assert all(os.path.exists(row.origin.removesuffix(":1")) for row in rows)
    assert source.size == sum(file.size for file in source.files) and source.note is None and source.skipped == ()
    assert [row.origin for row in read_rows("data/")] == [row.origin for row in rows]


def test_files_about_the_data_are_left_out_and_unknown_ones_are_named(folder):
    folder(
        ".hidden.jsonl", ".git/a.jsonl", "README.md", "readme", "LICENSE", "LICENSE.txt", "notes.md", ".gitattributes"
    )
    source = open_source(folder("a.jsonl", "picture.png", "dataset_infos.json"))
    assert [row.record["name"] for row in source.rows()] == ["a.jsonl"]
    assert source.skipped == ("data/dataset_infos.json", "data/picture.png")


def test_folders_without_data(folder, tmp_path):
    (tmp_path / "data").mkdir()
    assert fails("data").startswith("data: the folder holds no data file; its files end in .jsonl")
    assert "the folder holds no data file, only a.png, b.bin" in fails(folder("a.png", "b.bin", "README.md"))
    assert "only 0.x, 1.x, 2.x, 3.x, 4.x and 4 more" in fails(folder(*(f"{i}.x" for i in range(7))))


def test_several_kinds_are_not_mixed(folder):
    folder("a.jsonl", "c.jsonl", "b.csv")
    assert "several kinds of data file: JSON Lines (a.jsonl), CSV (b.csv); name one with a pattern" in fails("data")
    assert names("data/*.jsonl") == ["a.jsonl", "c.jsonl"]


def test_one_bad_file_among_good_ones(folder):
    folder("a.jsonl")
    folder("b.jsonl", content='{"name": 1}\n\n[]\n')
    assert fails("data").startswith("data/b.jsonl:3: the row is a list")
    folder("b.jsonl", content="")
    assert fails("data") == "data/b.jsonl: the file is empty"


def test_the_same_data_twice(folder):
    assert "there twice: data/a.jsonl and data/a.jsonl.gz" in fails(folder("a.jsonl", "a.jsonl.gz"))


@pytest.mark.parametrize(
    "files",
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train.jsonl", "data/validation.jsonl"),
        ("gsm8k_train.jsonl", "gsm8k_test.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("training.jsonl", "dev.jsonl"),
        ("train.jsonl", "heldout.jsonl"),
        ("train.jsonl", "my_held-out_rows.jsonl"),
        ("train-v1.1.jsonl", "dev-v1.1.jsonl"),
        ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"),
        ("math-train-00000-of-00001-0123456789abcdef.jsonl", "math-test-00000-of-00001-0123456789abcdef.jsonl"),
    ],
)
def test_train_is_read_by_default_and_it_is_said(folder, files):
    source = open_source(folder(*files))
    assert [row.record["name"] for row in source.rows()] == [name for name in files if "train" in name]
    assert source.note.startswith("Of data the split `") and files[-1].split("/")[-1] in source.note
    assert source.fingerprint() != open_source("data", split=read_split(files[-1])).fingerprint()
    assert names("data", split=read_split(files[-1])) == [files[-1]]


def read_split(name):
    return next(split for split in ("test", "dev", "validation", "heldout") if split in name.replace("-out", "out"))


def test_a_split_by_the_name_of_its_kind_or_of_its_file(folder):
    folder("train.jsonl", "dev.jsonl", "test_hard.jsonl", "test_easy.jsonl")
    assert (
        names("data", split="validation") == names("data", split="dev") == names("data", split="val") == ["dev.jsonl"]
    )
    assert names("data", split="test_hard") == ["test_hard.jsonl"]
    assert names("data", split="test") == ["test_easy.jsonl", "test_hard.jsonl"]
    assert names("data", split="train+dev") == ["dev.jsonl", "train.jsonl"]
    assert names("data/*.jsonl", split="dev") == ["dev.jsonl"]
    assert names("data/t*.jsonl") == ["train.jsonl"]  # a pattern that catches the test set does not train on it


def test_splits_that_are_not_clear(folder):
    folder("train_sft-00000-of-00001.jsonl", "train_dpo-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl")
    assert "several splits could be `train`: train_dpo, train_sft; set `split` to one of test_sft" in fails("data")
    assert names("data", split="train_dpo") == ["train_dpo-00000-of-00001.jsonl"]
    assert names("data", split="test") == ["test_sft-00000-of-00001.jsonl"]
    found = fails("data", split="validation")
    assert "no file carries the split `validation`; set `split` to one of test_sft, train_dpo, train_sft" in found
    assert "slices of a split are for hub datasets" in fails("data", split="train_sft[:10%]")
    folder("more.jsonl")
    assert "others none (more.jsonl); set `split`" in fails("data")


def test_only_one_split_or_none_is_all(folder):
    assert names(folder("test.jsonl")) == ["test.jsonl"]
    assert open_source("data").note is None
    assert names("data", split="test") == ["test.jsonl"]
    assert "no file carries the split `train`; set `split` to one of test" in fails("data", split="train")
    folder("validation.jsonl")
    assert "no file carries the split `train`, which is read by default; set `split` to one of test, val" in fails(
        "data"
    )


def test_words_that_only_contain_a_split_are_none(folder):
    assert names(folder("contest.jsonl", "devices.jsonl", "trainers.jsonl", "latest.jsonl")) == [
        "contest.jsonl", "devices.jsonl", "latest.jsonl", "trainers.jsonl",
    ]  # fmt: skip
    assert "no file name tells of a split; leave `split` out" in fails("data", split="train")


def test_missing_shards(folder):
    folder("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    assert "of the 3 shards of `train` 1 are missing, the first is 00001" in fails("data")
    assert len(names("data/*.jsonl")) == 2  # named one by one, they are what was asked for


def test_subsets_are_not_read_as_one(folder):
    folder("main/train-00000-of-00001.jsonl", "socratic/train-00000-of-00001.jsonl")
    assert "several subsets: main and socratic both hold train-00000-of-00001.jsonl; set `subset: main`" in fails(
        "data"
    )
    assert names("data", subset="main") == ["main/train-00000-of-00001.jsonl"]
    assert [row.origin for row in read_rows("data", "main")] == ["data/main/train-00000-of-00001.jsonl:1"]
    assert "no subset `other`; set `subset` to one of main, socratic" in fails("data", subset="other")


def test_patterns(folder):
    folder("a.jsonl", "b/c.jsonl", "b/d/e.jsonl", "f.txt", ".g.jsonl")
    assert names("data/*.jsonl") == ["a.jsonl"]
    assert names("data/**/*.jsonl") == ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl"]
    assert names("data/[ab]*/c.json?") == ["b/c.jsonl"]
    assert open_source("data/*").skipped == ("data/f.txt",)
    assert [row.origin for row in read_rows("data/b/*.jsonl")] == ["data/b/c.jsonl:1"]
    assert fails("data/*.csv").startswith("data/*.csv: the pattern matches no file")
    assert "matches only folders" in fails("data/b*")
    assert "matches no data file, only f.txt" in fails("data/*.txt")
    assert "`subset` belongs to hub datasets and folders" in fails("data/*.jsonl", subset="x")


def test_a_file_whose_name_has_brackets_is_a_file(folder):
    folder("a[1].jsonl", "a1.jsonl")
    assert names("data/a[1].jsonl") == ["a[1].jsonl"]


def test_a_split_in_the_path_before_the_pattern_is_none(folder):
    folder("test/train/a.jsonl", "test/train/b_test.jsonl")
    assert "others none (a.jsonl)" in fails("data/test/train/*.jsonl")
    assert names("data/test/train/a*") == ["test/train/a.jsonl"]


def test_options_that_a_file_does_not_have(folder):
    folder("a.jsonl")
    assert "`split` belongs to hub datasets and folders, and this is a file; leave" in fails(
        "data/a.jsonl", split="train"
    )
    assert "`subset` belongs to hub datasets" in fails("data/a.jsonl", subset="x")
    assert "this is stdin" in fails("-", split="train")


def test_links_to_folders_are_followed_once(folder, tmp_path):
    folder("a.jsonl")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_text('{"name": "linked"}\n')
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert names("data") == ["a.jsonl", "linked"]


def test_the_fingerprint_knows_order_and_files(folder):
    folder("a.jsonl", "b.jsonl")
    both = open_source("data").fingerprint()
    folder("c.jsonl")
    assert open_source("data").fingerprint() != both
    os.unlink("data/c.jsonl")
    assert open_source("data").fingerprint() == both
    os.rename("data/a.jsonl", "data/c.jsonl")
    assert open_source("data").fingerprint() != both


def test_an_empty_shard_is_none_of_the_others(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    schema = pyarrow.schema({"name": pyarrow.string()})
    for index, held in enumerate((["x"], [], ["y"])):
        table = pyarrow.table({"name": held}, schema=schema)
        parquet.write_table(table, f"data/train-{index:05d}-of-00003.parquet")
    assert names("data") == ["x", "y"]


def test_what_datasets_saved_to_disk(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    train = datasets.Dataset.from_dict({"name": [f"row {i}" for i in range(5)], "tags": [["a"], [], ["b"], ["c"], []]})
    train.save_to_disk("one", num_shards=2)
    rows = read_rows("one")
    assert [row.record for row in rows] == train.to_list()
    assert rows[3].origin == "one/data-00001-of-00002.arrow row 1"
    assert "the saved dataset has no splits" in fails("one", split="train")
    datasets.DatasetDict({"train": train, "test": train.select([4, 0])}).save_to_disk("two")
    assert len(names("two")) == 5
    assert open_source("two").note == "Of two the split `train` is read, not test."
    assert names("two", split="test") == ["row 4", "row 0"]
    assert "has no split `dev`; set `split` to one of train, test" in fails("two", split="dev")
    os.unlink("two/train/data-00000-of-00001.arrow")
    assert fails("two").startswith("two/train/data-00000-of-00001.arrow: there is no such file")


def test_broken_saved_datasets(folder):
    folder("state.json", content='{"_data_files": []}')
    assert fails("data").startswith("data/state.json: the saved dataset names no data files")
    folder("dataset_dict.json", content='{"splits": 3}')
    assert fails("data").startswith("data/dataset_dict.json: the saved dataset names no splits")
    folder("dataset_dict.json", content="{")
    assert fails("data").startswith("data/dataset_dict.json: the saved dataset cannot be read")

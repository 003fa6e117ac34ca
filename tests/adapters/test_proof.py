"""`welltuned adapter verify`: what it finds, and that each fault it looks for is found."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from welltuned.adapters.files import read_adapter
from welltuned.adapters.layers import by_kind, by_layer, learned
from welltuned.cli.main import main
from welltuned.errors import InputError
from welltuned.finished.find import find
from welltuned.finished.proof import prove

B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
A = B.replace("lora_B", "lora_A")
NAME = "model.layers.1.self_attn.q_proj.lora_B"


def problems(path, against=None):
    return " | ".join(prove(path, against).problems)


@pytest.mark.parametrize("tune", ["lora", "qlora", "full"])
def test_a_sound_run(trained_run, tune):
    if tune == "qlora":
        pytest.importorskip("bitsandbytes")
    path = trained_run(tune)
    proof = prove(path)
    noted = json.loads((path / "run.json").read_text())["trained_tensors"]
    assert not proof.problems and not proof.notes
    assert {c.name: c.sha256 for c in proof.checks} == {t["name"]: t["sha256"] for t in noted}
    # A's start is drawn again from the seed: the changes are those that the run itself measured.
    by_name = {entry["name"]: entry for entry in noted}
    for check in proof.checks:
        entry = by_name[check.name]
        assert check.change == pytest.approx(entry["change"], rel=1e-12) and check.change > 0
        assert (check.mean, check.variance) == pytest.approx((entry["mean"], entry["variance"]))
    assert bool(proof.modules) == (tune != "full")


def test_biases_are_verified_too(make_model_dir, trained_run):
    path = trained_run(model=str(make_model_dir("qwen2")), bias="lora_only")
    proof = prove(path)
    assert not proof.problems and any(c.name.endswith("bias") for c in proof.checks)


def test_which_layers_learned_most(trained_run):
    path = trained_run()
    adapter = read_adapter(path / "adapter")
    file = load_file(path / "adapter" / "adapter_model.safetensors")
    scale = adapter.config["lora_alpha"] / adapter.config["r"]
    found = learned(adapter)
    assert [one.change for one in found] == sorted((one.change for one in found), reverse=True)
    one = next(o for o in found if o.module == "model.layers.1.self_attn.q_proj")
    assert one.change == pytest.approx(scale * float((file[B] @ file[A]).norm()), rel=1e-5)
    assert sum(by_layer(found).values()) == pytest.approx(1) and list(by_layer(found)) == ["0", "1"]
    assert sum(by_kind(found).values()) == pytest.approx(1) and len(by_kind(found)) == 7


def test_against_the_base_sizes_are_relative(trained_run, tiny_model_dir, plain):
    proof = prove(trained_run(), tiny_model_dir)
    weights = plain(tiny_model_dir).get_submodule(proof.modules[0].module).weight
    assert proof.modules[0].relative == pytest.approx(proof.modules[0].change / float(weights.norm()), rel=1e-5)
    assert not proof.problems


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_flipped_bit(copied):
    run = copied()
    path = run.adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "not what run.json has the checksum of" in problems(run.path)


def test_a_number_that_is_not_finite(copied):
    run = copied()
    run.tensors(lambda t: t[B].__setitem__((0, 0), math.nan))
    run.run_json(trained_tensors=[])
    assert f"{NAME} hold numbers that are not finite" in problems(run.path)


def test_a_tensor_that_did_not_move(copied):
    run = copied()
    run.tensors(lambda t: t[B].zero_())
    run.run_json(trained_tensors=[])
    assert f"{NAME} did not move in 12 updates" in problems(run.path)


def test_a_start_that_stayed(copied, tiny_model_dir):
    """A as it was drawn: only who knows the seed can see that it did not learn."""
    from welltuned.models.load import load_skeleton
    from welltuned.models.lora import LoraSettings, attach

    run = copied()
    r = json.loads((run.adapter / "adapter_config.json").read_text())["r"]
    start = attach(load_skeleton(str(tiny_model_dir)), LoraSettings(r=r, seed=3407), device="cpu").tensors()
    run.tensors(lambda t: t.__setitem__(A, start[NAME.replace("lora_B", "lora_A")].clone()))
    run.run_json(trained_tensors=[])
    assert f"{NAME.replace('lora_B', 'lora_A')} did not move" in problems(run.path)


def test_a_tensor_that_is_missing(copied):
    run = copied()
    run.tensors(lambda t: (t.pop(A), t.pop(B)))
    assert "model.layers.1.self_attn.q_proj.lora_A, model.layers.1.self_attn.q_proj.lora_B were trained" in problems(
        run.path
    )


@pytest.mark.parametrize(("key", "value"), [("lora_alpha", 999), ("use_rslora", True)])
def test_a_changed_configuration(copied, key, value):
    run = copied()
    run.config(**{key: value})
    assert f"{key} is {value} in adapter_config.json and" in problems(run.path)


def test_another_adapter_differs(trained_run, tmp_path):
    import shutil

    ours, theirs = trained_run(), trained_run(seed=5)
    proof = prove(ours, theirs)
    assert not proof.problems and all(c.moved for c in proof.checks) and str(theirs) in proof.against
    shutil.copytree(ours / "adapter", tmp_path / "copy")
    assert "are the same, byte for byte, as in" in problems(ours, tmp_path / "copy")


def test_a_full_run_that_is_its_base(copied):
    run = copied("full")
    base = json.loads((run.path / "run.json").read_text())["model"]
    import pathlib

    for file in pathlib.Path(base).glob("*.safetensors"):
        (run.path / "model" / file.name).write_bytes(file.read_bytes())
    found = problems(run.path)
    assert "did not move" in found and "not what run.json has the checksum of" in found


def test_others_adapters_have_no_known_start(trained_run, tmp_path):
    import shutil

    shutil.copytree(trained_run() / "adapter", tmp_path / "theirs")
    proof = prove(tmp_path / "theirs")
    assert not proof.problems and "where A started is not known" in proof.notes[0]
    assert all(math.isnan(c.change) == c.name.endswith("lora_A") for c in proof.checks)


def test_what_cannot_be_compared(trained_run, tmp_path, make_model_dir):
    with pytest.raises(InputError, match="neither a finished run nor an adapter"):
        prove(tmp_path)
    with pytest.raises(InputError, match="a whole model is compared with a whole model"):
        prove(trained_run("full"), trained_run())
    with pytest.raises(InputError, match="only in the other adapter|is not in the other adapter"):
        prove(trained_run(target_modules="q_proj"), trained_run())


def test_the_command(copied, capsys):
    run = copied()
    assert main(["adapter", "verify", str(run.path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == [] and len(document["tensors"]) == 28
    assert document["tensors"][0].keys() >= {"sha256", "change", "mean", "variance", "moved", "finite"}
    run.config(lora_alpha=1)
    assert main(["adapter", "verify", str(run.path)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "lora_alpha is 1 in adapter_config.json" in said.err


def test_tensors_in_16_bits_have_checksums():
    from welltuned.adapters.verify import sha256

    x = torch.randn(3, 4)
    assert sha256(x.bfloat16()) != sha256(x) and sha256(x.bfloat16()) == sha256(x.bfloat16().clone())


def test_a_misspelt_run_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tickets").mkdir(parents=True)
    (tmp_path / "runs" / "tickets" / "run.json").write_text("{}")
    with pytest.raises(InputError, match="there is no such run; did you mean runs/tickets?"):
        find("runs/tikets")
    with pytest.raises(InputError, match="there is no such run; there are: tickets"):
        find("runs/something-else")
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(InputError, match="did you mean tickets?"):
        find("ticket")
    monkeypatch.setattr("welltuned.finished.find._template", lambda path: None)  # the hub is not asked here
    assert [find(name).model for name in ("gpt2", "org/gpt2")] == ["gpt2", "org/gpt2"]

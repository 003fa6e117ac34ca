"""Variants of LoRA, averages and checkpoints after training: verified, merged, handed on, or refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from welltuned.api import average, average_checkpoints, export, load, merge, scale, train, verify
from welltuned.cli.main import main
from welltuned.errors import InputError
from welltuned.finished.find import find
from welltuned.finished.sweep import sweep
from welltuned.training.checkpoint import checkpoints, folder_of, read_checkpoint
from welltuned.training.resume import resume

VARIANTS = {
    "DoRA": dict(use_dora=True),
    "PiSSA": dict(init_lora_weights="pissa", use_rslora=True),
    "patterns": dict(rank_pattern={"down_proj": 5}, alpha_pattern={"q_proj": 3.0}, layers_to_transform=(1,)),
    "embedding": dict(modules_to_save=("embed_tokens",)),
}


@pytest.fixture(scope="module")
def variant(tiny_model_dir, data_file, tmp_path_factory):
    """A function that gives the finished run of a variant; tests read it, or copy it."""
    made = {}

    def run(name, **options):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("variant") / "run"
            usual = dict(model=str(tiny_model_dir), data=data_file, eval_fraction=0.25, max_steps=10)
            usual |= dict(learning_rate=2e-2, effective_batch_size=16)
            train(out=made[name], **(usual | (VARIANTS.get(name) or options)))
        return made[name]

    return run


@pytest.mark.parametrize("name", VARIANTS)
def test_verified_and_merged(variant, tmp_path, logits, name):
    run = variant(name)
    proof = verify(run)
    assert proof.problems == () and all(check.moved for check in proof.checks)
    merged = merge(run, out=tmp_path / "merged", dtype="float32")
    assert merged.agreement.drift < 1e-4
    assert torch.allclose(logits(load(tmp_path / "merged", device="cpu").model), logits(load(run, device="cpu").model),
                          atol=1e-3)  # fmt: skip
    export(run, to="peft", out=tmp_path / "peft")
    again = logits(load(tmp_path / "peft", device="cpu").model)
    assert torch.equal(again, logits(load(run, device="cpu").model))


@pytest.mark.parametrize("name", ["DoRA", "PiSSA", "embedding"])
def test_a_changed_tensor_is_seen(variant, tmp_path, name):
    shutil.copytree(variant(name), tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if {"DoRA": "magnitude", "PiSSA": "lora_A", "embedding": "embed"}[name] in k)
    tensors[key].view(-1)[0] += 1e-3
    if name == "embedding":
        tensors["base_model.model.lm_head.weight"] = tensors[key].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    assert any("checksum" in problem for problem in verify(tmp_path / "run").problems)


def test_pissa_holds_its_start(variant):
    """The second half of the factors is how they began, with its sign turned: rank and alpha are twice the plan's."""
    run = variant("PiSSA")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    plan = find(run).plan
    assert config["r"] == 2 * plan.value("r")
    assert config["lora_alpha"] == pytest.approx(2**0.5 * plan.value("lora_alpha"))
    assert "its start, which the adapter holds too" in verify(run).against


def test_what_alpha_does_not_scale(variant, tmp_path):
    for name, match in (("DoRA", "use_dora is not understood here"), ("embedding", "embed_tokens|modules_to_save")):
        run = variant(name)
        with pytest.raises(InputError, match=match):
            scale(run, by=0.5, out=tmp_path / "scaled")
        with pytest.raises(InputError, match=match):
            average(run, "base", out=tmp_path / "mean")
        with pytest.raises(InputError, match="which alpha does not scale"):
            sweep(find(run))
        with pytest.raises(InputError):
            export(run, to="lora-gguf", out=tmp_path / "lora")
        assert not list(tmp_path.iterdir())


def test_the_base_alone_has_its_own_embedding(variant, tiny_model_dir, plain, logits):
    tuned = load(variant("embedding"), device="cpu")
    with tuned.bank.disabled():
        base = logits(tuned.model)
    assert torch.equal(base, logits(plain(tiny_model_dir))) and not torch.equal(base, logits(tuned.model))


def test_loftq_says_what_it_gains(variant, tiny_model_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    run = variant("LoftQ", tune="qlora", init_lora_weights="loftq")
    notes = json.loads((run / "run.json").read_text())["notes"]
    said = next(note for note in notes if note.startswith("LoftQ"))
    before, after = (float(word.rstrip("%")) for word in said.split() if word.endswith("%"))
    assert 0 < after < before
    proof = verify(run)
    assert proof.problems == () and any("4 bits had lost" in note for note in proof.notes)
    with pytest.raises(InputError, match="began at what 4 bits lose"):
        merge(run, out=tmp_path / "merged", base=str(tiny_model_dir))
    assert merge(run, out=tmp_path / "merged", dtype="float32").agreement.drift < 1e-3
    found = export(run, to="peft", out=tmp_path / "peft")
    assert any("in 4 bits" in note for note in found.notes)
    with pytest.raises(InputError, match="began at what 4 bits lose"):
        merge(tmp_path / "peft", out=tmp_path / "again", base=str(tiny_model_dir))


# ── checkpoints, and the average of weights ──────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def kept(variant):
    return variant("kept", save_steps=2, save_total_limit=9, ema_decay=0.5, load_best_model_at_end=False)


def test_a_checkpoint_is_an_adapter(kept, logits, capsys):
    last, first = checkpoints(kept)[0][1], checkpoints(kept)[-1][1]
    ours = logits(load(kept, device="cpu").model)
    assert torch.equal(logits(load(last, device="cpu").model), ours)
    assert not torch.equal(logits(load(first, device="cpu").model), ours)
    assert verify(kept, first).problems == ()
    assert "are the same, byte for byte" in " ".join(verify(kept, last).problems)
    assert main(["adapter", "verify", str(first)]) == 0


def test_a_damaged_checkpoint(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    folder = checkpoints(tmp_path / "run")[0][1]
    (folder / "trained.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="the checkpoint is damaged: trained.safetensors has 1 bytes"):
        load(folder, device="cpu")


def test_the_mean_of_checkpoints(kept, tmp_path, capsys):
    """Weights fall by the decay for each update back; at rank `sum` the mean of products is exact."""
    average_checkpoints(kept, out=tmp_path / "ema", decay=0.5, rank="sum")
    folders = checkpoints(kept)
    shares = [0.5 ** (folders[0][0] - step) for step, _ in folders]
    name = "model.layers.1.mlp.up_proj"

    def product(folder):
        module = load(folder, device="cpu").bank.modules[name]
        return module.projection.scale_K[0] * (module.lora_B[0] @ module.lora_A[0]).detach()

    expected = sum(share * product(folder) for share, (_, folder) in zip(shares, folders, strict=True)) / sum(shares)
    assert torch.allclose(product(tmp_path / "ema"), expected, atol=1e-6)
    assert not torch.allclose(product(kept), expected, atol=1e-4)
    assert main(["adapter", "average", str(kept), "--ema", "0.9", "--out", str(tmp_path / "cli")]) == 0
    for wrong, match in (["--ema", "0"], "no decay"), (["--ema", "0.9", "--weights", "1"], "weighs by itself"):
        assert main(["adapter", "average", str(kept), *wrong, "--out", str(tmp_path / "no")]) == 2
        assert match in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_few_checkpoints(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    for _, folder in checkpoints(tmp_path / "run")[1:]:
        shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"the run has 1 checkpoints.*ema_decay"):
        average_checkpoints(tmp_path / "run", out=tmp_path / "out", decay=0.9)


def test_the_average_follows_every_update(kept, logits):
    """By its own definition, from checkpoints of every second update: the last step is one that can be done by hand."""
    steps = dict(checkpoints(kept))
    last = read_checkpoint(steps[10])
    rate = 1 - min(0.5, 11 / 20)
    names = list(last.trained)
    flat = torch.cat([last.trained[name].flatten() for name in names])[None]
    before = (last.average_KP - rate * flat) / (1 - rate)  # after update 9
    earlier = read_checkpoint(steps[8])
    assert earlier.average_KP.shape == before.shape and not torch.equal(earlier.average_KP, last.average_KP)
    told = json.loads((kept / "run.json").read_text())["ema"]
    assert told["decay"] == 0.5 and told["held_out"]["loss"] > 0
    average_ = load(kept / "ema", device="cpu")
    tensors = average_.bank.tensors()
    assert torch.equal(torch.cat([tensors[name].flatten() for name in names])[None], last.average_KP)
    assert not torch.equal(logits(average_.model), logits(load(kept, device="cpu").model))


def test_the_average_goes_on_exactly(kept, tmp_path):
    """Ended after update 4 and gone on with: the same bytes, and another average where it had been lost."""
    shutil.copytree(kept, tmp_path / "run")
    run = tmp_path / "run"
    for step, folder in checkpoints(run):
        if step > 4:
            shutil.rmtree(folder)
    (run / "run.json").unlink()
    resume(run)
    for part in ("adapter", "ema"):
        file = "adapter_model.safetensors"
        assert (run / part / file).read_bytes() == (kept / part / file).read_bytes()
    assert torch.equal(read_checkpoint(folder_of(run, 10)).average_KP, read_checkpoint(folder_of(kept, 10)).average_KP)


# ── recipes that contradict themselves ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["init_lora_weights=loftq"], "loftq starts at what 4 bits lose"),
        (["init_lora_weights=corda"], "must be true, gaussian, pissa, pissa_niter_N, olora or loftq"),
        (["use_dora=true", "init_lora_weights=pissa"], "DoRA does not start from pissa"),
        (["use_dora=true", "lora_dropout=0.1"], "DoRA has no dropout here"),
        (["embedding_learning_rate=1e-4"], "has no modules to train"),
        (["rank_pattern={q_proj: 0}"], "whole numbers above 0"),
        (["rank_pattern={q_proj: 1.5}"], "whole numbers above 0"),
        (["alpha_pattern={q_proj: -1}"], "numbers above 0"),
        (["rank_pattern={'(a+)+$': 4}"], "rank_pattern"),
        (["rank_pattern=[q_proj]"], "takes {name: number}"),
        (["layers_to_transform=[-1]"], "must be 0 or more"),
        (["loraplus_lr_ratio=0"], "must be above 0"),
        (["ema_decay=1"], "must be above 0 and below 1"),
        (["layers_to_transform=[9]"], "there is nothing to adapt in layer 9"),
        (["rank_pattern={nothing: 4}"], "'nothing' names no adapted linear layer"),
        (["modules_to_save=[nothing]"], "names 0 modules"),
        (["modules_to_save=[lm_head]", "dtype=bfloat16"], "half precision"),
    ],
)
def test_bad_recipes(tiny_model_dir, data_file, tmp_path, capsys, options, match):
    sets = [part for option in options for part in ("--set", option)]
    out = tmp_path / "out"
    code = main(["train", "--model", str(tiny_model_dir), "--data", str(data_file), *sets, "--out", str(out)])
    assert code == 2 and match in " ".join(capsys.readouterr().err.split()) and not out.exists()

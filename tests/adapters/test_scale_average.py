"""Adapters made stronger, weaker, and averaged: by the logits of the weights that they stand for."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from welltuned.adapters.average import Rank, average
from welltuned.adapters.files import AdapterFile, pair, product_norms, read_adapter
from welltuned.adapters.scale import scale
from welltuned.api import average as write_average
from welltuned.api import load
from welltuned.api import scale as write_scaled
from welltuned.cli.main import main
from welltuned.errors import InputError

peft = pytest.importorskip("peft")


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def merged_by_peft(plain, base, folder):
    return peft.PeftModel.from_pretrained(plain(base), folder).merge_and_unload()


def test_half_of_alpha_is_the_mean_of_base_and_tuned(trained_run, tiny_model_dir, tmp_path, plain, logits):
    """Three ways to the same model: alpha halved, averaged with the base, and the two models' weights averaged."""
    run = trained_run()
    write_scaled(run, by=0.5, out=tmp_path / "half")
    write_average(run, "base", out=tmp_path / "mean")
    tuned = merged_by_peft(plain, tiny_model_dir, run / "adapter")
    mean = plain(tiny_model_dir)
    with torch.no_grad():
        for ours, theirs in zip(mean.parameters(), tuned.parameters(), strict=True):
            ours.copy_((ours + theirs) / 2)
    expected = logits(mean)
    assert not close(expected, logits(tuned), 0.05) and not close(expected, logits(plain(tiny_model_dir)), 0.05)
    for folder in ("half", "mean"):
        assert close(logits(merged_by_peft(plain, tiny_model_dir, tmp_path / folder)), expected, 1e-5)
        assert close(logits(load(tmp_path / folder, device="cpu").model), expected, 1e-5)
    for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "half" / "adapter_model.safetensors")[name])


def test_alpha_patterns_are_scaled_with_it():
    adapter = AdapterFile(Path("x"), {"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 3}}, {})
    config = scale(adapter, 0.5).config
    assert config["lora_alpha"] == 4 and config["alpha_pattern"] == {"q_proj": 1.5}
    assert adapter.config["lora_alpha"] == 8


def test_an_alpha_pattern_in_peft(tiny_model_dir, tmp_path, plain, logits):
    options = dict(r=4, lora_alpha=8, alpha_pattern={"v_proj": 24}, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(plain(tiny_model_dir), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    write_scaled(tmp_path / "theirs", by=0.5, out=tmp_path / "ours")
    tuned = model.merge_and_unload()
    mean = plain(tiny_model_dir)
    with torch.no_grad():
        for ours, theirs in zip(mean.parameters(), tuned.parameters(), strict=True):
            ours.copy_((ours + theirs) / 2)
    assert close(logits(merged_by_peft(plain, tiny_model_dir, tmp_path / "ours")), logits(mean))


@pytest.mark.parametrize("by", [0, -1, math.nan, math.inf])
def test_strengths_that_are_none(trained_run, tmp_path, by):
    with pytest.raises(InputError, match="cannot be scaled"):
        write_scaled(trained_run(), by=by, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


def test_biases_are_not_scaled(make_model_dir, trained_run, tmp_path):
    run = trained_run(model=str(make_model_dir("qwen2")), bias="lora_only")
    with pytest.raises(InputError, match=r"bias, which alpha does not scale"):
        write_scaled(run, by=0.5, out=tmp_path / "out")


# ── averages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def deltas(adapter):
    found = {}
    for module in adapter.modules:
        p = pair(adapter, module)
        found[module] = (p.scale * (p.b_EOR.double() @ p.a_ERI.double()))[0]
    return found


@pytest.fixture(scope="module")
def two(trained_run):
    return [read_adapter(run / "adapter") for run in (trained_run(), trained_run(seed=5, r=4))]


def test_the_sum_of_ranks_loses_nothing(two):
    found = average(two, [0.75, 0.25], Rank.SUM)
    first, second, mean = map(deltas, (*two, found.adapter))
    assert found.rank == sum(int(a.config["r"]) for a in two) and found.lost_share == 0
    for module, delta in mean.items():
        expected = 0.75 * first[module] + 0.25 * second[module]
        assert float((delta - expected).norm() / expected.norm()) < 1e-6


def test_a_smaller_rank_is_the_best_of_that_rank(two):
    found = average(two, [0.5, 0.5])
    whole = deltas(average(two, [0.5, 0.5], Rank.SUM).adapter)
    assert found.rank == max(int(a.config["r"]) for a in two) and 0 < found.lost_share < 0.5
    for module, delta in deltas(found.adapter).items():
        u, s, v = torch.linalg.svd(whole[module])
        s[found.rank :] = 0
        best = u[:, : len(s)] * s @ v[: len(s)]
        assert float((delta - best).norm() / best.norm()) < 1e-5
        lost = float((delta - whole[module]).norm() ** 2 / whole[module].norm() ** 2)
        assert found.lost[module] == pytest.approx(lost, abs=1e-6)


def test_an_adapter_with_itself_is_itself(two):
    mean = average([two[0], two[0]], [0.5, 0.5])
    assert mean.lost_share < 1e-12
    for module, delta in deltas(mean.adapter).items():
        assert float((delta - deltas(two[0])[module]).norm()) < 1e-5 * float(delta.norm())


def test_the_mean_of_factors_is_another_thing(two):
    """What the products are averaged for: mean(B) mean(A) is far from mean(B A), even for one rank and one start."""
    first, second = two[0], average([two[1]], [1.0], int(two[0].config["r"])).adapter
    names = first.tensors
    naive = AdapterFile(Path("x"), first.config, {n: (first.tensors[n] + second.tensors[n]) / 2 for n in names})
    exact, wrong = deltas(average([first, second], [0.5, 0.5], Rank.SUM).adapter), deltas(naive)
    errors = [float((wrong[m] - exact[m]).norm() / exact[m].norm()) for m in exact]
    assert min(errors) > 0.05


def test_other_targets_are_joined(trained_run, two):
    narrow = read_adapter(trained_run(target_modules="q_proj") / "adapter")
    found = average([two[0], narrow], [0.5, 0.5], Rank.SUM)
    whole, part, mean = deltas(two[0]), deltas(narrow), deltas(found.adapter)
    for module in whole:
        expected = 0.5 * whole[module] + 0.5 * part.get(module, torch.zeros(()).double())
        assert float((mean[module] - expected).norm() / expected.norm()) < 1e-6


def test_averages_load_in_peft_and_here(trained_run, tmp_path, tiny_model_dir, plain, logits):
    runs = trained_run(), trained_run(seed=5, r=4)
    write_average(*runs, "base", out=tmp_path / "mean", weights=[0.5, 0.3, 0.2], rank="sum")
    tuned = [merged_by_peft(plain, tiny_model_dir, run / "adapter") for run in runs]
    mean = plain(tiny_model_dir)
    with torch.no_grad():
        for ours, a, b in zip(mean.parameters(), *(m.parameters() for m in tuned), strict=True):
            ours.copy_(0.5 * a + 0.3 * b + 0.2 * ours)
    assert close(logits(merged_by_peft(plain, tiny_model_dir, tmp_path / "mean")), logits(mean))
    assert close(logits(load(tmp_path / "mean", device="cpu").model), logits(mean))
    origin = json.loads((tmp_path / "mean" / "welltuned.json").read_text())
    assert origin["made"].startswith("adapter average: 0.5 × ") and origin["chat_template"]


def test_experts_are_averaged_one_by_one():
    """Two experts of rank 1 in PEFT's layout: all of A below each other, B with the expert as the last index."""
    draw = torch.Generator().manual_seed(0)
    name = "base_model.model.model.layers.0.mlp.experts"
    config = {"r": 2, "lora_alpha": 2, "target_parameters": ["experts.down_proj"], "base_model_name_or_path": "x"}

    def adapter():
        a_ERI, b_EOR = torch.randn(3, 2, 5, generator=draw), torch.randn(3, 4, 2, generator=draw)
        tensors = {f"{name}.lora_A.weight": a_ERI.flatten(0, 1)}
        tensors[f"{name}.lora_B.weight"] = b_EOR.permute(1, 2, 0).flatten(1).contiguous()
        return AdapterFile(Path("x"), config, tensors), b_EOR @ a_ERI

    (one, x_EOI), (two, y_EOI) = adapter(), adapter()
    assert product_norms({name: pair(one, name)})[name] == pytest.approx(float(x_EOI.norm()), rel=1e-5)
    p = pair(average([one, two], [0.5, 0.5], Rank.SUM).adapter, name)
    assert torch.allclose(p.scale * p.b_EOR @ p.a_ERI, (x_EOI + y_EOI) / 2, atol=1e-5)


def test_what_cannot_be_averaged(trained_run, make_model_dir, tmp_path, copied):
    out = tmp_path / "out"
    other = trained_run(model=str(make_model_dir(hidden_size=48)))
    for runs, options, match in (
        ((trained_run(), other), {}, "the adapter is for"),
        ((trained_run(),), {}, "one adapter has no mean"),
        (("base", "base"), {}, "no adapter among them"),
        ((trained_run(), "base"), {"weights": [0.5, 0.6]}, "weights from 0 on that sum to 1"),
        ((trained_run(), "base"), {"weights": [1.0]}, "2 weights"),
        ((trained_run(), trained_run("full")), {}, "whole model"),
    ):
        with pytest.raises(InputError, match=match):
            write_average(*runs, out=out, **options)
    spoilt = copied()
    spoilt.config(base_model_name_or_path=json.loads((other / "adapter/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ])  # fmt: skip
    with pytest.raises(InputError, match="they are of other models"):
        write_average(spoilt.path, other, out=out)
    spoilt.tensors(lambda t: t.popitem())
    with pytest.raises(InputError, match="the adapter has no tensor"):
        write_average(spoilt.path, "base", out=out)
    assert not out.exists()


def test_the_commands(trained_run, tmp_path, capsys):
    run = str(trained_run())
    assert main(["adapter", "scale", run, "--by", "0.5", "--out", str(tmp_path / "half"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["by"] == 0.5
    assert main(["adapter", "average", run, str(tmp_path / "half"), "--out", str(tmp_path / "mean")]) == 0
    assert "Nothing is lost" in capsys.readouterr().err
    for bad, match in (
        (["scale", run, "--by", "2"], "--out"),
        (["scale", run, "--by", "2", "--keep", "x", "--out", "y"], "--keep: belongs to --sweep"),
        (["scale", run, "--by", "2", "--out", str(tmp_path / "half")], "not empty"),
        (["scale", run, "--sweep", "--strengths", "1,x"], "no list of numbers"),
        (["scale", run, "--sweep", "--strengths=-1"], "unlearn"),
        (["scale", run, "--sweep", "--plot", "x.png"], "SVG"),
        (["average", run, "base", "--rank", "0", "--out", "y"], "no rank"),
    ):
        assert main(["adapter", *bad]) == 2
        assert match in capsys.readouterr().err

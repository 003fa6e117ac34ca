"""Merging: the merged weights against PEFT's and against base and adapter, and every wrong merge refused."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from welltuned.adapters import merge_stream, place
from welltuned.adapters.place import written_whole
from welltuned.api import load, merge
from welltuned.cli.main import main
from welltuned.errors import InputError, RunError

peft = pytest.importorskip("peft")


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


@pytest.fixture(scope="module")
def others(make_model_dir):
    """Tiny models of other kinds, by what is special about them."""
    return {
        "untied": make_model_dir(tie_word_embeddings=False),
        "biases": make_model_dir("qwen2"),
        "conv1d": make_model_dir("gpt2", n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0),
        "experts": make_model_dir(
            "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8
        ),
    }


@pytest.mark.parametrize(
    ("kind", "options", "streamed"),
    [
        ("usual", {}, True),
        pytest.param("usual", {"use_rslora": True, "r": 8, "lora_alpha": 4}, True, marks=pytest.mark.slow),
        pytest.param("untied", {}, True, marks=pytest.mark.slow),
        pytest.param("biases", {}, True, marks=pytest.mark.slow),
        ("biases", {"bias": "lora_only"}, False),
        ("conv1d", {}, False),
        pytest.param("experts", {"target_modules": ("all-linear", "experts")}, False, marks=pytest.mark.slow),
    ],
)
def test_merged_weights(trained_run, others, tiny_model_dir, tmp_path, plain, logits, kind, options, streamed):
    """In float32 the merged model is base and adapter, by transformers alone; from file to file wherever it can be."""
    base = tiny_model_dir if kind == "usual" else others[kind]
    run = trained_run(model=str(base), **options)
    found = merge(run, out=tmp_path / "merged", dtype="float32")
    assert found.streamed is streamed and found.agreement.drift < 1e-4 and found.agreement.along == pytest.approx(1)
    merged, tuned = logits(plain(tmp_path / "merged")), logits(load(run, device="cpu").model)
    assert close(merged, tuned, 1e-4) and not close(merged, logits(plain(base)), 0.02)


@pytest.mark.slow
def test_like_pefts_merge(trained_run, tiny_model_dir, tmp_path, plain):
    run = trained_run()
    merge(run, out=tmp_path / "merged", dtype="float32")
    theirs = peft.PeftModel.from_pretrained(plain(tiny_model_dir), run / "adapter").merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_16_bits(trained_run, tmp_path, dtype):
    found = merge(trained_run(), out=tmp_path / "merged", dtype=dtype)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype}"}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == dtype and 0 < found.agreement.drift < 0.1 and found.agreement.same_token > 0.95
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    origin = json.loads((tmp_path / "merged" / "welltuned.json").read_text())
    assert origin["agreement"]["drift"] == found.agreement.drift and origin["held_out"]["after"]


def test_qlora_becomes_what_it_was_trained_on(trained_run, tiny_model_dir, tmp_path, plain, logits):
    """By default into the dequantised base; into the 16-bit one where the user gives it."""
    pytest.importorskip("bitsandbytes")
    run = trained_run("qlora")
    tuned = logits(load(run, device="cpu").model)
    found = merge(run, out=tmp_path / "merged", dtype="float32")
    assert found.streamed and close(logits(plain(tmp_path / "merged")), tuned, 1e-4)
    onto = merge(run, out=tmp_path / "onto", dtype="float32", base=str(tiny_model_dir))
    assert onto.agreement.drift < 1e-4
    assert not close(logits(plain(tmp_path / "onto")), tuned, 0.01)


@pytest.mark.slow
def test_qlora_with_experts(trained_run, others, tmp_path, plain, logits):
    pytest.importorskip("bitsandbytes")
    run = trained_run("qlora", model=str(others["experts"]), target_modules=("all-linear", "experts"))
    found = merge(run, out=tmp_path / "merged", dtype="float32")
    assert not found.streamed
    assert close(logits(plain(tmp_path / "merged")), logits(load(run, device="cpu").model), 1e-4)


def test_shards(trained_run, tmp_path, monkeypatch, plain, logits):
    monkeypatch.setattr(merge_stream, "SHARD", 30_000)
    run = trained_run()
    merge(run, out=tmp_path / "merged", dtype="float32")
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == {s.name for s in shards}
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(s).values())
    assert close(logits(plain(tmp_path / "merged")), logits(load(run, device="cpu").model), 1e-4)
    again = merge_stream.stored(merge_stream.weight_files(str(tmp_path / "merged")))
    assert len(again) == len(index["weight_map"])


# ── what would be wrong ──────────────────────────────────────────────────────────────────────────────────────────────


def nothing_there(folder, *but):
    return sorted(p.name for p in folder.iterdir() if p.name not in but) == []


def test_merged_twice(trained_run, tmp_path):
    run = trained_run()
    merge(run, out=tmp_path / "once")
    with pytest.raises(InputError, match="merged into that model already"):
        merge(run, out=tmp_path / "twice", base=str(tmp_path / "once"))
    (tmp_path / "once" / "welltuned.json").unlink()  # also without the note: by the weights
    with pytest.raises(InputError, match=r"not the weights that the adapter was trained on \(model\.layers\.0"):
        merge(run, out=tmp_path / "twice", base=str(tmp_path / "once"))
    assert nothing_there(tmp_path, "once")


def test_another_base_of_the_same_shapes(trained_run, make_model_dir, tmp_path):
    with pytest.raises(InputError, match="not the weights that the adapter was trained on"):
        merge(trained_run(), out=tmp_path / "merged", base=str(make_model_dir(seed=9)))
    assert nothing_there(tmp_path)


def test_another_base_of_other_shapes(trained_run, make_model_dir, tmp_path):
    with pytest.raises(InputError, match=r"in the adapter and \(48, \d+\) in the model"):
        merge(trained_run(), out=tmp_path / "merged", base=str(make_model_dir(hidden_size=48)))
    with pytest.raises(InputError, match="no tensor|not the weights"):
        merge(trained_run(), out=tmp_path / "merged", base=str(make_model_dir(num_hidden_layers=3)))
    assert nothing_there(tmp_path)


def test_a_wrong_alpha(copied, tmp_path):
    run = copied()
    run.config(lora_alpha=1)
    with pytest.raises(InputError, match="lora_alpha is 1 in adapter_config.json and"):
        merge(run.path, out=tmp_path / "merged")
    assert nothing_there(tmp_path, "run")


def test_missing_and_broken_tensors(copied, tmp_path):
    run = copied()
    run.tensors(lambda t: t.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"))
    with pytest.raises(InputError, match="the adapter has no tensor"):
        merge(run.path, out=tmp_path / "merged")
    shutil.rmtree(run.path)
    run = copied()
    run.tensors(lambda t: next(iter(t.values())).fill_(torch.nan))
    with pytest.raises(InputError, match="not finite"):
        merge(run.path, out=tmp_path / "merged")
    assert nothing_there(tmp_path, "run")


def made_by_peft(plain, base, to, **options):
    model = plain(base)
    if "resize" in options:
        model.resize_token_embeddings(options.pop("resize"))
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(to, save_embedding_layers="resize" in str(to))
    return to


def test_a_tied_head(plain, tiny_model_dir, tmp_path):
    """The head's adapter would change the embedding too: merging it is wrong however it is done."""
    made_by_peft(plain, tiny_model_dir, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    with pytest.raises(InputError, match="on lm_head, which shares its weights with the embedding"):
        merge(tmp_path / "head", out=tmp_path / "merged")
    assert nothing_there(tmp_path, "head")


def test_a_resized_vocabulary(plain, tiny_model_dir, tmp_path):
    made_by_peft(plain, tiny_model_dir, tmp_path / "resize", target_modules=["q_proj"], resize=400)
    with pytest.raises(InputError, match="with 400 rows: its vocabulary was resized"):
        merge(tmp_path / "resize", out=tmp_path / "merged")


def test_new_tokens_beyond_the_embedding(trained_run, tiny_tokenizer, tmp_path):
    import copy

    shutil.copytree(trained_run() / "adapter", tmp_path / "adapter")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="its tokenizer has token"):
        merge(tmp_path / "adapter", out=tmp_path / "merged")


def test_an_adapter_that_does_nothing(plain, tiny_model_dir, tmp_path):
    model = peft.get_peft_model(plain(tiny_model_dir), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "zero")
    with pytest.raises(RunError, match="the adapter changes nothing"):
        merge(tmp_path / "zero", out=tmp_path / "merged")
    assert nothing_there(tmp_path, "zero")


@pytest.mark.parametrize(
    ("times", "match"),
    [(0.0, "equals the base: it does 0%"), (2.0, "not base and adapter"), (0.5, "not base and adapter")],
)
def test_a_merge_that_went_wrong(trained_run, tmp_path, monkeypatch, times, match):
    """Planted: the weights get nothing, twice the adapter, or half of it. The comparison sees each."""
    real = merge_stream.delta
    monkeypatch.setattr(merge_stream, "delta", lambda pair: times * real(pair))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(RunError, match=match):
            merge(trained_run(), out=tmp_path / "merged", dtype=dtype)
    assert nothing_there(tmp_path)


def test_one_layer_that_was_forgotten(trained_run, tmp_path, monkeypatch):
    real, seen = merge_stream.delta, []

    def forgetful(pair):
        seen.append(pair)
        return real(pair) * (len(seen) != 3)

    monkeypatch.setattr(merge_stream, "delta", forgetful)
    with pytest.raises(RunError, match="not base and adapter"):
        merge(trained_run(), out=tmp_path / "merged", dtype="float32")


@pytest.mark.slow
def test_an_effect_lost_in_rounding(copied, tmp_path):
    run = copied()

    def faint(tensors):
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor *= 1e-4

    run.tensors(faint)
    run.run_json(trained_tensors=[])
    with pytest.raises(RunError, match="rounding to bfloat16 covers it; use --dtype float32"):
        merge(run.path, out=tmp_path / "merged")
    assert merge(run.path, out=tmp_path / "merged", dtype="float32").agreement.along == pytest.approx(1, abs=0.02)


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_disk_that_is_too_small(trained_run, tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="not enough disk space: about 0.00 GB are needed"):
        merge(trained_run(), out=tmp_path / "merged")
    assert nothing_there(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device (os error 28)")]
)
def test_a_disk_that_fills_up(trained_run, tmp_path, monkeypatch, error):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(merge_stream, "save_file", full)
    with pytest.raises(InputError, match="not enough disk space"):
        merge(trained_run(), out=tmp_path / "merged")
    assert nothing_there(tmp_path)


def test_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert nothing_there(tmp_path)
    with written_whole(tmp_path / "out") as folder:
        (folder / "all").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["all"] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match="not empty"), written_whole(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a file in the output's place"), written_whole(tmp_path / "file"):
        pass


def test_the_command(trained_run, tmp_path, capsys):
    run = str(trained_run())
    assert main(["adapter", "merge", run, "--out", str(tmp_path / "merged"), "--json"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["streamed"] and document["agreement"]["same_token"] > 0.9
    assert "Verified: on" in said.err and "of the most likely tokens are the same" in said.err
    assert main(["adapter", "merge", run, "--out", str(tmp_path / "merged")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["adapter", "merge", str(trained_run("full")), "--out", str(tmp_path / "x")]) == 2
    assert "there is no adapter to merge" in capsys.readouterr().err


@pytest.mark.slow
def test_the_base_changed_on_disk(trained_run, tiny_model_dir, tmp_path, copied):
    """The same place, and other weights in it since."""
    moved = tmp_path / "base"
    shutil.copytree(tiny_model_dir, moved)
    run = copied()
    run.run_json(model=str(moved))
    merge(run.path, out=tmp_path / "before")
    tensors = load_file(moved / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        merge(run.path, out=tmp_path / "after")

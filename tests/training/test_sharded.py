"""A model in pieces (FSDP2) gives the run of one process: losses, adapters and weights to fp32 rounding."""

import errno
import json
import os
import shutil
import signal
import time

import pytest
import torch
from ranked import finished, in_ranks, resumed, trained
from test_rank_faults import at_call, hangs, killed
from test_ranks import assert_same_run, lines, notes

import welltuned
from welltuned.errors import InputError
from welltuned.recipe import load_recipe
from welltuned.training import gathered as gathered_module
from welltuned.training import loop as loop_module
from welltuned.training import pieces as pieces_module
from welltuned.training import step as step_module
from welltuned.training.checkpoint import Damaged, newest, read_checkpoint, verify

UPDATES = (
    6  # of 14 rows in micro-batches of 64 tokens: ranks have 2 to 5 of them, and an update of 2 rows leaves some none
)
SLOW = pytest.mark.slow
LORA = dict(r=4, lora_dropout=0.1, learning_rate=1e-2)
FULL = dict(tune="full", learning_rate=1e-3)


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    return dict(
        model=str(tiny_model_dir), data=data_file, effective_batch_size=14, max_steps=UPDATES, token_budget=64,
        eval_steps=3, save_steps=2, load_best_model_at_end=False, dtype="float32", fsdp="full_shard",
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    """Runs of one process, in which everything is whole."""
    found = {}

    def of(kind):
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp("straight") / "out"
            welltuned.train(out=found[kind], **options, **(LORA if kind == "lora" else FULL))
        return found[kind]

    return of


def assert_same(one, other):
    """And lengths of gradients, whose scale AdamW hides, and how far the weights have moved."""
    assert_same_run(one, other)
    for name in ("grad_norm", "weight_change"):
        mine, theirs = ([line[name] for line in lines(run) if line.get(name) is not None] for run in (one, other))
        assert len(mine) >= 2
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-7)


def and_bytes(train):
    """The same run; also the bytes of this rank's parts of the weights between passes, and of all of them whole."""
    import welltuned.training.run as run_module

    def train_and_count(rank):
        engines, real = [], run_module.make_ready

        def make_ready(*arguments, **more):
            ready = real(*arguments, **more)
            engines.append(ready.engine)
            return ready

        run_module.make_ready = make_ready
        told = train(rank)
        weights = [p for p in engines[0].model.parameters() if isinstance(p, torch.distributed.tensor.DTensor)]
        here = sum(p.to_local().nbytes for p in weights)
        return told, here, sum(p.numel() * p.itemsize for p in weights), engines[0].trained.flat_KP.nbytes

    return train_and_count


# ── the result of one process ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=SLOW)])
def test_adapters_on_a_base_in_pieces(options, straight, tmp_path, world):
    ended = finished(in_ranks(and_bytes(trained(tmp_path / "run", **options, **LORA)), world, tmp_path / "said"))
    assert_same(tmp_path / "run", straight("lora"))
    (told, evaluated), *_ = ended[0].value
    assert len(told) == UPDATES and all(e.value[0] == ([], evaluated) for e in ended[1:])
    ours, theirs = (json.loads((run / "run.json").read_text()) for run in (tmp_path / "run", straight("lora")))
    assert ours["base_weights"] == theirs["base_weights"] and ours["processes"] == world
    for e in ended:
        _, here, whole, adapters = e.value
        assert whole > 80_000 and abs(here - whole / world) < 0.01 * whole and adapters < 80_000
    assert "a model in pieces" in " ".join(notes(tmp_path / "run"))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=SLOW)])
def test_full_fine_tuning_in_pieces(options, straight, tmp_path, world):
    ended = finished(in_ranks(and_bytes(trained(tmp_path / "run", **options, **FULL)), world, tmp_path / "said"))
    assert_same(tmp_path / "run", straight("full"))
    for e in ended:
        _, here, whole, flat = e.value
        assert here <= flat < whole / world + 4_000  # what is padded
    run = tmp_path / "run"
    assert not list(run.glob("*.tmp")) and "pieces" in " ".join(notes(run))
    files = json.loads((run / "checkpoints" / "step-000006" / "manifest.json").read_text())["files"]
    assert len([name for name in files if name.startswith("shard-")]) == world


# ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_killed_in_a_save_and_gone_on_with_by_one_process(options, straight, tmp_path, monkeypatch):
    """The checkpoint before is whole; one process reads what two have written."""
    run = tmp_path / "run"
    at_call(
        monkeypatch, pieces_module, "checksum", 1, 2, killed
    )  # its part of the second one is written, not read back
    ended = in_ranks(trained(run, **options, **FULL), 2, tmp_path / "said")
    monkeypatch.undo()
    assert [e.code for e in ended] == [1, -signal.SIGKILL] and "process 1 of 2 is gone" in ended[0].said
    assert newest(run, None)[0].position.step == 2 and (run / "checkpoints" / "step-000004.tmp").is_dir()
    welltuned.resume(run)
    assert_same(run, straight("full"))
    assert not list((run / "checkpoints").glob("*.tmp"))


def cut_short(run, straight, step):
    """A copy of a finished run, as it was when this update had just been saved."""
    shutil.copytree(straight, run)
    (run / "run.json").unlink()
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return run


@SLOW
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_of_one_goes_on_in_two_pieces(options, straight, tmp_path, kind):
    run = cut_short(tmp_path / "run", straight(kind), 4)
    finished(in_ranks(resumed(run), 2, tmp_path / "said"))
    assert_same(run, straight(kind))


@SLOW
@pytest.mark.parametrize("worlds", [(2, 4), (4, 2), (3, 2)])
def test_pieces_of_another_number(options, straight, tmp_path, monkeypatch, worlds):
    """With an average of the weights, which lies in pieces as well, and after a signal."""
    run, asked = tmp_path / "run", {**options, **FULL, "ema_decay": 0.9}
    welltuned.train(out=tmp_path / "one", **asked)
    real, calls = loop_module.Loop._own_gradient, []

    def own(loop, rows, keys):
        calls.append(1)
        if loop.ranks.rank == 1 and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(loop, rows, keys)

    monkeypatch.setattr(loop_module.Loop, "_own_gradient", own)
    ended = in_ranks(trained(run, **asked), worlds[0], tmp_path / "said")
    monkeypatch.undo()
    assert [e.code for e in ended] == [143] * worlds[0] and newest(run, None)[0].position.step == 4
    finished(in_ranks(resumed(run), worlds[1], tmp_path / "said-again"))
    assert_same(run, tmp_path / "one")
    from safetensors.torch import load_file

    a, b = (load_file(place / "ema" / "model.safetensors") for place in (run, tmp_path / "one"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)


@SLOW
@pytest.mark.parametrize("more", [dict(gradient_checkpointing=True), dict(load_best_model_at_end=True, eval_steps=1)])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_other_runs(options, tmp_path, kind, more):
    asked = {**options, **(LORA if kind == "lora" else {**FULL, "learning_rate": 1e-2}), **more}
    welltuned.train(out=tmp_path / "one", **asked)
    finished(in_ranks(trained(tmp_path / "run", **asked), 2, tmp_path / "said"))
    assert_same(tmp_path / "run", tmp_path / "one")


@SLOW
@pytest.mark.parametrize(
    "more",
    [
        dict(use_dora=True, lora_dropout=0.0, layers_to_transform=[1]),
        dict(modules_to_save=["embed_tokens"], optim="adamw_8bit"),
        dict(init_lora_weights="gaussian", ema_decay=0.9, packing=False),
    ],
)
def test_other_adapters(options, tmp_path, more):
    asked = {**options, **LORA, **more}
    welltuned.train(out=tmp_path / "one", **asked)
    finished(in_ranks(trained(tmp_path / "run", **asked), 2, tmp_path / "said"))
    assert_same(tmp_path / "run", tmp_path / "one")


FAMILIES = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "qwen3": dict(head_dim=16, tie_word_embeddings=False),
    "gemma2": dict(head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=1.5),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "falcon": dict(new_decoder_architecture=True, num_kv_heads=2),  # runs its examples one at a time
}


@SLOW
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_other_families(options, make_model_dir, tmp_path, family, kind):
    full = {**FULL, "learning_rate": 1e-4}  # biases of keys have no gradient but rounding, which AdamW takes for one
    asked = {**options, **(LORA if kind == "lora" else full), "max_steps": 3}
    asked["model"] = str(make_model_dir(family, **FAMILIES[family]))
    welltuned.train(out=tmp_path / "one", **asked)
    finished(in_ranks(trained(tmp_path / "run", **asked), 2, tmp_path / "said"))
    assert_same(tmp_path / "run", tmp_path / "one")


@SLOW
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_of_whole_models_in_as_many_processes(options, tmp_path, dtype):
    """Adapters on pieces are those of data parallel, bit for bit: the weights that pass by are the same."""
    files = []
    for way in ("none", "full_shard"):
        asked = {**options, **LORA, "fsdp": way, "dtype": dtype}
        finished(in_ranks(trained(tmp_path / way, **asked), 2, tmp_path / "said"))
        files.append((tmp_path / way / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@SLOW
@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_the_disk_refuses(options, straight, tmp_path, monkeypatch, rank):
    """One rank's disk is full: no checkpoint, which is told, and all go on; the next one is there."""
    at_call(monkeypatch, pieces_module._Stream, "close", rank, 1, full)
    finished(in_ranks(trained(tmp_path / "run", **options, **FULL), 2, tmp_path / "said"))
    told = [n for n in notes(tmp_path / "run") if "could not be written" in n]
    assert len(told) == 1 and "No space left on device" in told[0]
    assert newest(tmp_path / "run", None)[0].position.step == UPDATES
    assert_same(tmp_path / "run", straight("full"))


@SLOW
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("what", ["killed", "hangs", "fails", "no memory"])
def test_a_rank_that_fails_in_a_pass(options, tmp_path, monkeypatch, kind, what):
    """The others, which wait for it in a layer, end soon; one of them, or it, says why. The checkpoint is whole."""

    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fails():
        raise ValueError("a bug of mine")

    does = {"killed": killed, "hangs": hangs, "fails": fails, "no memory": no_memory}[what]
    at_call(monkeypatch, step_module, "loss", 1, 24, does)
    started = time.monotonic()
    asked = {**options, **(LORA if kind == "lora" else FULL), "save_steps": 1, "eval_steps": UPDATES}
    ended = in_ranks(trained(tmp_path / "run", **asked), 2, tmp_path / "said", timeout=5.0 if what == "hangs" else 40)
    monkeypatch.undo()
    assert time.monotonic() - started < 80 and ended[0].code == 1 and ended[1].code not in (0, None)
    gone = "did not answer for 5 s" if what == "hangs" else "process 1 of 2 is gone"
    assert gone in ended[0].said
    if what == "fails":
        assert "process 1 of 2 failed in a pass that all share (ValueError: a bug of mine)" in ended[1].said
    if what == "no memory":
        assert "ran out of memory in a pass that all share" in ended[1].said and "token_budget" in ended[1].said
    assert newest(tmp_path / "run", None)[0].position.step >= 1


@SLOW
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_gradient_that_is_not_finite_in_one_piece(options, tmp_path, monkeypatch, kind):
    """Its update is left out on all ranks, the row is named, and the result is that of one process."""
    from welltuned.training.prepare import prepare

    asked = {**options, **(LORA if kind == "lora" else FULL)}
    prepared = prepare(load_recipe(None, asked))
    bad = prepared.train[prepared.mixture.update(14, 2)[5]].origin
    rows, real_collate, real = [], step_module.collate, step_module._loss

    def collate(examples, device):
        rows[:] = [example.origin for example in examples]
        return real_collate(examples, device)

    def loss(engine, batch, weight):
        value = real(engine, batch, weight)
        return value * float("nan") if bad in rows and len(batch.target_M) else value

    monkeypatch.setattr(step_module, "collate", collate)
    monkeypatch.setattr(step_module, "_loss", loss)
    welltuned.train(out=tmp_path / "one", **asked)
    finished(in_ranks(trained(tmp_path / "run", **asked), 2, tmp_path / "said"))
    for name in ("one", "run"):
        skipped = [(e["step"], e["rows"]) for e in lines(tmp_path / name) if e.get("event") == "skipped"]
        assert skipped[0] == (3, [bad])
    assert_same(tmp_path / "run", tmp_path / "one")


@SLOW
def test_a_result_that_the_disk_refuses(options, straight, tmp_path, monkeypatch):
    """All ranks fail together, with the last checkpoint whole, and resume only writes the result."""
    at_call(monkeypatch, gathered_module, "_write", 0, 5, full)
    ended = in_ranks(trained(tmp_path / "run", **options, **FULL), 2, tmp_path / "said")
    monkeypatch.undo()
    assert [e.code for e in ended] == [1, 1] and "No space left on device" in ended[0].said
    assert newest(tmp_path / "run", None)[0].position.step == UPDATES
    finished(in_ranks(resumed(tmp_path / "run"), 2, tmp_path / "said-again"))
    assert_same(tmp_path / "run", straight("full"))


@SLOW
def test_a_shard_with_one_bit_changed_is_found_out(options, tmp_path):
    finished(in_ranks(trained(tmp_path / "run", **options, **FULL), 2, tmp_path / "said"))
    folder = tmp_path / "run" / "checkpoints" / "step-000006"
    assert verify(folder).step == 6 and read_checkpoint(folder, tensors=False).trained == {}
    shard = next(folder.glob("shard-00002*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Damaged, match="shard-00002.* is not what was written"):
        read_checkpoint(folder)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (dict(tune="qlora"), "would change 4-bit weights on their way .*use tune: lora with it, or tune: qlora with"),
        (dict(method="dpo"), "trains method sft; dpo asks more of a model than a pass.*tune: qlora"),
        (dict(init_lora_weights="pissa"), "starts at a part of whole weights"),
        (dict(tune="full", optim="adamw_8bit"), "8-bit moments would depend on the number of processes.*optim: adamw"),
    ],
)
def test_what_cannot_be_trained_in_pieces_is_refused(options, more, why):
    with pytest.raises(InputError, match=why):
        load_recipe(None, {**options, **more})

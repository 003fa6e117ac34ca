"""Checkpoints of which each rank writes its part: read by one, by any number of ranks, and in years to come."""

import json
from pathlib import Path

import pytest
import torch
from faulty import snapshot
from ranked import finished, in_ranks
from torch import nn

from welltuned.training.checkpoint import Damaged, folder_of, read_checkpoint, verify

FIXTURE = Path(__file__).parent / "checkpoint-format-2"
STEP = 7
KINDS = ("trained", "exp_avg", "exp_avg_sq", "average")


def pieces(layers=2, vocabulary=7):
    """This rank's parts of a tiny model of two layers, none of whose sizes is a multiple of another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from welltuned.models.sharded import ShardedParameters

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=6, intermediate_size=5, num_hidden_layers=layers, num_attention_heads=3,
        num_key_value_heads=1, head_dim=2, tie_word_embeddings=False,
    )  # fmt: skip
    return ShardedParameters(LlamaForCausalLM(config), torch.device("cpu"))


def wanted(name, shape, kind):
    """Numbers that tell every place of every tensor."""
    start = 1000 * KINDS.index(kind) + sum(map(ord, name))
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def fill(trained, flat_KP, kind):
    for name, place in trained.pieces_of(flat_KP).items():
        first = trained.first_row(name)
        place.copy_(wanted(name, trained.whole[name], kind)[first : first + len(place)])
    return flat_KP


def write(run):
    """A function for `in_ranks` that writes a checkpoint in pieces; how much of the weights lay in this one."""
    from welltuned.training.pieces import write_pieces
    from welltuned.training.ranks import joined

    def write_own(rank):
        from dataclasses import replace

        with joined() as ranks:
            trained = pieces()
            flat = [fill(trained, torch.zeros_like(trained.flat_KP), kind) for kind in KINDS]
            names = ("flat_KP", "exp_avg_KP", "exp_avg_sq_KP", "average_KP")
            own = replace(snapshot(STEP), **dict(zip(names, flat, strict=True)), codes={}, slots=trained.slots)
            assert write_pieces(run, own, trained, ranks) is None
            return sum(len(t.flatten()) for t in trained.tensors().values())

    return write_own


def is_whole(found):
    assert found.position.step == STEP and found.shapes["model.embed_tokens.weight"] == (7, 6)
    for name, shape in found.shapes.items():
        assert torch.equal(found.trained[name], wanted(name, shape, "trained")), name
    for kind, flat in zip(KINDS[1:], (found.exp_avg_KP, found.exp_avg_sq_KP, found.average_KP), strict=True):
        expected = [wanted(name, shape, kind).flatten() for name, shape in found.shapes.items()]
        assert torch.equal(flat[0], torch.cat(expected)), kind


def test_format_2_is_read():
    """As the first version with pieces wrote it, in three processes."""
    found = read_checkpoint(folder_of(FIXTURE, STEP))
    is_whole(found)
    assert json.loads((found.folder / "state.json").read_text())["format"] == 2


@pytest.mark.parametrize("world", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_what_ranks_write_is_read_by_one_and_by_others(tmp_path, world):
    """Rows that do not divide, and ranks with none of a tensor's rows."""
    from welltuned.training.pieces import read_own_part

    counts = [e.value for e in finished(in_ranks(write(tmp_path), world, tmp_path / "said"))]
    folder = folder_of(tmp_path, STEP)
    found = read_checkpoint(folder)
    is_whole(found)
    assert sum(counts) == sum(torch.Size(shape).numel() for shape in found.shapes.values())

    def read(rank):
        from welltuned.training.ranks import joined

        with joined():
            trained = pieces()
            flat = {kind: torch.zeros_like(trained.flat_KP) for kind in KINDS}
            read_own_part(folder, flat, trained)
            for kind in KINDS:
                assert torch.equal(flat[kind], fill(trained, torch.zeros_like(trained.flat_KP), kind)), kind
        return True

    finished(in_ranks(read, 3, tmp_path / "said-again"))


def test_a_shard_that_is_missing_or_another_runs_is_damage(tmp_path):
    import shutil

    shutil.copytree(FIXTURE, tmp_path / "run")
    folder = folder_of(tmp_path / "run", STEP)
    shards = sorted(folder.glob("shard-*"))
    assert len(shards) == 3
    shards[1].rename(tmp_path / "kept")
    with pytest.raises(Damaged, match="shard-00002.* is missing"):
        verify(folder)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(Damaged, match="shard-00002"):
        verify(folder)


def test_one_layer_is_whole_at_a_time(tmp_path):
    """In a pass and back: of each weight the parts that lie here, and of one layer all of them."""
    from welltuned.models.fuse import find_head
    from welltuned.models.packed import Packed, packed_model, packs
    from welltuned.objectives.supervised import MicroBatch, loss

    def passed(rank):
        from welltuned.training.ranks import joined
        from welltuned.training.shards import Shards

        with joined() as ranks:
            trained = pieces(layers=4, vocabulary=17)
            shards = Shards(root=trained.root, ranks=ranks, base_weights={})
            head = shards.ask(lambda: find_head(trained.model))
            shards.ask(lambda: packs(trained.model))
            whole = []
            for layer in trained.model.model.layers:
                layer.mlp.register_forward_pre_hook(lambda *_: whole.append(layers_whole(trained.model)))
                layer.mlp.register_full_backward_pre_hook(lambda *_: whole.append(layers_whole(trained.model)))
            ids = torch.arange(6)
            batch = MicroBatch(Packed(ids, [6]), ids[:5], ids[1:], torch.zeros(5, dtype=torch.int64))
            with packed_model(trained.model):
                value = shards.run(lambda h: loss(trained.model, h, batch, torch.ones(5))[0], head)
                shards.backward(value)
            largest, grown = float(trained.grad_KP.abs().max()), trained.flat_KP.requires_grad  # no graph grows on it
            return whole, layers_whole(trained.model), largest, grown

    for ended in finished(in_ranks(passed, 2, tmp_path)):
        whole, afterwards, gradient, grown = ended.value
        assert len(whole) == 8 and max(whole) <= 2 and whole[:4] == [1] * 4  # backwards the next one is on its way
        assert afterwards == 0 and gradient > 0 and not grown


def layers_whole(model):
    """How many layers have memory for whole weights now."""
    groups = [layer._get_fsdp_state()._fsdp_param_group for layer in model.model.layers]
    return sum(
        any(t.untyped_storage().size() for piece in group.fsdp_params for t in piece.all_gather_outputs)
        for group in groups
    )


def test_a_file_that_is_no_part_of_it_is_not_read(tmp_path):
    import shutil

    shutil.copytree(FIXTURE, tmp_path / "run")
    folder = folder_of(tmp_path / "run", STEP)
    shutil.copy(folder / "shard-00001-model-00001-of-00001.safetensors", folder / "more.safetensors")
    with pytest.raises(Damaged, match="more.safetensors does not belong to it"):
        read_checkpoint(folder)


def test_a_model_without_a_list_of_layers_is_refused():
    from welltuned.errors import InputError
    from welltuned.models.parts import require_layers

    class Model(nn.Module):
        class config:
            num_hidden_layers = 3

    with pytest.raises(InputError, match="no list of decoder layers was found"):
        require_layers(Model(), "fsdp")

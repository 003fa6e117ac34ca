"""The same rows and the same gradient however many devices share an update, and however often their number changes."""

import json
from collections import Counter

import pytest
import torch

import welltuned
from welltuned.data.stream import balanced_shares
from welltuned.models.packed import packed_model
from welltuned.recipe import load_recipe
from welltuned.training.checkpoint import checkpoints
from welltuned.training.loop import dropout_key
from welltuned.training.prepare import prepare
from welltuned.training.run import make_ready
from welltuned.training.step import accumulate_gradient

BATCH = 16


@pytest.fixture(scope="module")
def prepared(tiny_model_dir, data_file):
    given = dict(model=str(tiny_model_dir), data=data_file, effective_batch_size=BATCH, r=4, lora_dropout=0.1)
    return prepare(load_recipe(None, {**given, "learning_rate": 2e-2, "num_train_epochs": 3}))


def lengths(prepared, rows):
    return [len(prepared.train[i].ids) for i in rows]


def test_each_row_once_an_epoch_while_the_number_of_devices_changes(prepared):
    """One process, after a resume two, then three, then one again: what was done before is a number of updates."""
    per_epoch = prepared.mixture.steps_per_epoch(BATCH)
    worlds = [1, 2, 2, 3, 1] * per_epoch
    for epoch in range(3):
        seen = Counter()
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            update = prepared.mixture.update(BATCH, step)
            shares = [[update[i] for i in some] for some in balanced_shares(lengths(prepared, update), worlds[step])]
            assert Counter(i for share in shares for i in share) == Counter(update)
            seen.update(i for share in shares for i in share)
        assert set(seen.values()) == {1} and len(seen) == len(prepared.train)


def test_shares_give_the_gradient_of_the_whole_with_dropout(prepared):
    """Each share weighs as many tokens as it has; masks are named by rows, so they are the same on any device."""
    ready = make_ready(prepared.plan)
    trained = ready.engine.trained
    trained.flat_KP += 0.05 * torch.randn(trained.flat_KP.shape, generator=torch.Generator().manual_seed(0))
    chosen = prepared.mixture.update(BATCH, 2)

    def gradient(indices):
        trained.grad_KP.zero_()
        rows = [prepared.train[i] for i in indices]
        keys = [dropout_key(prepared.plan.value("seed"), 2, i) for i in indices]
        made = accumulate_gradient(ready.engine, rows, keys)
        return made.supervised_tokens, trained.grad_KP.clone()

    trained.claim_gradients()
    with packed_model(ready.model):
        tokens, whole_KP = gradient(chosen)
        for world in (2, 3, 5):
            parts = [gradient([chosen[i] for i in some]) for some in balanced_shares(lengths(prepared, chosen), world)]
            assert sum(count for count, _ in parts) == tokens
            together_KP = sum(count / tokens * part_KP for count, part_KP in parts)
            torch.testing.assert_close(together_KP, whole_KP, rtol=1e-4, atol=1e-6)
        of_means_KP = sum(part_KP for _, part_KP in (gradient(chosen[:3]), gradient(chosen[3:]))) / 2
        assert not torch.allclose(of_means_KP, whole_KP, rtol=1e-4, atol=1e-6)  # the usual fault would show


def test_a_checkpoint_knows_no_number_of_devices(tiny_model_dir, data_file, tmp_path):
    welltuned.train(
        model=str(tiny_model_dir), data=data_file, out=tmp_path / "run", max_steps=2, effective_batch_size=BATCH
    )
    state = json.loads((checkpoints(tmp_path / "run")[0][1] / "state.json").read_text())
    assert state["position"]["step"] == 2
    said = json.dumps([state["position"], state["identity"]["plan"]])
    assert "world" not in said and "rank" not in said.replace("use_rslora", "")

"""What may not change the result does not change it: the cut into micro-batches, packing, evaluation, recomputation."""

from dataclasses import replace

import pytest
import torch

from welltuned.data.packing import pack
from welltuned.data.stream import update_indices
from welltuned.objectives.supervised import supervised_tokens
from welltuned.training import step as step_module

CUTS = {"16x1": 1, "8x2": 2, "4x4": 4, "2x8": 8, "1x16": 16}  # micro-batches x rows, the rows cut by a token budget
LONGEST = 42


def budget(rows):
    """A token budget of 1 leaves every row alone: a row longer than the budget gets a micro-batch of its own."""
    return 1 if rows == 1 else rows * LONGEST


def distance(a, b):
    """Largest relative difference of any tensor, by its Euclidean norm."""
    assert a.keys() == b.keys()
    return max(float(((a[name] - b[name]).norm() / a[name].norm()).detach()) for name in a)


def spread(curves):
    """Largest relative difference between loss curves, over all updates."""
    return max((max(at) - min(at)) / min(at) for at in zip(*curves, strict=True))


@pytest.fixture(scope="module")
def cuts(run):
    return {name: run(token_budget=budget(rows)) for name, rows in CUTS.items()}


def mean_of_means(engine, examples, keys):
    """The well-known bug: each micro-batch's loss is divided by its own tokens, and the micro-batches averaged."""
    bins = pack([len(e.ids) for e in examples], engine.token_budget)
    total = 0.0
    for bin_ in bins:
        chosen = [examples[i] for i in bin_]
        batch = step_module.collate(chosen)
        engine.trained.use_rows(None, tuple((len(examples[i].ids), keys[i]) for i in bin_))
        value = step_module._loss(engine, batch, 1.0 / (len(batch.target_M) * len(bins)))
        value.backward()
        total += float(value.detach())
    return step_module.Gradient(total, sum(len(e.ids) for e in examples), sum(map(supervised_tokens, examples)))


def test_the_cuts_are_what_they_are_called(cuts):
    plan = cuts["16x1"].result
    assert {f.updates[0]["supervised_tokens"] for f in cuts.values()} == {plan_tokens(cuts["1x16"])}
    engine = plan.engine
    lengths = [30 + i % 12 for i in range(16)]
    counts = {name: len(pack(lengths, budget(rows))) for name, rows in CUTS.items()}
    assert engine.token_budget == 1
    assert counts["16x1"] == 16 and counts["1x16"] == 1 and len(set(counts.values())) == 5


def plan_tokens(finished):
    return finished.updates[0]["supervised_tokens"]


def test_the_answers_are_ragged(cuts):
    """Else the bug would not show."""
    tokens = [line["supervised_tokens"] for line in cuts["1x16"].updates]
    assert max(tokens) > 1.02 * min(tokens)


def test_cuts_give_one_loss_curve(cuts):
    assert spread([f.losses for f in cuts.values()]) < 1e-5  # measured: 2e-7
    assert cuts["1x16"].losses[-1] < 0.9 * cuts["1x16"].losses[0]


def test_cuts_give_one_adapter(cuts):
    for finished in cuts.values():
        assert distance(cuts["1x16"].adapter, finished.adapter) < 1e-3  # measured: 6e-5; the bug's are above 0.5


def test_the_bug_would_show(run, cuts, monkeypatch):
    monkeypatch.setattr(step_module, "accumulate_gradient", mean_of_means)
    wrong = {name: run(token_budget=budget(rows)) for name, rows in CUTS.items()}
    assert spread([wrong["1x16"].losses, cuts["1x16"].losses]) < 1e-5  # one micro-batch: there is nothing to get wrong
    assert spread([f.losses for f in wrong.values()]) > 0.01  # measured: 0.07
    assert distance(wrong["1x16"].adapter, wrong["16x1"].adapter) > 0.1


@pytest.mark.parametrize("per_device", [1, 4])
def test_per_device_batch_size_changes_nothing(run, cuts, per_device):
    finished = run(per_device_train_batch_size=per_device)
    assert spread([finished.losses, cuts["1x16"].losses]) < 1e-5
    assert distance(finished.adapter, cuts["1x16"].adapter) < 1e-3


@pytest.mark.parametrize(("tune", "rate"), [("lora", 2e-2), ("qlora", 2e-2), ("full", 2e-3)])
def test_packed_equals_unpacked(run, tune, rate):
    if tune == "qlora":
        pytest.importorskip("bitsandbytes")
    alone, packed = (run(tune=tune, packing=p, learning_rate=rate, max_steps=6) for p in (False, True))
    assert alone.result.engine.token_budget < packed.result.engine.token_budget
    assert spread([alone.losses, packed.losses]) < 1e-5
    trained = [f.result.engine.trained.tensors() for f in (alone, packed)]
    assert distance(*trained) < 1e-3


def test_dropout_does_not_depend_on_the_cut(run, cuts):
    one, other = (run(lora_dropout=0.1, token_budget=b) for b in (1, 16 * LONGEST))
    assert spread([one.losses, other.losses]) < 1e-5
    assert distance(one.adapter, other.adapter) < 1e-3
    assert spread([one.losses, cuts["1x16"].losses]) > 1e-3  # and it does something
    again = run(lora_dropout=0.1, token_budget=1)
    assert again.losses == one.losses


def exactly(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def without_times(metrics):
    return [{k: v for k, v in m.items() if k not in ("tokens_per_second", "memory_bytes")} for m in metrics]


def test_same_seed_twice(run, cuts):
    again = run(token_budget=budget(4))
    assert without_times(again.metrics) == without_times(cuts["4x4"].metrics)
    assert exactly(again.adapter, cuts["4x4"].adapter)
    hashes = [[(t["name"], t["sha256"]) for t in f.summary["trained_tensors"]] for f in (again, cuts["4x4"])]
    assert hashes[0] == hashes[1]


def test_another_seed_is_another_run(run, cuts):
    other = run(token_budget=budget(4), seed=1)
    assert other.losses != cuts["4x4"].losses
    assert distance(other.adapter, cuts["4x4"].adapter) > 0.1


@pytest.mark.parametrize("eval_steps", [1, 5, 1000])
def test_evaluating_changes_nothing(run, cuts, eval_steps):
    finished = run(token_budget=budget(4), eval_steps=eval_steps)
    assert finished.losses == cuts["4x4"].losses
    assert exactly(finished.adapter, cuts["4x4"].adapter)
    asked = [step for step in range(13) if step in (0, 12) or step % eval_steps == 0]
    assert [line["step"] for line in finished.evaluations] == asked


def test_generating_changes_nothing(tiny_model_dir, tiny_tokenizer, data_file, tmp_path):
    """Replies before the first update and completions in the middle, with dropout on."""
    import numpy as np

    from welltuned.models.generate import Decoding, replies
    from welltuned.models.sample import Sampling, complete
    from welltuned.recipe import load_recipe
    from welltuned.training.events import Updated
    from welltuned.training.prepare import prepare
    from welltuned.training.run import train

    made, said = [], []

    def before(ready):
        made.append(ready)
        said.append(replies(ready.model, tiny_tokenizer, [[5, 6, 7], [8, 9]], Decoding(max_new_tokens=6)))

    def observer(event):
        if isinstance(event, Updated) and event.step in (2, 5):
            engine = made[0].engine
            engine.trained.no_dropout()
            drawn = complete(
                engine.model, engine.head, [np.array([5, 6, 7], np.int32)], [[event.step]], Sampling(max_new_tokens=6)
            )
            said.append(drawn)

    given = dict(model=str(tiny_model_dir), data=data_file, max_steps=7, learning_rate=2e-2, effective_batch_size=16)
    prepared = prepare(load_recipe(None, {**given, "lora_dropout": 0.1}))
    train(prepared, tmp_path / "a", observer, before)
    train(prepared, tmp_path / "b")
    name = "adapter/adapter_model.safetensors"
    assert len(said) == 3 and (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_gradient_checkpointing_changes_nothing(run, cuts):
    finished = run(token_budget=budget(4), gradient_checkpointing=True)
    assert finished.result.engine.model.config.num_hidden_layers == finished.summary["fused"]["checkpointed layer"]
    assert finished.losses == cuts["4x4"].losses
    assert exactly(finished.adapter, cuts["4x4"].adapter)


def test_gradient_checkpointing_with_dropout_changes_nothing(run):
    plain, recomputed = (run(lora_dropout=0.1, gradient_checkpointing=g, max_steps=4) for g in (False, True))
    assert plain.losses == recomputed.losses
    assert exactly(plain.adapter, recomputed.adapter)


def test_updates_are_the_stream(run, cuts, tiny_tokenizer):
    """Every row once an epoch, in the order that (seed, update) names; the last update of an epoch is smaller."""
    rows, seed = 72, 3407
    lengths = [line["tokens"] for line in cuts["1x16"].updates]
    for epoch in (0, 1):
        seen = [i for step in range(5) for i in update_indices(rows, seed, 16, 5 * epoch + step)]
        assert sorted(seen) == list(range(rows))
    assert len(update_indices(rows, seed, 16, 4)) == 8 and lengths[4] < 0.7 * lengths[3]
    assert sum(lengths[:5]) == sum(lengths[5:10])


def test_one_place_divides(run, cuts, monkeypatch):
    """A weight other than 1/(supervised tokens of the update) would be another run: the tests above can fail."""
    right = step_module._loss

    def doubled(engine, batch, weight):
        return right(engine, batch, 2 * weight)

    monkeypatch.setattr(step_module, "_loss", doubled)
    assert spread([[x / 2 for x in run(max_steps=1).losses], cuts["1x16"].losses[:1]]) < 1e-5


def test_rows_do_not_influence_each_other(cuts):
    """One row's loss and gradient, whatever shares its micro-batch: bit for bit the loss, to rounding the gradient."""
    from welltuned.models.packed import packed_model

    engine = cuts["1x16"].result.engine
    draw = torch.Generator().manual_seed(0)

    def example(length, origin):
        from welltuned.data.render import Example

        ids = torch.randint(3, 300, (length,), generator=draw).int().numpy()
        mask = torch.ones(length, dtype=torch.bool).numpy()
        mask[: length // 2] = False
        return Example(ids, mask, origin)

    def losses_and_gradient(examples):
        engine.trained.grad_KP.zero_()
        found = step_module.accumulate_gradient(
            replace(engine, token_budget=10_000), examples, list(range(len(examples)))
        )
        with torch.no_grad():
            per_example = step_module.evaluate(replace(engine, token_budget=10_000), examples).loss_of_example
        return per_example, engine.trained.grad_KP.double() * found.supervised_tokens

    first, second, third, other = (example(n, str(n)) for n in (31, 17, 24, 17))
    with packed_model(engine.model):
        one, gradient = losses_and_gradient([first, second, third])
        two, other_gradient = losses_and_gradient([first, other, third])
        alone = [losses_and_gradient([e]) for e in (first, second, third)]
        other_alone = losses_and_gradient([other])[1]
    assert one[0] == two[0] and one[2] == two[2] and one[1] != two[1]
    for packed, (single, _) in zip(one, alone, strict=True):
        assert packed == pytest.approx(single[0], rel=1e-6)
    total = sum(g for _, g in alone)
    largest = float(total.abs().max())
    assert float((gradient - total).abs().max()) < 1e-5 * largest
    # Exchange one row, and the sum of gradients changes by exactly the difference of those two rows' own.
    change = other_gradient - gradient
    assert float((change - (other_alone - alone[1][1])).abs().max()) < 1e-5 * largest

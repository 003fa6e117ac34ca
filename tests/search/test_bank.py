"""K arms in one bank are K separate runs, to rounding; what goes wrong in one arm stays there."""

import json

import pytest
import torch

import welltuned
from welltuned.search.arms import question_of
from welltuned.search.items import Share, SupervisedItems, gradients
from welltuned.search.sweep import sweep
from welltuned.training import optimizer as optimizer_module
from welltuned.training.checkpoint import newest

CLOSE = 1e-5


def arms_of(out, result):
    """Every arm of a search that trained all of them: (settings, losses, tensors)."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {}
    for line in lines:
        if line.get("event") == "arm_update":
            losses.setdefault(line["arm"], []).append(line["arm_loss"])
    found = newest(out, None)[0].trained
    names = {name.partition("/")[2] for name in found}
    rows = {number: k for k, number in enumerate(result.state.bank)}
    return [
        (dict(arm.settings), losses[arm.number], {name: found[f"{rows[arm.number]}/{name}"] for name in names})
        for arm in result.state.arms
    ]


def like(tensors, others):
    """Cut to the others' ranks: adapters lie in slots of the largest. What is cut off is 0."""
    found = {}
    for name, t in tensors.items():
        cut = tuple(slice(0, n) for n in others[name].shape)
        assert float(t.abs().sum()) == pytest.approx(float(t[cut].abs().sum()))
        found[name] = t[cut]
    return found


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)


@pytest.fixture(scope="module")
def banked(prepared_for, tmp_path_factory):
    """A function that trains all arms of a question in one bank, to their ends."""

    def banked(over, **options):
        out = tmp_path_factory.mktemp("bank") / "out"
        options = {"max_steps": 6, "eval_steps": 100, **options}
        return out, sweep(prepared_for(**options), question_of(None, over), out, grid=True)

    return banked


@pytest.fixture(scope="module")
def alone(tiny_model_dir, data_file, tmp_path_factory):
    """A function that trains one run of the same, and gives its losses and its adapter."""

    def alone(**options):
        out = tmp_path_factory.mktemp("run") / "out"
        usual = dict(model=str(tiny_model_dir), data=data_file, effective_batch_size=16, max_steps=6, eval_steps=100)
        usual |= dict(learning_rate=1e-2, eval_fraction=0.2, load_best_model_at_end=False)
        result = welltuned.train(out=out, **{**usual, **options})
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "grad_norm" in line], result.engine.trained.tensors()

    return alone


OPTIMIZER = dict(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, max_grad_norm=0.05, warmup_steps=3,
                 lr_scheduler_type="cosine", loraplus_lr_ratio=4.0)  # fmt: skip
ADAPTER = dict(r=4, lora_alpha=4, use_rslora=True, init_lora_weights="gaussian", seed=5, lora_dropout=0.1,
               target_modules=["q_proj", "down_proj"], layers_to_transform=[1], alpha_pattern={"q_proj": 8},
               rank_pattern={"down_proj": 2})  # fmt: skip
ROWS = dict(loss_on="everything", packing=False, max_length=40, token_budget=64, gradient_checkpointing=True)
CASES = {  # what arms differ in, and the recipe beside it
    "rates": (["learning_rate=1e-3,3e-3,1e-2"], {}),
    "ranks and alphas": (["r=2,8", "lora_alpha=8,32"], {}),
    "dropouts": (["lora_dropout=0,0.3"], {}),
    "epochs, batches": (["num_train_epochs=1,2", "effective_batch_size=8,16"], {"max_steps": 100}),
    "seeds": (["seed=1,2"], {"lora_dropout": 0.1}),
    "settings of optimizer and adapter": (["learning_rate=3e-3,1e-2"], {**OPTIMIZER, **ADAPTER}),
    "how rows are cut": (["learning_rate=3e-3,1e-2"], ROWS),
    "DoRA": (["learning_rate=3e-3,1e-2"], {"use_dora": True}),
    "PiSSA": (["learning_rate=1e-3,3e-3"], {"init_lora_weights": "pissa"}),
    "OLoRA": (["learning_rate=1e-3,3e-3"], {"init_lora_weights": "olora"}),
    "QLoRA": (["learning_rate=3e-3,1e-2"], {"tune": "qlora"}),
    "DPO": (["learning_rate=1e-3,1e-2"], {"method": "dpo", "effective_batch_size": 8}),
    "DPO, IPO's loss, r": (["r=2,8"], {"method": "dpo", "effective_batch_size": 8, "loss_type": "ipo", "beta": 0.3}),
    "ORPO": (["learning_rate=1e-3,1e-2"], {"method": "orpo", "effective_batch_size": 8, "beta": 0.3}),
    "DPO in 4 bits": (["learning_rate=1e-3,1e-2"], {"method": "dpo", "tune": "qlora", "effective_batch_size": 8}),
}
QUICK = ("rates", "ranks and alphas", "settings of optimizer and adapter", "DPO")


@pytest.mark.parametrize(
    ("over", "options"),
    [pytest.param(*case, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name, case in CASES.items()],
)
def test_a_bank_is_separate_runs(banked, alone, pairs, rows, write_rows, tmp_path, over, options):
    if options.get("tune") == "qlora":
        pytest.importorskip("bitsandbytes")
    if "method" in options:
        options = {**options, "data": pairs}
    if over[0].startswith("seed"):  # which divides the rows too, where they are not divided already
        held_out = write_rows(tmp_path / "held_out.jsonl", rows[:16])
        options = {**options, "data": write_rows(tmp_path / "train.jsonl", rows[16:]), "eval_data": held_out}
        options |= {"eval_fraction": None}
    out, result = banked(over, **options)
    arms = arms_of(out, result)
    assert len(arms) >= 2
    for settings, losses, tensors in arms:
        single, adapter = alone(**{**options, **settings})
        assert losses == pytest.approx(single, rel=CLOSE)
        assert distance(like(tensors, adapter), adapter) < CLOSE
    assert len({losses[-1] for _, losses, _ in arms}) == len(arms)  # they are different runs


def test_one_clipping_for_all_would_be_seen(banked, alone, monkeypatch):
    """The fault that an arm's clipping depends on the others."""

    def together(grad_KP, limit):
        norm = float(grad_KP.norm())
        grad_KP.mul_(min(1.0, limit / norm))
        return [norm] * len(grad_KP)

    from welltuned.search import bank as bank_module

    assert bank_module.clip_ is optimizer_module.clip_
    monkeypatch.setattr(bank_module, "clip_", together)
    out, result = banked(["learning_rate=1e-3,1e-2"], max_grad_norm=0.05)
    _, losses, tensors = arms_of(out, result)[1]
    single, adapter = alone(learning_rate=1e-2, max_grad_norm=0.05)
    assert distance(tensors, adapter) > 100 * CLOSE


def test_an_arm_that_is_not_finite_touches_no_other(banked):
    """Bit for bit: the others' gradients are the same whether arm 0 holds numbers or NaN and infinities."""
    from welltuned.models.packed import packed_model

    _, result = banked(["learning_rate=1e-3,1e-2"])
    engine = result.run.engine
    engine.trained.keep([0, 0, 0])
    bank = engine.trained
    generator = torch.Generator().manual_seed(0)
    bank.flat_KP.add_(torch.randn(bank.flat_KP.shape, generator=generator) * 0.01)
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare

    recipe = load_recipe(str(result.run.path / "recipe.yaml"))
    rows = [prepare(recipe).train[i] for i in range(6)]

    def grads():
        bank.grad_KP.zero_()
        with packed_model(engine.model):
            made = gradients(engine, SupervisedItems(), [Share(k, rows, range(6)) for k in range(3)])
        return bank.grad_KP[1:].clone(), made

    healthy, before = grads()
    for poison in (float("nan"), float("inf"), 1e30):
        bank.flat_KP[0] = poison
        poisoned, after = grads()
        assert torch.equal(poisoned, healthy)
        assert [g.loss for g in after[1:]] == [g.loss for g in before[1:]]
        assert not torch.isfinite(bank.grad_KP[0]).all() or not abs(after[0].loss) < 1e30


def test_a_diverging_arm_dies_and_the_others_are_what_they_were(banked, alone):
    out, result = banked(["learning_rate=1e-3,1e-2,1e25"])
    states = result.state.arms
    assert [a.status for a in states] == ["done", "done", "diverged"] and "not finite" in states[2].why
    assert result.state.bank == (0, 1) and newest(out, None)[0].exp_avg_KP.shape[0] == 2  # its room was given back
    for settings, losses, tensors in arms_of(
        out, result.__class__(result.run, result.found, without(result.state, 2), ())
    ):
        single, adapter = alone(**settings)
        assert losses == pytest.approx(single, rel=CLOSE)
        assert distance(tensors, adapter) < CLOSE


def without(state, number):
    from dataclasses import replace

    return replace(state, arms=tuple(a for a in state.arms if a.number != number))

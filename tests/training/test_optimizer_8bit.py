"""AdamW in 8 bits over a run: it learns as fp32's does, its state is a quarter, resumes to the bit, and is refused."""

import json
import math
import shutil

import pytest
import torch

import welltuned
from welltuned.advice.rules import number
from welltuned.errors import InputError, RunError
from welltuned.models.full import FullParameters
from welltuned.recipe import OPTIMIZERS_8BIT
from welltuned.training import run as run_module
from welltuned.training import step as step_module
from welltuned.training.checkpoint import checkpoints, folder_of, read_checkpoint
from welltuned.training.events import Skipped
from welltuned.training.optimizer import AdamWSettings, FlatAdamW, Span
from welltuned.training.optimizer_8bit import FlatAdamW8bit, make_optimizer
from welltuned.training.resume import resume

UPDATES = 8


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    return dict(
        model=str(tiny_model_dir), data=data_file, tune="full", effective_batch_size=16, max_steps=UPDATES,
        learning_rate=5e-3, eval_steps=4, save_steps=1, save_total_limit=20, load_best_model_at_end=False,
        early_stopping_patience=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("eight") / "out"
    welltuned.train(out=out, optim="adamw_8bit", **options)
    return out


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def problem(kind, columns=3000, decayed=2800, updates=300, seed=0, **settings):
    """Losses of a noisy least-squares problem whose numbers have gradients of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    size = 10 ** (-4 * torch.rand(columns, generator=draw))
    aim = torch.randn(columns, generator=draw)
    flat, grad = torch.zeros(1, columns), torch.zeros(1, columns)
    optimizer = kind(flat, grad, decayed, AdamWSettings(**settings))
    losses = []
    for step in range(updates):
        noise = 0.1 * torch.randn(columns, generator=draw)
        grad[0] = size * (flat[0] - aim + noise)
        losses.append(float((size * (flat[0] - aim) ** 2).mean()))
        optimizer.step([3e-2 * (1 - step / updates)])
    return losses


def test_it_converges_as_in_fp32():
    """To within a hundredth of what is learned, at every tenth of the way."""
    exact, coded = problem(FlatAdamW), problem(FlatAdamW8bit)
    learned = exact[0] - exact[-1]
    assert exact[-1] < 0.01 * exact[0]
    for step in range(0, 300, 30):
        assert abs(coded[step] - exact[step]) < 0.01 * learned, step
    assert coded[-1] < 0.01 * exact[0]


def test_gains_and_biases_are_fp32s():
    """What does not decay is updated bit for bit as by the other optimizer."""
    made = {}
    for kind in (FlatAdamW, FlatAdamW8bit):
        flat, grad = torch.linspace(-1, 1, 700).repeat(2, 1), torch.linspace(1, 3, 700).sin().repeat(2, 1)
        optimizer = kind(flat, grad, 600, AdamWSettings(weight_decay=0.1))
        for _ in range(3):
            optimizer.step([1e-2, 2e-2])
        made[kind] = flat
    assert torch.equal(made[FlatAdamW][:, 600:], made[FlatAdamW8bit][:, 600:])
    torch.testing.assert_close(made[FlatAdamW], made[FlatAdamW8bit], rtol=0.02, atol=2e-3)


def test_adapters_have_rates_of_their_own_and_may_be_left_alone():
    def both(rates, spans):
        flat, grad = torch.ones(2, 1000), torch.ones(2, 1000)
        optimizer = FlatAdamW8bit(flat, grad, 1000, AdamWSettings(), spans)
        for rate in rates:
            optimizer.step(rate)
        return flat, optimizer

    spans = [Span(0, 300), Span(300, 1000, 4.0)]
    flat, optimizer = both([[1e-2, None], [1e-2, 1e-3]], spans)
    moved = (1 - flat) / torch.tensor([[2e-2], [1e-3]])
    torch.testing.assert_close(moved[:, :300], torch.ones(2, 300), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved[:, 300:], 4 * torch.ones(2, 700), rtol=1e-3, atol=0)
    assert optimizer.steps_G.tolist() == [2, 1]
    untouched = both([[1e-2, None]], spans)[1]
    assert not untouched.codes["exp_avg_scale"][1].any() and untouched.codes["exp_avg_scale"][0].all()


def test_its_state_is_a_quarter(make_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model_dir(), dtype=torch.float32)
    trained = FullParameters(model)
    made = [
        kind(trained.flat_KP, trained.grad_KP, trained.decayed, AdamWSettings()) for kind in (FlatAdamW, FlatAdamW8bit)
    ]
    sizes = [sum(t.nbytes for t in (o.exp_avg_KP, o.exp_avg_sq_KP, *o.codes.values())) for o in made]
    matrices, rest = trained.decayed, trained.flat_KP.shape[1] - trained.decayed
    assert sizes[0] == 8 * (matrices + rest)
    assert sizes[1] == pytest.approx(number("memory_adam_8bit_bytes") * matrices + 8 * rest, rel=1e-3)
    assert 2.03125 / 8 < sizes[1] / sizes[0] < 0.27
    from welltuned.kernels.adamw_8bit import CHUNK

    for device in ("cpu", "cuda"):
        assert 16 * CHUNK[device] <= number(f"memory_adam_8bit_work_{device}") < 17 * CHUNK[device]


@pytest.mark.parametrize("name", ["adamw", "adamw_torch_fused", *OPTIMIZERS_8BIT])
def test_names(name):
    flat = torch.zeros(1, 300)
    made = make_optimizer(name, flat, torch.zeros_like(flat), 300, AdamWSettings(), ())
    assert isinstance(made, FlatAdamW8bit) == ("8bit" in name)


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_learns_what_fp32_learns(straight, options, tmp_path):
    welltuned.train(out=tmp_path / "fp32", **options)
    exact, coded = lines(tmp_path / "fp32"), lines(straight)
    assert exact[0]["loss"] == coded[0]["loss"]
    learned = exact[0]["loss"] - exact[-1]["loss"]
    assert learned > 0.5
    assert all(abs(a["loss"] - b["loss"]) < 0.02 * learned for a, b in zip(exact, coded, strict=True))
    assert any(a["loss"] != b["loss"] for a, b in zip(exact, coded, strict=True))


def as_killed_after(straight, step, place):
    """What a kill right after the checkpoint of `step` leaves."""
    shutil.copytree(straight, place)
    for later, folder in checkpoints(place):
        if later > step:
            shutil.rmtree(folder)
    for name in ("model", "run.json", "report.html"):
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return place


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_goes_on_to_the_bit(straight, tmp_path, step):
    run = as_killed_after(straight, step, tmp_path / "run")
    resume(run)
    for name in ("trained.safetensors", "optimizer.safetensors"):
        assert (folder_of(run, UPDATES) / name).read_bytes() == (folder_of(straight, UPDATES) / name).read_bytes()
    losses = [[line["loss"] for line in lines(at)] for at in (run, straight)]
    assert losses[0] == losses[1]


def test_a_checkpoint_holds_codes_and_scales(straight):
    found = read_checkpoint(folder_of(straight, UPDATES))
    kinds = {name: tensor.dtype for name, tensor in found.codes.items()}
    assert kinds == {
        "exp_avg_codes": torch.uint8, "exp_avg_sq_codes": torch.uint8,
        "exp_avg_scale": torch.float32, "exp_avg_sq_scale": torch.float32,
    }  # fmt: skip
    assert found.steps_G.tolist() == [UPDATES, UPDATES] and found.codes["exp_avg_scale"].any()
    files = {path.name: path.stat().st_size for path in folder_of(straight, UPDATES).iterdir()}
    assert files["optimizer.safetensors"] < 0.6 * files["trained.safetensors"]  # 2.03 bytes a number and 4


@pytest.mark.parametrize("other", ["adamw", "adamw_8bit"])
def test_another_optimizers_checkpoint_is_refused(straight, other):
    found = read_checkpoint(folder_of(straight, UPDATES))
    columns = found.codes["exp_avg_codes"].shape[1] + found.exp_avg_KP.shape[1]
    flat = torch.zeros(1, columns)
    made = make_optimizer(other, flat, torch.zeros_like(flat), columns, AdamWSettings(), ())
    words = "8-bit AdamW, and this run's optim is AdamW in fp32" if other == "adamw" else "moments of other tensors"
    with pytest.raises(RunError, match=words):
        made.restore(found.exp_avg_KP, found.exp_avg_sq_KP, found.steps_G, found.codes)


def test_a_run_does_not_go_on_with_another_optimizer(straight, tmp_path):
    run = as_killed_after(straight, 3, tmp_path / "run")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("optim: adamw_8bit", "optim: adamw"))
    with pytest.raises(InputError, match="optim was adamw_8bit and is adamw"):
        resume(run)


def test_nothing_of_a_gradient_that_is_not_finite_enters_the_state(options, tmp_path, monkeypatch):
    """The update is left out; codes and scales after it are those of before."""
    real_loss, real_step, states, made, skips = step_module._loss, FlatAdamW8bit.step, [], [], []

    def step(self, rates):
        made.append(self)
        if len(made) == 4:  # the first one after the update that was left out
            states.append({name: tensor.clone() for name, tensor in self.codes.items()})
        real_step(self, rates)
        if len(made) == 3:
            states.append({name: tensor.clone() for name, tensor in self.codes.items()})

    def loss(engine, batch, weight):
        value = real_loss(engine, batch, weight)
        return value * math.nan if len(made) == 3 and not skips else value

    def observer(event):
        if isinstance(event, Skipped):
            skips.append(event)

    monkeypatch.setattr(step_module, "_loss", loss)
    monkeypatch.setattr(FlatAdamW8bit, "step", step)
    welltuned.train(out=tmp_path / "run", observer=observer, optim="adamw_8bit", **options)
    assert [event.step for event in skips] == [4] and len(made) == UPDATES - 1
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    scales = [tensor for tensor in made[-1].codes.values() if tensor.is_floating_point()]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in scales)


def test_a_search_refuses_it(tiny_model_dir, data_file, tmp_path):
    with pytest.raises(InputError, match="moments are in fp32") as refused:
        welltuned.sweep(model=str(tiny_model_dir), data=data_file, optim="adamw_8bit", out=tmp_path / "search")
    assert refused.value.where == "optim"


def test_the_disk_is_asked_for_what_a_checkpoint_takes(options, straight, tmp_path, monkeypatch):
    """Weights and 2.03 bytes of moments, not 8: a run is not refused for room that it would not use."""
    asked = []
    monkeypatch.setattr(run_module, "require_disk", lambda out, checkpoint, *rest: asked.append(checkpoint))
    welltuned.train(out=tmp_path / "run", optim="adamw_8bit", **{**options, "max_steps": 1})
    welltuned.train(out=tmp_path / "wide", **{**options, "max_steps": 1})
    taken = sum(path.stat().st_size for path in folder_of(straight, UPDATES).glob("*.safetensors"))
    assert asked[0] == pytest.approx(taken, rel=0.05) and asked[1] > 1.9 * asked[0]

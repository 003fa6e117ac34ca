"""Ctrl-C and SIGTERM, once and twice, in every phase: a valid checkpoint, a documented exit code, a sentence."""

import os
import signal

import pytest
import torch

import welltuned
from welltuned.training import keeper as keeper_module
from welltuned.training import step as step_module
from welltuned.training.checkpoint import newest
from welltuned.training.events import Evaluated, Updated
from welltuned.training.interrupt import Interrupted
from welltuned.training.optimizer import FlatAdamW
from welltuned.training.resume import resume

UPDATES = 6


@pytest.fixture(autouse=True)
def _usual_handlers():
    """A job in the background inherits signals that are ignored, and so would these tests."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    return dict(
        model=str(tiny_model_dir), data=data_file, effective_batch_size=16, max_steps=UPDATES, r=4, lora_dropout=0.1,
        learning_rate=2e-2, eval_steps=3, save_steps=2, load_best_model_at_end=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    welltuned.train(out=out, **options)
    return out


def same(run, straight):
    name = "adapter/adapter_model.safetensors"
    return (run / name).read_bytes() == (straight / name).read_bytes()


def patched(monkeypatch, place, name, number, kinds=(signal.SIGINT,)):
    """Raise these signals when this function is called for the n-th time."""
    real, calls = getattr(place, name), []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            for kind in kinds:
                os.kill(os.getpid(), kind)
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, wrapped)


def patched_backward(monkeypatch, number, kinds):
    """The same in the middle of the n-th backward pass."""
    real, calls = step_module._loss, []

    def loss(*arguments):
        value = real(*arguments)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == number:
                value.register_hook(lambda gradient: [os.kill(os.getpid(), kind) for kind in kinds] and None)
        return value

    monkeypatch.setattr(step_module, "_loss", loss)


@pytest.mark.parametrize("kind,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_update_is_finished_and_saved(options, straight, tmp_path, kind, code, capfd):
    def observer(event):
        if isinstance(event, Updated) and event.step == 3:
            os.kill(os.getpid(), kind)

    before = signal.getsignal(kind)
    with pytest.raises(Interrupted) as caught:
        welltuned.train(out=tmp_path / "run", observer=observer, **options)
    assert caught.value.exit_code == code and signal.getsignal(kind) == before
    assert f"after update 3; update 3 of {UPDATES} is saved; go on with: welltuned resume" in str(caught.value)
    assert "once more, and it ends at once" in capfd.readouterr().err
    assert newest(tmp_path / "run", None)[0].position.step == 3
    resume(tmp_path / "run")
    assert same(tmp_path / "run", straight)


PHASES = {
    "forward": (step_module, "_loss", 4),  # of update 4
    "backward": None,
    "optimizer": (FlatAdamW, "step", 4),
    "evaluation": (step_module, "evaluate", 2),
    "save": (keeper_module, "write_checkpoint", 1),
}
TWICE = (signal.SIGINT, signal.SIGTERM)
FAST = ("backward", "save")


SLOW = pytest.mark.slow
CASES = [
    *(pytest.param(phase, (signal.SIGINT,), id=f"{phase}, Ctrl-C") for phase in PHASES),
    *(pytest.param(phase, (signal.SIGTERM,), id=f"{phase}, SIGTERM", marks=SLOW) for phase in PHASES),
    *(pytest.param(phase, TWICE, id=f"{phase}, twice", marks=() if phase in FAST else SLOW) for phase in PHASES),
]


@pytest.mark.parametrize(("phase", "kinds"), CASES)
def test_in_every_phase(options, straight, tmp_path, monkeypatch, phase, kinds):
    """Once, it ends after a save; twice, at once: the checkpoint that is there is whole either way."""
    if PHASES[phase] is None:
        patched_backward(monkeypatch, 4, kinds)
    else:
        patched(monkeypatch, *PHASES[phase], kinds)
    with pytest.raises(KeyboardInterrupt if kinds == TWICE else Interrupted) as caught:
        welltuned.train(out=tmp_path / "run", **options)
    monkeypatch.undo()
    found, notes = newest(tmp_path / "run", None)
    assert found is not None and found.position.step >= 2 and not notes
    if kinds != TWICE:
        assert caught.value.exit_code == 128 + kinds[0] and found.position.step in (3, 4)
    resume(tmp_path / "run")
    assert same(tmp_path / "run", straight)


def test_before_the_first_update_there_is_nothing_to_save(options, straight, tmp_path):
    def observer(event):
        if isinstance(event, Evaluated) and event.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="before the first update: nothing is lost"):
        welltuned.train(out=tmp_path / "run", observer=observer, **options)
    resume(tmp_path / "run")
    assert same(tmp_path / "run", straight)


def test_a_signal_that_is_ignored_stays_so(options, straight, tmp_path):
    """A job under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def observer(event):
        if isinstance(event, Updated) and event.step == 3:
            os.kill(os.getpid(), signal.SIGHUP)

    try:
        welltuned.train(out=tmp_path / "run", observer=observer, **options)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert same(tmp_path / "run", straight)

"""Ctrl-C and SIGTERM, once and twice, in every phase: a valid checkpoint, a documented exit code, a sentence."""

import os
import signal

import pytest

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


def patched(monkeypatch, place, name, number, signals=1):
    """Raise the signal when this function is called for the n-th time."""
    real, calls = getattr(place, name), []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, wrapped)


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


@pytest.mark.parametrize(
    "place,name,number",
    [
        (step_module, "_loss", 4),  # the forward pass of update 4
        (FlatAdamW, "step", 4),
        (step_module, "evaluate", 2),
        (keeper_module, "write_checkpoint", 1),
    ],
)
def test_in_every_phase(options, straight, tmp_path, monkeypatch, place, name, number):
    patched(monkeypatch, place, name, number)
    with pytest.raises(Interrupted):
        welltuned.train(out=tmp_path / "run", **options)
    monkeypatch.undo()
    found, notes = newest(tmp_path / "run", None)
    assert found is not None and found.position.step >= 2 and not notes
    resume(tmp_path / "run")
    assert same(tmp_path / "run", straight)


def test_twice_ends_at_once(options, straight, tmp_path, monkeypatch):
    patched(monkeypatch, step_module, "_loss", 5, signals=2)
    with pytest.raises(KeyboardInterrupt):
        welltuned.train(out=tmp_path / "run", **options)
    monkeypatch.undo()
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

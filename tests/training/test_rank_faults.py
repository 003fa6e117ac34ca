"""One of several ranks is killed, hangs, has a NaN, no memory or a full disk: all decide alike, or end soon."""

import errno
import os
import signal
import time

import pytest
import torch
from ranked import finished, in_ranks, trained
from test_ranks import assert_same_run, lines, notes

import welltuned
from welltuned.training import keeper as keeper_module
from welltuned.training import loop as loop_module
from welltuned.training import reduce as reduce_module
from welltuned.training import result as result_module
from welltuned.training import step as step_module
from welltuned.training.checkpoint import newest
from welltuned.training.events import Updated
from welltuned.training.ranks import Group

UPDATES = 6
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    return dict(
        model=str(tiny_model_dir), data=data_file, effective_batch_size=16, max_steps=UPDATES, r=4, dtype="float32",
        learning_rate=1e-2, eval_steps=3, save_steps=2, load_best_model_at_end=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    welltuned.train(out=out, **options)
    return out


def at_call(monkeypatch, place, name, rank, number, what):
    """On this rank, do `what` when this function is called for the n-th time."""
    real, calls = getattr(place, name), []

    def wrapped(*arguments, **more):
        if os.environ.get("RANK") == str(rank):
            calls.append(1)
            if len(calls) == number:
                what()
        return real(*arguments, **more)

    monkeypatch.setattr(place, name, wrapped)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(14)
    os._exit(9)


PLACES = {  # who, in what, at which call; the update whose checkpoint is there
    "in a backward pass": (1, step_module, "_loss", 6, 4),
    "the first, in a backward pass": (0, step_module, "_loss", 5, 4),
    "in the sum over the ranks": (1, Group, "sum_", 4, 2),
    "in a save": (0, keeper_module, "write_checkpoint", 2, 2),
    "where all compare their weights": (1, Group, "require_equal", 2, 2),
    "in the evaluation": (1, step_module, "_sums", 2, 2),
    "while the result is written": (0, result_module, "save_adapter", 1, 6),
}
QUICK = ("in the sum over the ranks", "in a save")


@pytest.mark.parametrize("place", [p if p in QUICK else pytest.param(p, marks=SLOW) for p in PLACES])
def test_a_rank_that_is_killed(options, straight, tmp_path, monkeypatch, place):
    """The others end at once, one of them says who is gone, and what was saved goes on to the same result."""
    rank, module, name, number, saved = PLACES[place]
    at_call(monkeypatch, module, name, rank, number, killed)
    run, started = tmp_path / "run", time.monotonic()
    ended = in_ranks(trained(run, **options), 2, tmp_path / "said")
    monkeypatch.undo()
    assert time.monotonic() - started < 60
    assert [e.code for e in ended] == [-signal.SIGKILL, 1] if rank == 0 else [1, -signal.SIGKILL]
    said = ended[1 - rank].said
    assert said.count("welltuned: process") == 1 and f"process {rank} of 2 is gone, and this run with it" in said
    found = newest(run, None)[0]
    assert found.position.step == saved or (saved == 4 and found.position.step == 2)  # it was being written
    welltuned.resume(run)
    assert_same_run(run, straight)


@pytest.mark.slow
def test_a_rank_that_hangs(options, straight, tmp_path, monkeypatch):
    """The others wait for it no longer than they were told to."""
    at_call(monkeypatch, step_module, "_loss", 1, 5, hangs)
    ended = in_ranks(trained(tmp_path / "run", **options), 2, tmp_path / "said", timeout=5.0)
    monkeypatch.undo()
    assert ended[0].code == 1 and "process 1 of 2 did not answer for 5 s" in ended[0].said
    assert newest(tmp_path / "run", None)[0].position.step >= 2


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def spoil(monkeypatch, bad, where):
    """The loss or the gradient of a pass with this row is not finite: on the rank that has it, and in one process."""
    real = step_module._loss
    rows = []

    def collate(examples, device):
        rows[:] = [example.origin for example in examples]
        return real_collate(examples, device)

    def loss(engine, batch, weight):
        value = real(engine, batch, weight)
        if bad not in rows:
            return value
        if where == "gradient":
            value.register_hook(lambda gradient: gradient * float("nan"))
            return value
        return value * float("nan")

    real_collate = step_module.collate
    monkeypatch.setattr(step_module, "collate", collate)
    monkeypatch.setattr(step_module, "_loss", loss)


@pytest.fixture(scope="module")
def rows_of(options):
    """Origins of the rows of each update."""
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare

    prepared = prepare(load_recipe(None, options))
    return [[prepared.train[i].origin for i in prepared.mixture.update(16, step)] for step in range(UPDATES)]


@pytest.mark.parametrize("where", ["loss", pytest.param("gradient", marks=SLOW)])
def test_a_row_that_is_not_finite_on_one_rank(options, rows_of, tmp_path, monkeypatch, where):
    """Its update is left out on all, the row is named, and the result is that of one process."""
    bad = rows_of[2][5]
    spoil(monkeypatch, bad, where)
    welltuned.train(out=tmp_path / "one", **options)
    finished(in_ranks(trained(tmp_path / "run", **options), 2, tmp_path / "said"))
    skipped, wanted = (
        [(line["step"], line["rows"]) for line in lines(tmp_path / name) if line.get("event") == "skipped"]
        for name in ("run", "one")
    )
    assert skipped == wanted and skipped[0] == (3, [bad])
    assert_same_run(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "back"])
def test_weights_of_one_rank_that_are_not_finite(options, tmp_path, monkeypatch, policy):
    """Every loss of one rank is NaN from update 5 on: back to the checkpoint, on all; or one end, said once."""
    real = step_module.accumulate_gradient
    calls = []

    def spoiled(engine, rows, keys):
        calls.append(1)
        if engine.ranks.rank == 1 and 5 <= len(calls) < 60:
            raise step_module.NotFinite("the loss is not finite in a row of mine")
        return real(engine, rows, keys)

    monkeypatch.setattr(step_module, "accumulate_gradient", spoiled)
    asked = {**options, "on_nonfinite": policy, "max_steps": 12, "num_train_epochs": None}
    ended = in_ranks(trained(tmp_path / "run", **asked), 2, tmp_path / "said")
    if policy == "back":
        finished(ended)
        assert any(
            "back to update 4, from there with 0.5 of the planned rate" in note for note in notes(tmp_path / "run")
        )
        return
    assert [e.code for e in ended] == [1, 1]
    assert "3 updates in a row were not finite" in ended[0].said and "welltuned" not in ended[1].said
    assert newest(tmp_path / "run", None)[0].position.step == 4


@pytest.mark.slow
def test_no_memory_on_one_rank(options, straight, tmp_path, monkeypatch):
    """It cuts smaller, the others soon too; the result is the same, and the user hears of it."""
    real, failures = step_module._loss, []

    def loss(engine, batch, weight):
        if engine.ranks.rank == 1 and torch.is_grad_enabled() and len(failures) < 1:
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(engine, batch, weight)

    monkeypatch.setattr(step_module, "_loss", loss)
    finished(in_ranks(trained(tmp_path / "run", **options), 2, tmp_path / "said"))
    assert any(note.startswith("process 1: update 1 ran out of memory") for note in notes(tmp_path / "run"))
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.slow
def test_an_error_of_one_rank_is_one_sentence(options, tmp_path, monkeypatch):
    def fails():
        raise ValueError("a bug of mine")

    at_call(monkeypatch, step_module, "_loss", 1, 3, fails)
    ended = in_ranks(trained(tmp_path / "run", **options), 2, tmp_path / "said")
    assert [e.code for e in ended] == [1, 1]
    assert "welltuned: process 1 of 2: ValueError: a bug of mine" in ended[0].said


def test_weights_that_are_not_the_same_are_never_saved(options, tmp_path, monkeypatch):
    real = loop_module.Loop._tell_update

    def drifting(loop, *arguments):
        if loop.ranks.rank == 1 and loop.at.step == 3:
            loop.trained.flat_KP[0, 7] += 1e-7
        real(loop, *arguments)

    monkeypatch.setattr(loop_module.Loop, "_tell_update", drifting)
    ended = in_ranks(trained(tmp_path / "run", **options), 2, tmp_path / "said")
    assert [e.code for e in ended] == [1, 1] and "welltuned" not in ended[1].said
    assert "the weights or moments after update 4 differ between process 0 and process 1 of 2" in ended[0].said
    assert newest(tmp_path / "run", None)[0].position.step == 2


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "the disk")


@pytest.mark.slow
def test_a_save_that_the_disk_refuses(options, straight, tmp_path, monkeypatch):
    """Only the first rank writes: it is told, and all go on."""
    at_call(monkeypatch, keeper_module, "write_checkpoint", 0, 1, full)
    finished(in_ranks(trained(tmp_path / "run", **options), 2, tmp_path / "said"))
    assert any("the checkpoint of update 2 could not be written (No space left" in n for n in notes(tmp_path / "run"))
    assert_same_run(tmp_path / "run", straight)


def test_a_result_that_the_disk_refuses(options, straight, tmp_path, monkeypatch):
    """All fail, one says so, and the result is only to be written again."""
    at_call(monkeypatch, result_module, "save_adapter", 0, 1, full)
    ended = in_ranks(trained(tmp_path / "run", **options), 2, tmp_path / "said")
    monkeypatch.undo()
    assert [e.code for e in ended] == [1, 1] and "welltuned" not in ended[1].said
    assert "No space left on device); what was saved before is intact" in ended[0].said
    assert newest(tmp_path / "run", None)[0].position.step == UPDATES
    welltuned.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


# ── input ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_wrong_input_is_one_sentence(options, tmp_path):
    ended = in_ranks(trained(tmp_path / "run", **{**options, "target_modules": ["nothing"]}), 2, tmp_path / "said")
    assert [e.code for e in ended] == [2, 2] and not (tmp_path / "run").exists()
    assert ended[0].said.count("welltuned:") == 1 and "nothing" in ended[0].said and "welltuned" not in ended[1].said


@pytest.mark.slow
def test_other_rows_on_another_machine(options, rows, write_rows, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_rows(tmp_path / "a" / "rows.jsonl", rows)
    write_rows(tmp_path / "b" / "rows.jsonl", rows[:-1] + rows[:1])
    train = trained(tmp_path / "run", **{**options, "data": "rows.jsonl"})

    def elsewhere(rank):
        os.chdir(tmp_path / "ab"[rank])
        return train(rank)

    ended = in_ranks(elsewhere, 2, tmp_path / "said")
    assert [e.code for e in ended] == [2, 2]
    assert "process 1 sees other input than process 0: data: rows.jsonl changed" in ended[0].said


def test_the_measures_of_an_objective_fit_behind_the_gradient():
    from welltuned.training.preference_step import Dpo, Orpo, Reward

    for judge in (Dpo, Orpo, Reward):
        assert len(judge.__dataclass_fields__["names"].default) <= reduce_module.TAIL - reduce_module.MEASURES
    assert Updated.__dataclass_fields__["measures"]

"""A checkpoint is whole or not there: killed at every call, on failing disks, cut short, with a flipped bit."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from faulty import KILLED, Faulty, failing, in_child, kill_after, kill_before, snapshot
from safetensors.torch import save

from welltuned.errors import InputError
from welltuned.training import durable
from welltuned.training.checkpoint import (
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    STATE,
    TRAINED,
    Damaged,
    _json,
    checkpoints,
    folder_of,
    newest,
    read_checkpoint,
    rotate,
    set_aside,
    verify,
    write_checkpoint,
)

FIXTURE = Path(__file__).parent / "checkpoint-format-1"
RUN = "a" * 16
FILES = (TRAINED, OPTIMIZER, STATE, MANIFEST)


@pytest.fixture(autouse=True)
def _small_writes(monkeypatch):
    monkeypatch.setattr(durable, "CHUNK", 512)  # so that a save of this size has dozens of calls


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints of updates 10 and 20."""
    for step in (10, 20):
        write_checkpoint(tmp_path, snapshot(step))
    return tmp_path


def is_what_was_saved(found, step):
    wanted = snapshot(step)
    return (
        found is not None
        and found.position.step == step
        and torch.equal(found.trained["a.lora_A"].flatten(), wanted.flat_KP[0, :200])
        and torch.equal(found.trained["a.lora_B"].flatten(), wanted.flat_KP[0, 200:])
        and torch.equal(found.exp_avg_KP, wanted.exp_avg_KP)
        and torch.equal(found.exp_avg_sq_KP, wanted.exp_avg_sq_KP)
        and torch.equal(found.steps_G, wanted.steps_G)
        and found.metrics_bytes == 100 * step
        and dict(found.position.monitor) == {"seen": [step]}
    )


def test_what_is_read_is_what_was_written(run):
    found, notes = newest(run, RUN)
    assert is_what_was_saved(found, 20) and not notes
    assert {p.name for p in found.folder.iterdir()} == set(FILES)
    assert found.position.before.loss == 2.5 and found.position.before.standard_error != found.position.before.loss
    assert found.position.before.loss_of_example == (2.5,) and found.identity == {"recipe": {"r": 4}}


def test_no_pickle(run):
    """Every file begins as JSON does, or as safetensors do: a length and a JSON header."""
    for path in folder_of(run, 20).iterdir():
        data = path.read_bytes()
        head = data if path.suffix == ".json" else data[8 : 8 + int.from_bytes(data[:8], "little")]
        assert isinstance(json.loads(head), dict)


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_and_rotate(run, keep=2, best=None):
    write_checkpoint(run, snapshot(30, best=best))
    rotate(run, keep, best, RUN)


def calls_of(monkeypatch, run, work):
    """The names of the calls that `work` makes, on a copy of the run."""
    copy = shutil.copytree(run, run.with_name(run.name + "-copy"))
    system = Faulty()
    monkeypatch.setattr(durable, "SYSTEM", system)
    work(copy)
    monkeypatch.undo()
    monkeypatch.setattr(durable, "CHUNK", 512)
    return system.calls


def test_killed_at_every_call_of_a_save_and_its_rotation(run, monkeypatch, tmp_path_factory):
    """Before each call, which is after the one before it, and after the last."""
    calls = calls_of(monkeypatch, run, save_and_rotate)
    assert len(calls) >= 30 and {"open", "write", "fsync", "rename", "unlink", "remove_folder"} <= set(calls)
    renamed = calls.index("rename")  # the one call that makes a checkpoint of it
    for at in range(len(calls) + 1):
        place = tmp_path_factory.mktemp("killed") / "run"
        shutil.copytree(run, place)

        def work(place=place, at=at):
            durable.SYSTEM = Faulty(at, kill_before) if at < len(calls) else Faulty(at - 1, kill_after)
            save_and_rotate(place)

        assert in_child(work) == KILLED
        found, notes = newest(place, RUN)
        assert is_what_was_saved(found, 30 if at > renamed else 20) and not notes, (at, calls[at:])
        durable.sweep(place / "checkpoints")  # what a resumed run does first
        save_and_rotate(place)
        assert [step for step, _ in checkpoints(place)] == [30, 20]
        assert is_what_was_saved(newest(place, RUN)[0], 30)
        assert {p.name for p in (place / "checkpoints").iterdir()} == {"step-000020", "step-000030"}


def test_killed_in_the_middle_of_every_write(run, monkeypatch, tmp_path_factory):
    calls = calls_of(monkeypatch, run, save_and_rotate)
    for at in (n for n, name in enumerate(calls) if name == "write"):
        place = tmp_path_factory.mktemp("torn") / "run"
        shutil.copytree(run, place)

        def work(place=place, at=at):
            system = durable.SYSTEM = Faulty(at, lambda name, do: (system.torn(), os._exit(KILLED)))
            save_and_rotate(place)

        assert in_child(work) == KILLED
        assert is_what_was_saved(newest(place, RUN)[0], 20)


def test_the_kills_would_be_seen(run, monkeypatch):
    """Planted: a save that writes in place, as trainers do, and is killed half way."""
    folder = folder_of(run, 30)
    folder.mkdir()
    for name in FILES[:2]:
        shutil.copy(folder_of(run, 20) / name, folder / name)
    found, notes = newest(run, RUN)
    assert is_what_was_saved(found, 20)
    assert notes == (
        "the checkpoint of update 30 was set aside as checkpoints/damaged/step-000030: "
        "manifest.json is missing: the save was cut short",
    )


# ── failing disks ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_at_any_call_leaves_the_older_ones(run, monkeypatch, tmp_path_factory, number):
    calls = calls_of(monkeypatch, run, save_and_rotate)
    renamed = calls.index("rename")
    for at in range(len(calls)):
        place = tmp_path_factory.mktemp("failing") / "run"
        shutil.copytree(run, place)
        monkeypatch.setattr(durable, "SYSTEM", Faulty(at, failing(number)))
        with pytest.raises(OSError):
            save_and_rotate(place)
        monkeypatch.setattr(durable, "SYSTEM", durable.System())
        assert is_what_was_saved(newest(place, RUN)[0], 30 if at > renamed else 20)
        save_and_rotate(place)  # the disk is well again
        durable.sweep(place / "checkpoints")
        assert [step for step, _ in checkpoints(place)] == [30, 20]


def test_no_room_is_known_before_anything_is_written(run, monkeypatch):
    system = Faulty()
    system.free = lambda path: 1000
    monkeypatch.setattr(durable, "SYSTEM", system)
    with pytest.raises(OSError) as caught:
        write_checkpoint(run, snapshot(30))
    assert caught.value.errno == errno.ENOSPC and not system.calls


def test_what_is_read_back_is_compared_before_it_gets_its_name(run, monkeypatch):
    """Planted: a disk that takes every byte and keeps others."""
    system = Faulty()
    real = system.write

    def lying(number, data):
        real(number, memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1])))
        return len(data)

    system.write = lying
    monkeypatch.setattr(durable, "SYSTEM", system)
    with pytest.raises(Damaged):
        write_checkpoint(run, snapshot(30))
    assert [step for step, _ in checkpoints(run)] == [20, 10]


# ── damaged ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FILES)
def test_cut_at_every_eighth(run, name):
    path = folder_of(run, 20) / name
    whole = path.read_bytes()
    for eighth in range(8):
        path.write_bytes(whole[: len(whole) * eighth // 8])
        with pytest.raises(Damaged, match=name):
            read_checkpoint(path.parent)
    path.write_bytes(whole)
    assert is_what_was_saved(read_checkpoint(path.parent), 20)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere(run, name):
    path = folder_of(run, 20) / name
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(Damaged, match=name):
            verify(path.parent)


@pytest.mark.parametrize("size", [0, 40, 888])
def test_an_adapter_of_a_few_bytes(run, size):
    """As trainers have left them; the last one is a sound safetensors file with nothing in it."""
    empty = save({}, {"padding": "x" * 900})
    (folder_of(run, 20) / TRAINED).write_bytes(empty[:size])
    found, notes = newest(run, RUN)
    assert is_what_was_saved(found, 10)
    assert f"{TRAINED} has {size:,} bytes instead of" in notes[0]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(run, name):
    (folder_of(run, 20) / name).unlink()
    found, notes = newest(run, RUN)
    assert is_what_was_saved(found, 10) and f"{name} is missing" in notes[0]
    aside = run / "checkpoints" / "damaged" / "step-000020"
    assert aside.is_dir() and f"{name} is missing" in aside.with_name("step-000020.reason.txt").read_text()


def test_a_file_that_does_not_belong_is_named_and_not_read(run):
    (folder_of(run, 20) / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder_of(run, 20) / ".DS_Store").write_bytes(b"")
    found, notes = newest(run, RUN)
    assert is_what_was_saved(found, 20)
    assert notes == ("checkpoints/step-000020 holds files that no checkpoint has: optimizer.pt",)


def test_all_damaged(run):
    for _, folder in checkpoints(run):
        (folder / STATE).write_bytes(b"{}")
    found, notes = newest(run, RUN)
    assert found is None and len(notes) == 2


def test_set_aside_twice(run):
    set_aside(folder_of(run, 20), "first")
    write_checkpoint(run, snapshot(20))
    assert set_aside(folder_of(run, 20), "second").name == "step-000020-2"


def test_a_stale_one_with_a_higher_number(run):
    """Of another run, and of this one under another's name."""
    write_checkpoint(run, snapshot(900, run="b" * 16))
    shutil.copytree(folder_of(run, 10), folder_of(run, 800))
    found, notes = newest(run, RUN)
    assert is_what_was_saved(found, 20)
    assert "another run" in notes[0] and "holds update 10 under the name of update 800" in notes[1]


def test_clocks_do_not_matter(run):
    for step, when in ((10, 2e9), (20, 0)):
        for path in (folder_of(run, step), *folder_of(run, step).iterdir()):
            os.utime(path, (when, when))
    assert is_what_was_saved(newest(run, RUN)[0], 20)
    write_checkpoint(run, snapshot(30))
    rotate(run, 1, None, RUN)
    assert [step for step, _ in checkpoints(run)] == [30]


def test_checkpoints_on_another_disk(tmp_path):
    """The folder may be a link to where there is room: what is written beside lies there too."""
    other = tmp_path / "other"
    other.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(other)
    write_checkpoint(run, snapshot(10))
    assert is_what_was_saved(newest(run, RUN)[0], 10) and (other / "step-000010").is_dir()


# ── rotation ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_and_the_best_stay(run):
    for step in (30, 40):
        write_checkpoint(run, snapshot(step))
        rotate(run, 2, 10, RUN)
    assert [step for step, _ in checkpoints(run)] == [40, 30, 10]


def test_others_are_not_rotated_and_do_not_count(run):
    write_checkpoint(run, snapshot(900, run="b" * 16))
    (folder_of(run, 800)).mkdir()
    rotate(run, 1, None, RUN)
    assert [step for step, _ in checkpoints(run)] == [900, 800, 20]


def test_one_that_is_there_is_not_written_again(run, monkeypatch):
    system = Faulty()
    monkeypatch.setattr(durable, "SYSTEM", system)
    write_checkpoint(run, snapshot(20))
    assert not system.calls
    (folder_of(run, 20) / STATE).unlink()
    write_checkpoint(run, snapshot(20))
    assert is_what_was_saved(newest(run, RUN)[0], 20)


# ── formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_format_1_is_read():
    """A checkpoint as the first version wrote it, of `faulty.snapshot(7)`."""
    assert is_what_was_saved(read_checkpoint(FIXTURE / "checkpoints" / "step-000007"), 7)


def test_the_fixture_is_older_than_what_is_written_now(run):
    """It lacks what was added since, which is read with its default; it is never written again."""
    old = json.loads((FIXTURE / "checkpoints" / "step-000007" / STATE).read_text())["position"]
    new = json.loads((folder_of(run, 20) / STATE).read_text())["position"]
    assert new["before"].keys() - old["before"].keys() >= {"tokens_of_example", "samples", "notes"}
    found = read_checkpoint(FIXTURE / "checkpoints" / "step-000007")
    assert found.position.before.tokens_of_example == () and found.position.before.notes == ()


def test_a_newer_format_is_not_taken_for_damaged(run):
    path = folder_of(run, 20) / MANIFEST
    plain = {**json.loads(path.read_text()), "format": FORMAT + 1}
    del plain["sha256"]
    from hashlib import sha256

    path.write_bytes(_json({**plain, "sha256": sha256(_json(plain)).hexdigest()}))
    with pytest.raises(InputError, match=f"format {FORMAT + 1}, and this version reads up to {FORMAT}"):
        newest(run, RUN)
    assert folder_of(run, 20).is_dir()

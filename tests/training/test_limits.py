"""Limits that the kernel really sets, on processes of their own: file sizes, addresses, another file system."""

import errno
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
from faulty import in_child, snapshot

import welltuned
from welltuned.errors import InputError, RunError
from welltuned.training import durable
from welltuned.training.checkpoint import checkpoints, newest, write_checkpoint
from welltuned.training.events import Note, Updated
from welltuned.training.resume import resume

RUN = "a" * 16


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    return dict(
        model=str(tiny_model_dir), data=data_file, effective_batch_size=16, max_steps=6, r=4, lora_dropout=0.1,
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


def steps(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


# ── files that may not grow ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_that_may_not_grow_ends_a_save_and_leaves_the_older_one(tmp_path):
    """RLIMIT_FSIZE: the kernel itself cuts a write short and refuses the next."""
    write_checkpoint(tmp_path, snapshot(10))

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # a checkpoint's tensors take 2,400 bytes
        try:
            write_checkpoint(tmp_path, snapshot(20))
        except OSError as error:
            os._exit(error.errno)

    assert in_child(work) == errno.EFBIG
    found, notes = newest(tmp_path, RUN)
    assert found.position.step == 10 and not notes
    durable.sweep(tmp_path / "checkpoints")
    write_checkpoint(tmp_path, snapshot(20))
    assert newest(tmp_path, RUN)[0].position.step == 20


def test_a_run_whose_files_may_not_grow_goes_on_to_its_end_and_can_be_finished(options, straight, tmp_path):
    def work():
        seen = []

        def observer(event):
            seen.append(event)
            if isinstance(event, Updated) and event.step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

        try:
            welltuned.train(out=tmp_path / "run", observer=observer, **options)
        except RunError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            texts = [event.text for event in seen if isinstance(event, Note)]
            made = [event.step for event in seen if isinstance(event, Updated)]
            (tmp_path / "said.json").write_text(json.dumps([texts, made, str(error)]))
            os._exit(1)

    assert in_child(work) == 1
    texts, made, failed = json.loads((tmp_path / "said.json").read_text())
    assert made == [1, 2, 3, 4, 5, 6] and os.strerror(errno.EFBIG) in failed
    assert any("the checkpoint of update 4 could not be written (File too large)" in text for text in texts)
    assert newest(tmp_path / "run", None)[0].position.step == 2
    resume(tmp_path / "run")
    assert same(tmp_path / "run", straight) and steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


# ── places that cannot be written ────────────────────────────────────────────────────────────────────────────────────


def test_a_place_that_cannot_be_written_is_refused_before_training(options):
    with pytest.raises(InputError, match="the output directory cannot be"):
        welltuned.train(out=Path("/proc/self/run"), **options)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root; faults.py's EACCES and EROFS do it there")
def test_a_run_that_becomes_read_only_is_told(options, tmp_path):
    run = tmp_path / "run"

    def observer(event):
        if isinstance(event, Updated) and event.step == 3:
            (run / "checkpoints").chmod(0o555)

    with pytest.raises(RunError, match="could not be written"):
        try:
            welltuned.train(out=run, observer=observer, **options)
        finally:
            (run / "checkpoints").chmod(0o755)
    assert newest(run, None)[0].position.step == 2


# ── another file system ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def other_disk(tmp_path):
    """A folder on another file system than the tests' own."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


class CutOff(Exception):
    """The run ends here, as it would by a kill."""


def cut_off_at(step):
    def observer(event):
        if isinstance(event, Updated) and event.step == step:
            raise CutOff

    return observer


def test_checkpoints_that_were_moved_to_another_file_system(options, straight, tmp_path, other_disk):
    """A link to where there is room: nothing is ever renamed from one file system to the other (EXDEV)."""
    run = tmp_path / "run"
    with pytest.raises(CutOff):
        welltuned.train(out=run, observer=cut_off_at(3), **options)
    with pytest.raises(OSError) as caught:
        os.rename(run / "checkpoints", other_disk / "checkpoints")
    assert caught.value.errno == errno.EXDEV  # they are two
    shutil.move(run / "checkpoints", other_disk / "checkpoints")
    (run / "checkpoints").symlink_to(other_disk / "checkpoints")
    (next(iter(checkpoints(run)))[1] / "state.json").write_text("{}")  # to be set aside there as well
    resume(run)
    assert same(run, straight) and (run / "checkpoints").is_symlink()
    assert (other_disk / "checkpoints" / "damaged" / "step-000002").is_dir()


def test_a_run_whose_folder_is_a_link(options, straight, tmp_path, other_disk):
    (tmp_path / "run").symlink_to(other_disk)
    with pytest.raises(CutOff):
        welltuned.train(out=tmp_path / "run", observer=cut_off_at(5), **options)
    resume(tmp_path / "run")
    assert same(other_disk, straight)


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_clock_that_goes_backwards(options, straight, tmp_path, monkeypatch):
    """Each look at the clock is a day before the last, in the run and after its resuming; all files have one time."""
    days = iter(range(20_000, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(days) * 86_400.0)
    with pytest.raises(CutOff):
        welltuned.train(out=tmp_path / "run", observer=cut_off_at(5), **options)
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (86_400, 86_400))
    seen = []
    resume(tmp_path / "run", seen.append)
    assert same(tmp_path / "run", straight)
    assert Note("goes on after update 4 of 6") in seen
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seconds"] >= 0


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS holds on Linux")
def test_a_limit_on_addresses_is_a_refusal_before_anything_is_loaded(make_model_dir, data_file, tmp_path):
    """`ulimit -v`: the plan sees it, as it sees a cgroup's limit, instead of an allocation that fails somewhere."""
    model = str(make_model_dir(hidden_size=512, intermediate_size=1024, num_hidden_layers=6))
    options = dict(model=model, data=data_file, tune="full", max_steps=2, effective_batch_size=16)
    needed = welltuned.plan(**options).memory.total_bytes
    assert needed > 200 * 2**20

    def work():
        mapped = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (mapped + needed // 2, resource.RLIM_INFINITY))
        try:
            welltuned.train(out=tmp_path / "run", **options)
        except InputError as error:
            (tmp_path / "said").write_text(str(error))
            os._exit(2)

    assert in_child(work) == 2
    assert "the run needs about" in (tmp_path / "said").read_text() and not (tmp_path / "run").exists()


# ── data that change while they are trained on ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("left", [700, pytest.param(0, marks=pytest.mark.slow)])
def test_data_cut_short_while_they_are_trained_on(options, straight, data_file, tmp_path, left):
    """What is trained on is what was read at the start; going on with the file as it is now must be asked for."""
    data = tmp_path / "rows.jsonl"
    shutil.copy(data_file, data)

    def observer(event):
        if isinstance(event, Updated) and event.step == 2:
            os.truncate(data, left)
        if isinstance(event, Updated) and event.step == 5 and cut:
            raise CutOff

    cut = False
    welltuned.train(out=tmp_path / "whole", observer=observer, **{**options, "data": str(data)})
    assert same(tmp_path / "whole", straight)
    cut = True
    shutil.copy(data_file, data)
    with pytest.raises(CutOff):
        welltuned.train(out=tmp_path / "run", observer=observer, **{**options, "data": str(data)})
    with pytest.raises(InputError):
        resume(tmp_path / "run")
    shutil.copy(data_file, data)
    resume(tmp_path / "run")
    assert same(tmp_path / "run", straight)

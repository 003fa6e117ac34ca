"""A search over several processes: what one bank gives, also where a worker or all of it is lost."""

import json
import os
import signal
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file

import welltuned
from welltuned.errors import InputError
from welltuned.search import cluster as cluster_module
from welltuned.search.arms import question_of
from welltuned.search.events import ArmJudged, ArmUpdated
from welltuned.search.sweep import resume_sweep, sweep
from welltuned.training.events import Note

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
RATES = ["learning_rate=1e-3,3e-3,1e-2"]


def test_without_ray_one_sentence(prepared_for, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Ray is not installed.*welltuned\[ray\]"):
        sweep(prepared_for(), question_of(None, []), tmp_path / "out", ray="local")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def local_ray():
    """One local Ray for all tests, with workers' output kept out of theirs."""
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # else they wait for whatever else runs
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(prepared_for, tmp_path_factory):
    """The same search in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, sweep(prepared_for(save_steps=2), question_of(None, RATES), out)


def adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def require_same(out, found, whole):
    """To rounding: the workers' banks are smaller, and products of other sizes round otherwise."""
    one, other = whole[1].found, found.found
    assert one.winner == other.winner and one.tokens == other.tokens and one.evaluated == other.evaluated
    for a, b in zip(one.rows, other.rows, strict=True):
        assert (a.settings, a.status, a.updates, a.tokens) == (b.settings, b.status, b.updates, b.tokens)
        assert [look.loss for look in a.looks] == pytest.approx([look.loss for look in b.looks], rel=1e-5)
    mine, theirs = adapter(out), adapter(whole[0])
    assert max(float((mine[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs) < 1e-5
    run = json.loads((out / "run.json").read_text())
    assert run["sweep"]["winner"] == one.winner and run["held_out"]["after"]["loss"] == pytest.approx(
        whole[1].run.after.loss, rel=1e-5
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in other.rows:  # every update once, in order, whatever was lost on the way
        steps = [x["step"] for x in lines if x.get("event") == "arm_update" and x["arm"] == row.number]
        assert steps == list(range(1, row.updates + 1))
    assert welltuned.verify(out).problems == ()
    assert not (out / "workers").exists() and not (out / "search.json").exists()


@needs_ray
@pytest.mark.slow
def test_a_worker_that_is_killed_goes_on_from_its_checkpoint(local_ray, prepared_for, tmp_path, whole):
    out, told, killed = tmp_path / "out", [], []

    def watch(event):
        told.append(event)
        if isinstance(event, ArmUpdated) and event.arm == 2 and event.step >= 4 and not killed:
            killed.append(json.loads((out / "workers" / "1" / ".lock").read_text())["pid"])
            os.kill(killed[0], signal.SIGKILL)

    found = sweep(prepared_for(save_steps=2), question_of(None, RATES), out, watch, ray="local", workers=2)
    assert killed
    notes = " ".join(event.text for event in told if isinstance(event, Note))
    assert "2 workers of a Ray cluster begin with 1 and 2 arms" in notes
    assert any(isinstance(event, ArmJudged) for event in told)
    require_same(out, found, whole)


class Killed(BaseException):
    pass


@needs_ray
@pytest.mark.slow
def test_a_search_whose_head_was_lost_goes_on(local_ray, prepared_for, tmp_path, whole):
    out = tmp_path / "out"

    def kill(event):
        if isinstance(event, ArmJudged):
            raise Killed

    with pytest.raises(Killed):
        sweep(prepared_for(save_steps=2), question_of(None, RATES), out, kill, ray="local", workers=2)
    assert not (out / "run.json").exists()
    require_same(out, resume_sweep(out), whole)

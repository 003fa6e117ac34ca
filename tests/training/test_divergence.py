"""A run that diverges fails: with the best weights from before as its result, or with none; and what comes after."""

import json
import shutil

import pytest
from safetensors.torch import load_file

import welltuned
from welltuned.errors import InputError, RunError
from welltuned.training.checkpoint import checkpoints, folder_of
from welltuned.training.events import Finding, Note, Updated
from welltuned.training.resume import resume

UPDATES = 30


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    """The rate rises for 20 updates: at first it teaches, and then it destroys."""
    return dict(
        model=str(tiny_model_dir), data=data_file, effective_batch_size=16, r=8, learning_rate=0.6, warmup_steps=20,
        max_steps=UPDATES, eval_steps=1, save_steps=4, eval_fraction=0.2, early_stopping_patience=3,
        load_best_model_at_end=True,
    )  # fmt: skip


def trained(out, options, **changes):
    """Events, result, and why it failed."""
    seen, failed, result = [], None, None
    try:
        result = welltuned.train(out=out, observer=seen.append, **{**options, **changes})
    except RunError as error:
        failed = str(error)
    return seen, result, failed


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def updates(run):
    return [line for line in metrics(run) if "loss" in line]


def texts(seen):
    return [event.text for event in seen if isinstance(event, Note)]


def lowered(run, rate="0.02"):
    """What the message says to do: another learning_rate in recipe.yaml."""
    text = (run / "recipe.yaml").read_text()
    assert text.count("learning_rate: 0.6") == 1
    (run / "recipe.yaml").write_text(text.replace("learning_rate: 0.6", f"learning_rate: {rate}"))


# ── the best weights from before are the result ──────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def with_best(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("best") / "run"
    seen, result, failed = trained(out, options)
    assert failed is None
    return out, seen, result


def test_the_result_is_the_best_from_before_and_the_run_says_that_it_diverged(with_best):
    out, seen, result = with_best
    summary = json.loads((out / "run.json").read_text())
    best = summary["best_step"]
    assert 0 < best < result.updates < UPDATES
    assert result.diverged.startswith(f"stopped after {result.updates} updates: ")
    assert summary["diverged"] == summary["stop_reason"] == result.diverged
    assert result.after.loss < result.before.loss
    assert summary["held_out"]["after"]["loss"] == result.after.loss
    [found] = [f for f in summary["findings"] if f["id"] == "divergence"]
    assert found["changes"]["learning_rate"] < 0.3 and found["severity"] == "error"
    weights, kept = (
        load_file(place)
        for place in (out / "adapter" / "adapter_model.safetensors", folder_of(out, best) / "trained.safetensors")
    )
    for name, tensor in kept.items():
        assert weights[f"base_model.model.{name}.weight"].equal(
            tensor.view_as(weights[f"base_model.model.{name}.weight"])
        )


def test_what_metrics_hold_of_it(with_best):
    out, seen, result = with_best
    lines = metrics(out)
    assert [line["step"] for line in updates(out)] == list(range(1, result.updates + 1))
    said = [line for line in lines if "event" in line]
    assert [line["event"] for line in said[-3:]] == ["finding", "note", "note"]
    assert said[-2] == {"event": "note", "text": result.diverged}
    assert said[-1]["text"].endswith(f"are the result, not those of the last, {result.updates}")
    assert [f.id for f in seen if isinstance(f, Finding)].count("divergence") == 1


def test_killed_while_its_result_was_written(with_best, tmp_path):
    """It goes on, finds no update to make, and ends as it would have."""
    out, _, result = with_best
    run = tmp_path / "run"
    shutil.copytree(out, run)
    (run / "run.json").unlink()
    (run / "adapter" / "adapter_config.json").unlink()
    again = resume(run)
    assert again.diverged == result.diverged and again.after.loss == result.after.loss
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (out / name).read_bytes()


# ── no better weights were kept ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def without_best(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("none") / "run"
    _, result, failed = trained(out, options, load_best_model_at_end=False, save_steps=1)
    assert result is None
    return out, failed


@pytest.fixture
def failed_run(without_best, tmp_path):
    return shutil.copytree(without_best[0], tmp_path / "run"), without_best[0]


def test_it_fails_and_has_no_result(without_best):
    out, failed = without_best
    assert failed.startswith("stopped after ") and "no better weights were kept, so there is no result" in failed
    assert failed.endswith(f"lower learning_rate in {out / 'recipe.yaml'} and: welltuned resume {out} --accept-changes")
    assert not (out / "run.json").exists() and not (out / "adapter").exists()
    assert [line["id"] for line in metrics(out) if line.get("event") == "finding"].count("divergence") == 1


def test_gone_on_with_as_it_is_it_fails_again_and_changes_nothing(failed_run):
    run, before = failed_run
    with pytest.raises(RunError, match="no better weights were kept.*--accept-changes"):
        resume(run)
    assert updates(run) == updates(before) and not (run / "run.json").exists()
    assert [step for step, _ in checkpoints(run)] == [step for step, _ in checkpoints(before)]


def test_a_lower_rate_must_be_accepted_and_goes_on_from_the_best(failed_run):
    run, _ = failed_run
    best = min((line for line in metrics(run) if "eval_loss" in line), key=lambda line: line["eval_loss"])["step"]
    diverged_at = updates(run)[-1]["step"]
    lowered(run)
    with pytest.raises(InputError, match="learning_rate was 0.6 and is 0.02.*--accept-changes"):
        resume(run)
    seen = []
    result = resume(run, seen.append, accept_changes=True)
    said = f"the run had diverged; it goes on from update {best}, the best on the held-out rows"
    assert said in texts(seen) and result.diverged is None and result.updates == UPDATES
    assert [event.step for event in seen if isinstance(event, Updated)] == list(range(best + 1, UPDATES + 1))
    assert [line["step"] for line in updates(run)] == list(range(1, UPDATES + 1))
    assert max(line["learning_rate"] for line in updates(run) if line["step"] > best) <= 0.02
    assert result.after.loss < result.before.loss
    aside = run / "checkpoints" / "damaged" / f"step-{diverged_at:06d}"
    assert aside.is_dir() and "the run diverged" in aside.with_name(aside.name + ".reason.txt").read_text()


def test_where_the_held_out_rows_cannot_tell_it_starts_over(options, tmp_path):
    run = tmp_path / "run"
    # four rows: there is no best to go back to
    changes = dict(eval_fraction=0.05, save_steps=2, max_steps=12)
    _, _, failed = trained(run, options, **changes)
    assert "no better weights were kept" in failed
    lowered(run)
    seen = []
    result = resume(run, seen.append, accept_changes=True)
    assert "the run had diverged; it goes on from its start" in texts(seen) and result.diverged is None
    assert [line["step"] for line in updates(run)] == list(range(1, 13)) == [
        event.step for event in seen if isinstance(event, Updated)
    ]  # fmt: skip


def test_a_stop_that_is_no_divergence_is_no_failure(options, tmp_path, monkeypatch):
    """A held-out loss that has turned ends a run early, and well."""
    from welltuned.training.watch import Watch

    monkeypatch.setattr(Watch, "_reason_to_stop", lambda self, new: "enough" if self.history.step == 4 else None)
    _, result, failed = trained(tmp_path / "run", options, learning_rate=0.02)
    assert failed is None and result.diverged is None and result.updates == 4
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary["stop_reason"] == "enough" and summary["diverged"] is None

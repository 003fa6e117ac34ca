"""Runs that go wrong, each in its own way, and healthy ones: what is said, and that nothing is said."""

import math

import pytest

from welltuned.cli.terminal import Progress, console
from welltuned.training import step as step_module
from welltuned.training.events import Note, Severity
from welltuned.training.monitor.overfitting import ranked
from welltuned.training.monitor.thresholds import limit


@pytest.fixture(scope="module")
def learned_by_heart(watched, noise):
    """60 rows of noise, 40 times, with every weight free to remember them: a few times would do."""
    return watched(
        data=noise(60, seed=1), eval_data=noise(60, seed=2), eval_fraction="auto", tune="full", learning_rate=1e-2,
        num_train_epochs=40, eval_steps=8, early_stopping_patience=3, load_best_model_at_end=False,
    )  # fmt: skip


# ── healthy ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 3},
        {"num_train_epochs": 3, "seed": 5, "lr_scheduler_type": "cosine", "effective_batch_size": 8},
        {"num_train_epochs": 4, "tune": "full", "learning_rate": 5e-3},
        {"num_train_epochs": 3, "lora_dropout": 0.1, "r": 16},
    ],
    ids=["lora", "cosine", "full", "dropout"],
)
def test_nothing_is_said_of_a_healthy_run(watched, options):
    run = watched(**options)
    assert run.evaluations[-1].eval_loss < 0.8 * run.evaluations[0].eval_loss  # it is one
    assert run.findings == {} and run.error is None
    assert run.summary["stop_reason"] is None
    assert run.summary["best_step"] == min(run.evaluations, key=lambda e: e.eval_loss).step


def test_nothing_is_said_of_a_model_that_learns_another_job(watched, schooled_dir, rows, write_rows, tmp_path):
    """Its loss starts high, falls fast and then hardly: the usual course of a fine-tuning."""
    swapped = [{"messages": [row["messages"][0], _swapped(row["messages"][1])]} for row in rows]
    data = write_rows(tmp_path / "swapped.jsonl", swapped)
    run = watched(model=schooled_dir, data=data, num_train_epochs=4)
    assert run.evaluations[-1].eval_loss < 0.8 * run.evaluations[0].eval_loss
    assert run.findings == {}


def _swapped(message):
    pairs = (pair.partition(":") for pair in message["content"].split())
    return {**message, "content": " ".join(f"{colour}:{thing}" for thing, _, colour in pairs)}


def test_watching_changes_nothing(watched, monkeypatch):
    """Bit for bit the same losses where nobody watches."""
    from welltuned.training.watch import Watch

    seen = watched(max_steps=6)
    monkeypatch.setattr(Watch, "see", lambda self, event: ())
    unseen = watched(max_steps=6)
    assert [u.loss for u in seen.updates] == [u.loss for u in unseen.updates]
    assert [e.eval_loss for e in seen.evaluations] == [e.eval_loss for e in unseen.evaluations]


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_overfitting(learned_by_heart):
    run, found = learned_by_heart, learned_by_heart.findings["overfitting"]
    best = min(run.evaluations, key=lambda e: e.eval_loss)
    assert found.severity is Severity.WARNING and found.step > best.step
    assert f"{best.eval_loss:.3f} (update {best.step})" in found.what and "training loss" in found.what
    assert "60 rows" in found.cause
    texts = [remedy.text for remedy in found.remedies]
    assert texts[0] == f"use the weights of update {best.step}, where the held-out loss was lowest"
    assert found.remedies[0].changes == {"load_best_model_at_end": True}
    assert any("add rows: 60 rows" in text for text in texts)
    epochs = next(r.changes["num_train_epochs"] for r in found.remedies if "num_train_epochs" in r.changes)
    assert epochs == pytest.approx(best.step / 4, abs=0.01)  # 4 updates an epoch


@pytest.mark.parametrize(("rate", "first"), [(1e-3, "num_train_epochs"), (1e-2, "learning_rate")])
def test_remedies_are_ranked_for_the_run(planned, rate, first):
    """With a sound rate fewer epochs come first, with one above its range a lower rate; what cannot act is left out."""
    plan = planned(num_train_epochs=60, learning_rate=rate, load_best_model_at_end=True)
    keys = [key for remedy in ranked(plan, best=plan.updates // 4) for key in remedy.changes]
    assert keys[0] == first and {"num_train_epochs", "learning_rate", "lora_dropout"} <= set(keys)
    assert ("weight_decay" in keys) == (rate == 1e-2)  # it acts over 1/(rate · decay) updates
    texts = [remedy.text for remedy in ranked(plan, best=plan.updates // 4)]
    assert any("add rows" in text for text in texts) and "scale the finished adapter" in texts[-1]
    short = planned(num_train_epochs=1, learning_rate=rate)
    early = ranked(short, best=short.updates // 2)  # the best lies within the first epoch: no epochs to take away
    assert "learning_rate" in early[1].changes and not any("lora_dropout" in r.changes for r in early)


def test_a_run_stops_when_its_held_out_loss_has_turned(learned_by_heart):
    run = learned_by_heart
    assert run.summary["stop_reason"].startswith(f"stopped after {run.updates[-1].step} updates: the held-out loss is")
    assert run.updates[-1].step < run.updates[0].total_steps == 160
    assert any(isinstance(event, Note) and event.text == run.summary["stop_reason"] for event in run.events)
    assert run.summary["updates"] == len(run.updates)
    best = min(run.evaluations, key=lambda e: e.eval_loss)
    assert run.summary["best_step"] == best.step
    risen = [e for e in run.evaluations if e.step > best.step]
    assert len(risen) >= 3


def test_findings_are_written_and_printed(learned_by_heart):
    run, found = learned_by_heart, learned_by_heart.findings["overfitting"]
    written = [line for line in run.metrics if line.get("event") == "finding"]
    assert written == [{"event": "finding", **f.to_json()} for f in run.every_finding]
    assert run.summary["findings"] == [f.to_json() for f in run.every_finding]
    with console.capture() as captured:
        Progress()(found)
    shown = captured.get()
    assert "above its best" in shown and "--set load_best_model_at_end=true" in shown and "--set learning_rate" in shown


def test_divergence(watched, schooled_dir):
    """A rate that destroys what the model knew."""
    run = watched(model=schooled_dir, learning_rate=1.0, num_train_epochs=10)
    found = run.findings["divergence"]
    assert found.severity is Severity.ERROR and "learning rate of 1 is" in found.cause
    assert 0 < found.changes["learning_rate"] <= 1 / limit("divergence_rate")
    assert len(run.updates) < run.updates[0].total_steps  # no use in going on
    assert run.updates[-1].loss > run.updates[0].loss


def test_a_user_who_wants_no_stop_gets_none(watched, schooled_dir):
    run = watched(model=schooled_dir, learning_rate=1.0, max_steps=12, early_stopping_patience=0)
    assert len(run.updates) == 12 and run.summary["stop_reason"] is None
    assert "divergence" in run.findings


def test_weights_that_do_not_move(watched):
    run = watched(learning_rate=1e-9, num_train_epochs=3)
    found = run.findings["unmoved"]
    assert found.step <= math.ceil(0.3 * 12) and "adapters have changed" in found.what
    assert found.changes["learning_rate"] > 1e-4
    assert run.updates[-1].weight_change < 1e-6


def test_a_rate_too_low_to_learn(watched):
    run = watched(learning_rate=1e-4, num_train_epochs=3)
    assert run.updates[-1].weight_change > limit("unmoved")
    found = run.findings["not_learning"]
    assert found.step == 6 and "the held-out loss fell by" in found.what and "A learning rate of 1e-4" in found.cause
    assert found.changes["learning_rate"] > 1e-3  # the advice's own


def test_a_rate_too_low_to_finish(watched):
    """The loss falls by as much in the second half of the summed rate as in the first."""
    run = watched(learning_rate=6e-4, num_train_epochs=3)
    found = run.findings["underfitting"]
    assert found.step == 12 and "still falling when the run ended" in found.what
    keys = [key for remedy in found.remedies for key in remedy.changes]
    assert keys[:4] == ["learning_rate", "num_train_epochs", "r", "lora_alpha"]
    assert found.changes["learning_rate"] > 1e-3 and run.findings.keys() == {"underfitting"}


def test_a_rate_too_low_with_few_held_out_rows(watched):
    """The training loss must do."""
    run = watched(learning_rate=1e-4, num_train_epochs=8, eval_fraction=0.05)
    assert {"not_learning", "heldout_too_small"} <= run.findings.keys()
    assert "the training loss fell by" in run.findings["not_learning"].what


def test_a_warm_up_longer_than_the_run(watched):
    run = watched(warmup_steps=500, max_steps=4)
    found = run.findings["warmup"]
    assert found.step == 1 and found.severity is Severity.ERROR
    assert "500 updates and the run has 4" in found.what and found.changes == {"warmup_steps": 1}
    assert "warmup" not in watched(max_steps=2).findings  # one of two is most of the run, and the least there is


def test_spikes(watched, schooled_dir, damaged_file):
    run = watched(model=schooled_dir, data=damaged_file, effective_batch_size=4, num_train_epochs=4, learning_rate=1e-3)
    found = run.findings["spike"]
    named = {u.step: u.origins for u in run.updates}[found.step]
    assert any(origin.rsplit(":", 1)[1] in {"81", "82", "83"} for origin in named)  # the rubbish is at the end
    assert any(origin in found.what for origin in named)
    assert "spikes" in run.findings


def test_throughput_collapse(watched, monkeypatch):
    """The machine becomes slow in the middle of a run."""
    import time

    original, calls = step_module.accumulate_gradient, []

    def slow(*arguments):
        calls.append(1)
        if len(calls) > 12:
            time.sleep(max(0.3, 5 * sum(usual) / len(usual)))
        start = time.perf_counter()
        made = original(*arguments)
        usual.append(time.perf_counter() - start)
        return made

    usual: list[float] = []
    monkeypatch.setattr(step_module, "accumulate_gradient", slow)
    run = watched(max_steps=24, num_train_epochs=8)
    [found] = [f for f in run.every_finding if f.id == "throughput"]
    assert found.step >= 22 and "tokens/s" in found.what


def test_too_few_held_out_rows(watched, noise):
    """Eight rows cannot say when to stop, so they do not."""
    data = noise(45, seed=1)
    run = watched(data=data, eval_fraction=0.18, num_train_epochs=8, early_stopping_patience=1, eval_steps=4)
    found = run.findings["heldout_too_small"]
    last = run.evaluations[0]
    assert found.step == 0 and f"standard error ± {last.eval_loss_se:.3f}, over 8 rows" in found.what
    assert "early stopping is off" in found.cause and found.changes["eval_fraction"] > 0.18
    assert run.summary["stop_reason"] is None and run.summary["best_step"] is None
    assert "overfitting" not in run.findings


def test_a_low_training_loss_is_a_hint_only_where_nothing_better_can_tell(watched, schooled_dir, write_rows, tmp_path):
    row = {"messages": [{"role": "user", "content": "hat"}, {"role": "assistant", "content": "hat:red"}]}
    one = write_rows(tmp_path / "one.jsonl", [row] * 16)
    few = write_rows(tmp_path / "few.jsonl", [row] * 4)
    options = dict(model=schooled_dir, data=one, eval_fraction="auto", num_train_epochs=25)
    blind = watched(**options, eval_data=few)
    assert blind.updates[-1].loss < 0.2
    found = blind.findings["memorising"]
    assert found.severity is Severity.HINT and "4 held-out rows cannot tell" in found.cause
    seen = watched(**options, eval_data=one)
    assert seen.updates[-1].loss < 0.2 and "memorising" not in seen.findings

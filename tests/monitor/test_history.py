"""What the monitor remembers: statistics against plain numpy, and a state that survives being written down."""

import json
import math

import numpy as np
import pytest

from welltuned.training.events import Evaluated, Finding, Remedy, Severity, Updated
from welltuned.training.monitor.robust import Difference, difference, is_outlier, spread_of
from welltuned.training.watch import Watch


def updated(step, loss, total=100, **more):
    usual = dict(learning_rate=1e-3, grad_norm=1.0, tokens=100, supervised_tokens=50, tokens_per_second=1e4, epoch=0.1)
    rest = dict(memory_bytes=0, seconds_left=0.0, evaluation_follows=False)
    return Updated(step=step, total_steps=total, loss=loss, **{**usual, **rest, **more})


def test_a_paired_difference_is_that_of_a_ratio_of_sums():
    draw = np.random.default_rng(0)
    then, weights = draw.normal(2, 1, 40), draw.integers(1, 30, 40)
    now = then + draw.normal(0.1, 0.05, 40)
    found = difference(now.tolist(), then.tolist(), weights.tolist())
    assert found.mean == pytest.approx(np.average(now - then, weights=weights))
    again = [  # the spread of the same statistic over rows drawn anew
        np.average((now - then)[rows], weights=weights[rows]) for rows in draw.integers(0, 40, (4000, 40))
    ]
    assert found.error == pytest.approx(np.std(again), rel=0.1)
    assert found.is_rise and not difference(then.tolist(), now.tolist(), weights.tolist()).is_rise
    unpaired = math.hypot(np.std(now), np.std(then)) / math.sqrt(40)
    assert found.error < unpaired / 5  # what rows differ by among themselves drops out


def test_a_difference_without_an_error_is_no_rise():
    assert not Difference(10.0, None).is_rise
    assert difference([3.0], [1.0], [5]) == Difference(2.0, None)


def test_a_robust_spread_ignores_what_is_wild():
    values = np.random.default_rng(1).normal(0, 1, 999).tolist()
    assert spread_of(values) == pytest.approx(1, rel=0.1)
    assert spread_of([*values, 1e9]) == pytest.approx(spread_of(values), rel=0.01)
    assert is_outlier(6.0, values, level=1) and not is_outlier(3.0, values, level=1)
    assert not is_outlier(0.01, [0.0] * 50, level=1)  # equal values have no spread: a share of the level stands for it


@pytest.fixture
def plan(planned):
    return planned(max_steps=100)


def events(draw):
    """A run that overfits, with losses drawn at random."""
    rows = draw.normal(2, 0.5, 60)
    yield Evaluated(0, float(rows.mean()), 0.06, {}, tuple(rows.tolist()), tuple([7] * 60))
    for step in range(1, 101):
        follows = step % 10 == 0
        loss = 2 / (1 + step / 10) + float(draw.normal(0, 0.02))
        yield updated(step, loss, evaluation_follows=follows, origins=(f"a:{step}",), measures={"x": float(step)})
        if follows:
            now = rows + 0.3 * abs(step - 40) / 40 - 0.3 + draw.normal(0, 0.05, 60)
            yield Evaluated(step, float(now.mean()), 0.06, {}, tuple(now.tolist()), tuple([7] * 60))


@pytest.mark.parametrize("stop", [0, 1, 37, 60, 61, 100])
def test_a_restored_watch_goes_on_as_if_nothing_had_happened(plan, stop):
    """At any event: what is found later, and all that is remembered, is the same."""
    straight, first, found = Watch(plan), Watch(plan), []
    all_events = list(events(np.random.default_rng(2)))
    expected = [f for event in all_events for f in straight.see(event)]
    for event in all_events[:stop]:
        found += first.see(event)
    state = json.loads(json.dumps(first.state(), allow_nan=False))
    second = Watch.restored(state, plan)
    for event in all_events[stop:]:
        found += second.see(event)
    assert found == expected and [f.id for f in found] == ["overfitting"]
    assert second.state() == straight.state() and second.findings == straight.findings
    assert (second.best_step, second.stop_reason) == (straight.best_step, straight.stop_reason) == (40, None)


def test_patience_counts_evaluations_that_are_worse_beyond_noise(plan):
    from dataclasses import replace

    choices = {**plan.choices, "early_stopping_patience": replace(plan.choices["early_stopping_patience"], value=3)}
    watch = Watch(replace(plan, choices=choices))
    for event in events(np.random.default_rng(2)):
        watch.see(event)
        if watch.stop_reason is not None:
            break
    assert watch.history.step == 70 and "after 40" in watch.stop_reason  # 50, 60 and 70 lie above 40


def test_memory_is_bounded(plan):
    watch = Watch(plan)
    for step in range(1, 3001):
        watch.see(updated(step, 1.0, total=3000, measures={"reward": 0.5}))
    assert len(watch.history.updates) == 100 and len(watch.history.blocks) == 20
    assert len(json.dumps(watch.state())) < 100_000


def test_numbers_that_are_none_are_a_divergence(plan):
    watch = Watch(plan)
    watch.see(updated(1, 1.0))
    [found] = watch.see(updated(2, math.nan))
    assert found.id == "divergence" and "not finite" in found.what and watch.stop_reason
    json.dumps(watch.state(), allow_nan=False)


@pytest.mark.parametrize("seed", range(40))
def test_batches_of_few_rows_are_no_divergence(plan, seed):
    """A loss that only varies by its rows, as at a small rate, whose first batch may be the easiest of all."""
    losses = np.random.default_rng(seed).normal(1.65, 0.3, 60)
    losses[0] = 1.2
    watch = Watch(plan)
    said = [found for step, loss in enumerate(losses, 1) for found in watch.see(updated(step, float(loss), total=60))]
    assert [found.id for found in said if found.id == "divergence"] == []


@pytest.mark.parametrize("seed", range(10))
def test_a_divergence_from_the_first_updates_on(plan, seed):
    rise = 1.5 + np.array([0, 0.1, 0.4, 1.5, 3, 5, 6] + 23 * [6.5])
    losses = rise + np.random.default_rng(seed).normal(0, 0.3, 30)
    watch = Watch(plan)
    told = [step for step, loss in enumerate(losses, 1) if watch.see(updated(step, float(loss), total=30))]
    assert told and told[0] <= 20


def test_a_finding_reads_back():
    remedies = Remedy("wait"), Remedy("lower the rate", {"learning_rate": 1e-4})
    finding = Finding("x", Severity.ERROR, 3, "a is 1", "Because of b", remedies)
    assert Finding.from_json(json.loads(json.dumps(finding.to_json()))) == finding
    assert finding.changes == {"learning_rate": 1e-4}
    assert finding.sentence == "After 3 updates: a is 1. Because of b. To mend it: wait."

"""Preference and reinforcement learning that go wrong in silence, on policies small enough to see through."""

import importlib.util
from pathlib import Path

import pytest

from welltuned.training.monitor import remedies
from welltuned.training.monitor.thresholds import limit
from welltuned.training.watch import Watch

spec = importlib.util.spec_from_file_location("policies", Path(__file__).with_name("policies.py"))
policies = importlib.util.module_from_spec(spec)
spec.loader.exec_module(policies)


def found(plan, events):
    watch, last, told = Watch(plan), None, {}
    for event in events:
        told |= {finding.id: finding for finding in watch.see(event)}
        last = event
    return told, last


# ── preference ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def dpo(planned):
    return planned(method="dpo", max_steps=60, learning_rate=1e-9)


def test_a_policy_that_still_is_its_reference(dpo):
    told, last = found(dpo, policies.preference(1e-9))
    assert abs(last.loss - 0.6931) < 1e-3
    finding = told["untrained_preference"]
    assert finding.step == 18  # 30 % of 60
    assert "ln 2" in finding.what and finding.changes["learning_rate"] > 1e-9


def test_a_healthy_preference_run(dpo):
    told, last = found(dpo, policies.preference(2e-2))
    assert last.loss < 0.6 and last.measures["rewards/accuracies"] > 0.6
    assert told == {}


# ── reinforcement learning ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def grpo(planned):
    return planned(method="grpo", max_steps=100, data="d", rewards="numeric")


def short_and_full_of_zeros(prompt, answer):
    """A reward with many values: more of one token, and an end."""
    return sum(token == prompt % 4 for token in answer) / 6 + 0.5 * (answer[-1] == 7)


def test_a_healthy_rollout_run(grpo):
    told, last = found(grpo, policies.rollouts(5e-3, short_and_full_of_zeros, length=20))
    assert told == {}
    assert last.measures["kl"] < limit("kl_most") and last.measures["reward"] > 0.4


def test_entropy_collapse_and_kl(grpo):
    told, last = found(grpo, policies.rollouts(0.3, short_and_full_of_zeros))
    assert last.measures["entropy"] < 0.3 * 2.0
    assert {"entropy_collapse", "kl_blow_up"} <= told.keys()
    assert told["entropy_collapse"].changes["learning_rate"] < grpo.value("learning_rate")
    assert told["kl_blow_up"].step < 100


def test_groups_without_signal_and_a_flat_reward(grpo):
    told, last = found(grpo, policies.rollouts(1e-2, lambda prompt, answer: 0.0))
    assert last.measures["frac_reward_zero_std"] == 1
    assert {"no_signal", "flat_reward"} <= told.keys()
    assert told["no_signal"].changes == {"num_generations": 2 * grpo.value("num_generations")}
    assert "entropy_collapse" not in told and "kl_blow_up" not in told


def test_answers_that_are_cut(grpo):
    told, last = found(grpo, policies.rollouts(5e-3, lambda p, a: float(len(a)) + 0.1 * (a[0] == 1), limit=3))
    assert last.measures["completions/clipped_ratio"] > 0.5
    assert told["truncation"].changes == {"max_completion_length": 2 * grpo.value("max_completion_length")}


def test_other_methods_are_not_judged_by_these(planned):
    told, _ = found(planned(max_steps=100), policies.rollouts(0.3, short_and_full_of_zeros))
    assert not {"entropy_collapse", "kl_blow_up", "no_signal", "truncation", "flat_reward"} & told.keys()


def test_epochs_are_counted_in_answers(grpo):
    """As the plan counts them: its batch is one of answers, and each prompt has several."""
    assert remedies.epoch_at(grpo, grpo.updates) == pytest.approx(grpo.value("num_train_epochs"), rel=0.05)

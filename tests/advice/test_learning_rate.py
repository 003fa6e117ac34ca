import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from welltuned.advice.learning_rate import (
    RateSetting,
    base_rate,
    choose_learning_rate,
    full_rate,
    lora_rate,
    updates_exponent,
)
from welltuned.recipe import Method, Tune

SMOLLM2 = 134_515_008


def setting(family="llama", parameters=8_000_000_000, batch=128, updates=780, r=16, alpha=32.0, **more) -> RateSetting:
    return RateSetting(family=family, parameters=parameters, batch=batch, updates=updates, r=r, alpha=alpha, **more)


def advised(s: RateSetting, tune: Tune = Tune.LORA, method: Method = Method.SFT):
    return choose_learning_rate(method, tune, s, rows=340)


def test_measured_optima_of_smollm2():
    """Both are met to within a factor of 1.6, inside the range: 0.6 % of loss above the first, 2 % the second."""
    first = advised(setting(parameters=SMOLLM2, batch=8, updates=40, alpha=16))
    assert first.value == 6e-3 and (first.low, first.high) == (2.2e-3, 6e-3)
    second = advised(setting(parameters=SMOLLM2, batch=4, updates=85))
    assert second.value == 1.5e-3 and second.low < 2.39e-3 < second.high
    assert 0.68 < updates_exponent(SMOLLM2) < 0.70
    assert updates_exponent(8_000_000_000) == updates_exponent(70_000_000_000) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("family", "billions", "r", "rate"),
    [
        ("llama", 8, 16, 4.4e-4),
        ("llama", 8.03, 64, 5.6e-4),  # E003 measured 5.5e-4
        ("qwen3", 8, 16, 5.3e-4),
        ("qwen3_moe", 30.5, 16, 4.4e-4),
        ("qwen3_5", 9, 16, 3.0e-4),  # E012 measured 2.5-2.8e-4
        ("deepseek_v3", 671, 4, 2.3e-4),  # E016 measured 1.9-2.4e-4
        ("mistral", 8, 16, 4.1e-4),
        ("never_seen", 80, 16, 3.3e-4),
    ],
)
def test_the_sweep_itself(family, billions, r, rate):
    s = setting(family, int(billions * 1e9), r=r, mixture=billions > 100)
    assert advised(s).value == pytest.approx(rate, rel=0.03)


def test_known_family_has_the_narrower_range():
    known, unknown = advised(setting("llama")), advised(setting("mistral"))
    assert known.high / known.value == pytest.approx(1.5, rel=0.02)
    assert unknown.value / unknown.low == pytest.approx(2, rel=0.05)
    assert "E021" in known.evidence and "E022" in unknown.evidence


def test_extrapolation_is_said_and_paid_for():
    short = advised(setting(updates=40, batch=8))
    assert "135M only" in short.reason and short.value / short.low > 3
    measured = advised(setting(parameters=SMOLLM2, updates=40, batch=8))
    assert "135M only" not in measured.reason
    assert "only" not in advised(setting()).reason


def test_caps_by_size():
    for parameters, mixture, cap in [(10**9, False, 9.6e-2), (8 * 10**9, False, 3.2e-2), (70 * 10**9, False, 1.6e-2),
                                     (70 * 10**9, True, 3.2e-2)]:  # fmt: skip
        rate = lora_rate(setting(parameters=parameters, updates=1, r=128, mixture=mixture))
        assert rate.value * 32 == pytest.approx(cap) and rate.limited
        choice = advised(setting(parameters=parameters, updates=1, r=128, mixture=mixture))
        assert "diverged" in choice.reason and "E024" in choice.evidence and choice.high * 32 <= cap * 1.05
    low = lora_rate(setting("qwen3_5", 10**12, batch=1, updates=10**6, r=1))
    assert low.value * 32 == pytest.approx(1e-3) and low.limited


sizes = st.integers(10**7, 10**12)
steps = st.integers(1, 10**6)


@given(sizes, sizes, st.integers(1, 512), steps, st.sampled_from(["llama", "qwen3", "mistral"]))
def test_larger_models_never_want_a_higher_rate(one, two, batch, updates, family):
    small, large = sorted((one, two))
    rate = [lora_rate(setting(family, size, batch=batch, updates=updates)).value for size in (small, large)]
    assert rate[0] >= rate[1] * (1 - 1e-9)


@given(sizes, steps, steps, st.integers(1, 512))
def test_longer_runs_never_want_a_higher_rate(size, one, two, batch):
    short, long = sorted((one, two))
    for law in (lora_rate, full_rate):
        rates = [law(setting(parameters=size, batch=batch, updates=u)).value for u in (short, long)]
        assert rates[0] >= rates[1] * (1 - 1e-9)


@given(sizes, steps, st.integers(1, 512), st.integers(1, 512), st.floats(1, 512), st.floats(1, 512))
def test_alpha_times_rate_is_what_counts(size, updates, batch, r, one, two):
    s = [setting(parameters=size, updates=updates, batch=batch, r=r, alpha=alpha) for alpha in (one, two)]
    assert lora_rate(s[0]).value * one == pytest.approx(lora_rate(s[1]).value * two)
    rs = setting(parameters=size, updates=updates, batch=batch, r=r, alpha=one, use_rslora=True)
    plain = setting(parameters=size, updates=updates, batch=batch, r=r, alpha=one * math.sqrt(r))
    assert lora_rate(rs).value == pytest.approx(lora_rate(plain).value)


@given(sizes, steps, st.integers(1, 512), st.integers(1, 512))
def test_rate_lies_in_its_range(size, updates, batch, r):
    for method in Method:
        for tune in Tune:
            choice = advised(setting(parameters=size, updates=updates, batch=batch, r=r), tune, method)
            assert 0 < choice.low <= choice.value <= choice.high


def test_rank_exponent():
    assert base_rate("llama", 8 * 10**9, 64) / base_rate("llama", 8 * 10**9, 16) == pytest.approx(4**0.175)


def test_qlora_is_lora():
    assert advised(setting(), Tune.QLORA).value == advised(setting()).value


@pytest.mark.parametrize(("billions", "low", "high"), [(8, 5e-6, 2.5e-5), (70, 2e-6, 1.5e-5), (1, 3e-5, 1e-4)])
def test_full_fine_tuning_stays_within_released_recipes(billions, low, high):
    choice = advised(setting(parameters=billions * 10**9), Tune.FULL)
    assert low <= choice.value <= high and choice.high / choice.value >= 2.9
    assert {"E044", "E051", "E031"} <= set(choice.evidence)


def test_preference_and_reinforcement_bands():
    dpo, grpo = advised(setting(), method=Method.DPO), advised(setting(), method=Method.GRPO)
    assert dpo.value == 1e-5 and dpo.high < 5e-5
    assert (grpo.low, grpo.value, grpo.high) == (5e-6, 1e-5, 5e-5)
    full = [advised(setting(parameters=b * 10**9), Tune.FULL, Method.DPO).value for b in (3, 8, 70)]
    assert full == [1e-6, 5e-7, 2e-7]
    assert advised(setting(), Tune.FULL, Method.GRPO).value == 1e-6
    assert advised(setting(alpha=64), method=Method.DPO).value == 5e-6

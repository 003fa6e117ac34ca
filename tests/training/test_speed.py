"""A measured speed is remembered by machine, model and kind of run, and later plans forecast with it."""

import pytest

from welltuned.advice.effort import SpeedFrom
from welltuned.recipe import load_recipe
from welltuned.training.prepare import prepare
from welltuned.training.speed import LEAST_SECONDS, known_speed, probe, remember_speed


@pytest.fixture
def prepared(tiny_model_dir, data_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WELLTUNED_CACHE", str(tmp_path / "cache"))
    options = {"model": str(tiny_model_dir), "data": data_file}

    def of(*sets, **more):
        return prepare(load_recipe(None, {**options, **more}, sets))

    return of


def test_a_probe_is_what_later_plans_say(prepared, one_thread):
    first = prepared()
    assert first.plan.time.speed_from is SpeedFrom.ARITHMETIC and known_speed(first.plan) is None
    measured = probe(first)
    assert measured > 10
    later = prepared().plan
    assert later.time.speed_from is SpeedFrom.MEASURED
    assert later.time.tokens_per_second == pytest.approx(measured, rel=0.01)
    cheaper = prepared("r=2").plan.time  # fewer operations a token, more tokens a second
    assert cheaper.speed_from is SpeedFrom.MEASURED and cheaper.tokens_per_second > later.time.tokens_per_second
    assert prepared(tune="full").plan.time.speed_from is SpeedFrom.ARITHMETIC  # another kind of run


def test_a_short_run_says_too_little(prepared):
    plan = prepared().plan
    remember_speed(plan, 50.0, LEAST_SECONDS - 1)
    assert known_speed(plan) is None
    remember_speed(plan, 50.0, LEAST_SECONDS)
    assert known_speed(plan) == pytest.approx(50 * plan.time.flops_per_token)


def test_a_broken_memo_is_no_speed(prepared, tmp_path):
    plan = prepared().plan
    remember_speed(plan, 50.0, LEAST_SECONDS)
    (file,) = (tmp_path / "cache" / "known").glob("speed-*")
    for text in ("{", "[]", '{"tokens": 1}'):
        file.write_text(text)
        assert known_speed(plan) is None

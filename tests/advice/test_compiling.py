"""Whether layers are compiled: not unless it is asked for, and the figures that would speak for it are said."""

import pytest

from welltuned.advice.compiling import choose_compile, compiling_pays_from
from welltuned.advice.rules import number
from welltuned.facts.machine import Device

RUN = dict(dora=False, cut=False)


def test_pays_from_where_its_gain_is_the_warm_up():
    assert compiling_pays_from() * number("compile_gain") == pytest.approx(number("compile_seconds"))


@pytest.mark.parametrize(
    ("device", "seconds", "options", "says"),
    [
        (Device.CPU, 1e9, RUN, "on a CPU"),
        (Device.CUDA, 1e9, {**RUN, "dora": True}, "DoRA"),
        (Device.CUDA, 1e9, {**RUN, "cut": True}, "a layer of a model in pieces"),
        (Device.CUDA, None, RUN, "a warm-up of"),
        (Device.CUDA, 36_000, RUN, "your run is forecast at 10 h"),
    ],
)
def test_off_unless_asked_for_with_the_reason(device, seconds, options, says):
    choice = choose_compile(device, seconds, **options)
    assert choice.value is False and choice.reason.startswith(says) and choice.evidence
    assert "3 h 20 min" in choice.reason and "measured on no GPU" in choice.reason

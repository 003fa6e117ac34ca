"""Whether layers are compiled: on a GPU, where the run is forecast long enough, and the figure is said."""

import pytest

from welltuned.advice.compiling import choose_compile, compiling_pays_from
from welltuned.advice.rules import number
from welltuned.facts.machine import Device

RUN = dict(dora=False, cut=False)


def test_pays_from_where_its_gain_is_the_warm_up():
    least = compiling_pays_from()
    assert least * number("compile_gain") == pytest.approx(number("compile_seconds"))
    for seconds, value in ((least, True), (0.99 * least, False), (10 * least, True)):
        choice = choose_compile(Device.CUDA, seconds, **RUN)
        assert choice.value is value and "not measured" in choice.reason and "3 h 20 min" in choice.reason
        assert choice.evidence


@pytest.mark.parametrize(
    ("device", "seconds", "options", "says"),
    [
        (Device.CPU, 1e9, RUN, "on a CPU"),
        (Device.CUDA, 1e9, {**RUN, "dora": True}, "DoRA"),
        (Device.CUDA, 1e9, {**RUN, "cut": True}, "in pieces"),
        (Device.CUDA, None, RUN, "not known"),
    ],
)
def test_off_elsewhere_with_the_reason(device, seconds, options, says):
    choice = choose_compile(device, seconds, **options)
    assert choice.value is False and says in choice.reason

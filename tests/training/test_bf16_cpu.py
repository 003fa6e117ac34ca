"""A run in bfloat16 on a processor that has it: it learns, and as much as the run in float32."""

import pytest

from welltuned.facts.machine import Device, read_machine_facts

MACHINE = read_machine_facts()
pytestmark = pytest.mark.skipif(
    MACHINE.device is not Device.CPU or not MACHINE.native_bf16, reason="this processor has no bfloat16 of its own"
)


def test_it_learns_as_float32_does(run):
    half, whole = (run(dtype=dtype) for dtype in ("bfloat16", "float32"))
    before, after = half.result.before.loss, half.result.after.loss
    assert half.result.before.loss == pytest.approx(whole.result.before.loss, rel=0.01)
    learned = whole.result.before.loss - whole.result.after.loss
    assert learned > 0.5 and before - after == pytest.approx(learned, rel=0.05)
    losses, reference = ([update["loss"] for update in done.updates] for done in (half, whole))
    assert losses == pytest.approx(reference, rel=0.05) and losses != reference

"""The comparison of what was trained with its start: exact, tensor by tensor."""

import hashlib
import math

import pytest
import torch

from welltuned.adapters.verify import check_tensors, require_learned
from welltuned.errors import RunError


@pytest.fixture
def start():
    draw = torch.Generator().manual_seed(0)
    names = ("q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B", "v_proj.bias")
    return {name: torch.randn(3, 4, generator=draw) for name in names}


def moved(start, **changes):
    return {name: changes.get(name, tensor + 0.5) for name, tensor in start.items()}


def test_what_is_counted(start):
    checks = check_tensors(moved(start), start)
    assert [c.name for c in checks] == list(start)
    for check in checks:
        now = start[check.name] + 0.5
        assert check.moved and check.finite
        assert check.change == pytest.approx(12 * 0.5, rel=1e-6)
        assert check.sha256 == hashlib.sha256(now.numpy().tobytes()).hexdigest()
    require_learned(checks, 10)


def test_the_smallest_step_counts_as_movement(start):
    """No tolerance: one number that moved by one unit in the last place."""
    now = {name: tensor.clone() for name, tensor in start.items()}
    for tensor in now.values():
        tensor[1, 2] = torch.nextafter(tensor[1, 2], torch.tensor(math.inf))
    checks = check_tensors(now, start)
    assert all(c.moved and 0 < c.change < 1e-6 for c in checks)
    require_learned(checks, 10)


def test_a_tensor_that_stayed_is_named(start):
    checks = check_tensors(moved(start, **{"v_proj.lora_B": start["v_proj.lora_B"].clone()}), start)
    with pytest.raises(RunError, match=r"^v_proj\.lora_B did not move in 10 updates"):
        require_learned(checks, 10)


def test_many_tensors_that_stayed(start):
    with pytest.raises(RunError, match=r"q_proj\.lora_A, q_proj\.lora_B, v_proj\.lora_A and 2 more tensors"):
        require_learned(check_tensors(start, start), 10)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_named_first(start, value):
    broken = start["q_proj.lora_B"].clone()
    broken[0, 0] = value
    now = moved(start, **{"q_proj.lora_B": broken, "v_proj.bias": start["v_proj.bias"]})
    with pytest.raises(RunError, match=r"^q_proj\.lora_B hold numbers that are not finite"):
        require_learned(check_tensors(now, start), 10)


def test_a_may_stay_in_the_first_update_only(start):
    """B starts at zero, and with it A's gradient."""
    stayed = {name: tensor for name, tensor in start.items() if name.endswith("lora_A")}
    checks = check_tensors(moved(start, **stayed), start)
    require_learned(checks, 1)
    with pytest.raises(RunError, match="lora_A"):
        require_learned(checks, 2)


def test_names_must_agree(start):
    with pytest.raises(KeyError):
        check_tensors({**start, "k_proj.lora_A": torch.ones(2)}, start)

"""Whole searches without training, by benchmarks/sweep_policy.py: what the board's own decisions cost and bring."""

import math
from pathlib import Path

import numpy as np
import pytest

from welltuned.search import halving
from welltuned.search.board import shares_of


@pytest.fixture(scope="module")
def policy():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        import sweep_policy

        yield sweep_policy


@pytest.mark.parametrize("updates", [100, 3_000])
def test_searches_on_made_up_curves(policy, updates):
    """Near the best for far fewer tokens than a grid of seven takes, wherever the best lies within a factor of two."""
    flat, steep = (policy.of_family(policy.Family(curve, 0.001), 2, 3, updates) for curve in (0.015, 0.15))
    assert flat["regret_mean"] < halving.ENOUGH and flat["share_of_a_grid_of_seven"] < 0.3
    assert steep["regret_mean"] < min(0.003, steep["regret_of_advice"] / 2)
    assert steep["share_of_a_grid_of_seven"] < 0.45


def test_a_higher_price_takes_fewer_tokens(policy, monkeypatch):
    family, taken = policy.Family(0.15, 0.001), []
    for price in (0.0, 0.0005, 0.02):
        monkeypatch.setattr(halving, "PRICE", price)
        taken.append(policy.of_family(family, 1, 3)["runs"])
    assert taken[0] > taken[1] > taken[2]


def test_every_end_has_its_reason(policy):
    """An arm is dropped by its own losses, or since the search stopped, and the search says why it did."""
    for offset, repeat in ((0.0, 0.0002), (0.35, 0.003), (-0.7, 0.011)):
        losses, centre = policy.made_up(policy.Family(0.15, repeat), offset, 0, shares_of([500]))
        found = policy.searched(losses, centre, 0.65, [50] * policy.ROWS, updates=500, arms=3)
        known = ("slope does not make up", halving.NO_MORE, "choosing it now is expected to cost", "new arm: ")
        assert found.said and all(any(words in text for words in known) for text in found.said)
        added = sum(text.startswith("new arm: ") for text in found.said)
        assert found.arms == 3 + added and found.runs >= 1
        assert sum(halving.AT_EDGE in text for text in found.said) <= 1


def test_a_grid_that_was_recorded_is_searched_as_it_was(policy):
    """Between its rates the losses lie on straight lines; the advice is moved over it."""
    rates = [1e-3 * 2 ** (k / 2) for k in range(-3, 4)]
    at = {0.1: 1.5, 0.2: 1.2, 0.4: 1.1, 1.0: 1.0}

    def look(rate, share):
        return {"share": share, "loss_of_row": [at[share] * (h + 0.1 * math.log(rate / 1e-3) ** 2) for h in (0.8, 1.2)]}

    arms = [{"learning_rate": rate, "status": "done", "looks": [look(rate, share) for share in at]} for rate in rates]
    found = policy.of_grid({"arms": arms, "weights": [1, 1], "advised": 1e-3, "updates": 100}, 3)
    assert found["at_the_advice"]["regret"] == 0.0
    assert found["regret_mean"] < 0.01 < found["regret_of_advice"]
    assert len(found["by_offset"]) == 11 and np.isfinite(found["runs"])

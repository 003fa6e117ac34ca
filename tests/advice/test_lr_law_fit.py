"""benchmarks/lr_law_fit.py: what is shipped is what was measured, and it loses far less than any default."""

import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from welltuned.advice.evidence import row, rows
from welltuned.advice.rules import number, rule


@pytest.fixture(scope="module")
def law():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("lr_law_fit")


@pytest.fixture(scope="module")
def result(law):
    return law.measure()


@pytest.fixture(scope="module")
def committed(law):
    return json.loads((law.RESULTS / "lr_law.json").read_text(encoding="utf-8"))


def test_the_committed_result_is_what_the_code_gives(result, committed):
    assert list(result["cells"]) == list(committed["cells"])
    for name in ("constants", "constants_without_family", "standard_errors"):
        assert committed[name] == pytest.approx(result[name], abs=2e-3), name
    assert committed["left_out"]["cells"] == pytest.approx(result["left_out"]["cells"], abs=0.02)


def test_the_rules_are_the_fit(committed):
    found, pooled = committed["constants"], committed["constants_without_family"]
    for family, constant in rule("rate_base").value.items():
        assert math.log(constant) == pytest.approx(found[family], abs=0.01), family
    assert math.log(number("rate_base_unknown")) == pytest.approx(pooled["unknown"], abs=0.01)
    for name in ("size", "small", "rank"):
        assert number(f"rate_{name}_exponent") == pytest.approx(found[f"{name}_exponent"], abs=0.006), name
        assert number(f"rate_{name}_exponent_unknown") == pytest.approx(pooled[f"{name}_exponent"], abs=0.006), name
    assert number("rate_alpha_exponent") == pytest.approx(-found["alpha_exponent"], abs=0.002)
    assert number("rate_batch_exponent") == pytest.approx(found["batch_exponent"], abs=0.002)
    assert number("rate_updates_exponent") == pytest.approx(found["updates_exponent"], abs=0.002)
    by_knee = committed["deviation_by_knee"]
    assert float(min(by_knee, key=lambda knee: by_knee[knee])) == number("rate_knee")


def test_left_out_cells_lose_little_and_defaults_much(committed):
    """The goal: at most half of the best default's regret, and at most 2 % of loss."""
    ours, best = committed["left_out"], committed["peers"][committed["best_peer"]]
    assert len(ours["cells"]) >= 9
    assert ours["mean"] <= 0.5 and ours["worst"] <= 2 and ours["outside"] == 0
    assert ours["mean"] <= 0.1 * best["mean"]
    assert committed["as_shipped"]["worst"] <= 2
    assert set(committed["peers"]) >= {"2e-5 at alpha 32", "2e-4 at alpha 16", "2e-4 at alpha 32"}


def test_the_evidence_says_what_was_measured(committed):
    cells = {name: cell for name, cell in committed["cells"].items() if "(M" not in name}
    said = {id: found for id, found in rows().items() if found.hyperparameter == "learning_rate*" and id[0] == "M"}
    assert len(said) == len(cells)
    optima = sorted(float(f"{cell['optimum']:.2g}") for cell in cells.values())
    assert sorted(float(found.alpha_x_lr) for found in said.values()) == pytest.approx(optima)
    for found in said.values():
        rate, losses = found.value.split("; held-out loss at ")
        assert float(rate) * float(re.search(r" a(\d+)$", found.variant)[1]) == pytest.approx(
            float(found.alpha_x_lr), rel=0.05
        )
        name = next(
            name
            for name, cell in cells.items()
            if f"batch {cell['batch']}, {cell['updates']} updates" in found.setting
            and found.variant == f"LoRA r{cell['r']} a{cell['alpha']:g}"
            and f"seed {name.rsplit('/s', 1)[1]};" in found.setting
            and ("tickets" in found.setting) == (cell["dataset"] == "tickets")
        )
        points = [point.split() for point in losses.split(", ")]
        assert [float(loss) for _, loss in points] == pytest.approx(cells[name]["losses"], abs=6e-4)
    assert f"^{committed['constants']['batch_exponent']:.2f} " in row("D010").value
    assert f"^{committed['constants']['updates_exponent']:.2f} " in row("D002").value
    assert f"^{committed['constants']['alpha_exponent']:.2f} " in row("D012").value


def made_cell(law, updates, batch, alpha, seed=0, off=0.0):
    """A cell whose optimum follows a law of our own making, at 0.4, 0.1 and -0.6."""
    setting = {"batch": batch, "updates": updates, "alpha": alpha, "r": 16}
    best = (
        math.log(0.1) + 0.4 * math.log(batch / 128) + 0.1 * math.log(780 / updates) + 0.4 * math.log(alpha / 32) + off
    )
    x = np.log([0.001 * 2.0**k for k in range(10)])
    loss = 1 + (x - best) ** 2 / 50
    return law.Measured(f"{seed}", "d", x=x, loss=loss, sums=None, counts=None, diverged=None, start=2.0, **setting)


def test_the_fit_finds_exponents_that_are_there(law):
    grid = [(u, b, a) for u in (30, 120, 480) for b in (4, 16, 64) for a in (16.0, 64.0)]
    cells = [made_cell(law, *setting, seed=i) for i, setting in enumerate(grid)]
    found = law.fit(cells, law.published.read_cells()).constants
    assert found["batch_exponent"] == pytest.approx(0.4, abs=0.02)
    assert found["updates_exponent"] == pytest.approx(0.1, abs=0.02)
    assert found["alpha_exponent"] == pytest.approx(-0.6, abs=0.02)


def test_a_cell_is_predicted_without_itself_and_its_repeats(law):
    """A cell that lies elsewhere, and its repeat, must not pull their own prediction."""
    grid = [(u, b, a) for u in (30, 120, 480) for b in (4, 16, 64) for a in (16.0, 64.0)]
    cells = [made_cell(law, *setting, seed=i) for i, setting in enumerate(grid)]
    strays = [made_cell(law, 60, 8, 16.0, seed=100 + i, off=2.0) for i in range(2)]
    rates = law.left_out([*cells, *strays], law.published.read_cells())
    assert rates["100"] == rates["101"]
    assert rates["100"] == pytest.approx(law.vertex(strays[0].x, strays[0].loss) - 2.0, abs=0.1)


def test_regret_outside_what_was_measured_is_that_of_the_nearest_rate(law):
    cell = made_cell(law, 30, 4, 16.0)
    at_lowest = law.regret(cell, cell.x[0])
    assert law.regret(cell, cell.x[0] - 3) == at_lowest > 5
    assert law.regret(cell, law.vertex(cell.x, cell.loss)) == pytest.approx(0, abs=1e-3)
    assert law.judged([cell], {"0": cell.x[0] - 3})["outside"] == 1

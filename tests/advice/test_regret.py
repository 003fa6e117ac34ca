"""benchmarks/regret.py: what rules for the learning rate lose on the published sweep, computed again."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from welltuned.advice.evidence import row
from welltuned.advice.rules import number, rule


@pytest.fixture(scope="module")
def regret():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("regret")


@pytest.fixture(scope="module")
def result(regret):
    return regret.measure()


def test_the_committed_result_is_what_the_code_gives(regret, result):
    committed = json.loads(regret.RESULT.read_text(encoding="utf-8"))
    assert committed["cells"] == result["cells"] == {"all": 120, "r16": 55, "shared": result["cells"]["shared"]}
    for some in ("r16", "shared", "all"):
        for name, found in result[some].items():
            assert committed[some][name] == pytest.approx(found, abs=2e-3), (some, name)


def test_ours_loses_far_less_than_any_peer(result):
    means = {name: found["mean"] for name, found in result["r16"].items()}
    assert means["ours"] <= 0.10
    assert result["r16"]["ours"]["unmeasured"] <= 5  # without 1B the sweep knows no slope below the knee
    assert means["1e-4"] == pytest.approx(2.0, abs=0.1) and means["2e-4"] == pytest.approx(0.98, abs=0.15)
    assert means["tinker-cookbook's formula"] == pytest.approx(0.40, abs=0.04)
    for name, found in result["shared"].items():
        if not name.startswith("ours"):
            assert result["shared"]["ours"]["mean"] < 0.4 * found["mean"], name
    for by in result["other_interpolations"].values():
        assert by["ours"] < 0.7 * min(mean for name, mean in by.items() if not name.startswith("ours"))


def test_the_shipped_law_is_near_the_sweeps_own_fit_and_the_evidence_says_the_same(result):
    """What is shipped is fitted to our own runs too (test_lr_law_fit.py): they hardly move what the sweep says."""
    fitted = result["fitted_on_all"]
    for family, constant in rule("rate_base").value.items():
        assert fitted[family] == pytest.approx(constant, rel=0.03), family
    for name in ("size", "rank"):
        assert fitted[f"{name}_exponent"] == pytest.approx(number(f"rate_{name}_exponent"), abs=0.01)
    assert fitted["small_exponent"] == pytest.approx(number("rate_small_exponent"), abs=0.1)
    means = {name: f"{found['mean']:.2f}%" for name, found in result["r16"].items()}
    said = row("E147").value
    assert all(f"{name}: {means[name]}" in said for name in ("1e-4", "2e-4", "3e-4", "4e-4", "5e-4"))
    assert f"the law (LOMO): {means['ours']}" in said and means["tinker-cookbook's formula"] in said


def test_regret_of_a_known_parabola(regret):
    """loss = 1 + (ln rate - ln 3e-4)² / 100: a rate twice too high loses ln(2)² per cent."""
    x = np.log([4e-5, 1e-4, 3e-4, 1e-3])
    cell = regret.Cell("m", "llama", 8 * 10**9, 4096, False, 16, x, 1 + (x - math.log(3e-4)) ** 2 / 100)
    assert regret.regret(cell, 6e-4) == pytest.approx(math.log(2) ** 2, abs=1e-3)
    assert regret.regret(cell, 3e-4) == pytest.approx(0, abs=1e-3)
    assert regret.regret(cell, 2e-3) is None and regret.regret(cell, 3e-5) is None
    assert regret.optimum(cell) == pytest.approx((math.log(3e-4),) * 2)
    for by in (regret.straight, regret.smooth):
        assert regret.regret(cell, 1e-3, by) == pytest.approx(math.log(10 / 3) ** 2, abs=0.02)


def test_a_best_rate_at_the_edge_is_an_interval(regret):
    x = np.log([4e-5, 1e-4, 3e-4, 1e-3])
    cell = regret.Cell("m", "llama", 10**9, 2048, False, 16, x, np.array([4.0, 3.0, 2.0, 1.0]))
    assert np.exp(regret.optimum(cell)) == pytest.approx([math.sqrt(3e-4 * 1e-3), math.sqrt(1e-3 * 3e-3)])


def test_the_fit_finds_a_law_that_is_there(regret):
    """Cells made from a law, one of them cut at its edge, give the law back."""
    cells = []
    for model_type, constant in (("llama", 4e-4), ("qwen3", 6e-4), ("qwen3_5", 3e-4), ("gpt_oss", 5e-4)):
        for parameters in (10**9, 8 * 10**9, 7 * 10**10):
            for rank in (4, 16, 64):
                small = max(1.0, number("rate_knee") / parameters) ** 0.3
                best = math.log(constant * (parameters / 8e9) ** -0.15 * small * (rank / 16) ** 0.2)
                x = np.log([4e-5, 1e-4, 3e-4, 1e-3] if rank < 64 else [4e-5, 1e-4, 3e-4, 1e-3, 3e-3])
                loss = 1 + (x - best) ** 2
                cells.append(regret.Cell(f"{model_type}{parameters}", model_type, parameters, 1, False, rank, x, loss))
    coefficients, deviation = regret.fit(cells)
    assert np.exp(coefficients[:4]) == pytest.approx([4e-4, 6e-4, 3e-4, 5e-4], rel=0.1)
    assert coefficients[4:] == pytest.approx([-0.15, 0.3, 0.2], abs=0.05) and deviation < 0.15

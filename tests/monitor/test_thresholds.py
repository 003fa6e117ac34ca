"""No detector holds a number of its own, and every number is used and cites its evidence."""

import ast
import re
from pathlib import Path

import pytest

import welltuned.training.monitor.thresholds as module
from welltuned.advice.evidence import rows
from welltuned.training.monitor.thresholds import share_of_run, thresholds

FOLDER = Path(module.__file__).parent
CODE = sorted([*FOLDER.glob("*.py"), FOLDER.parent / "watch.py"])


def test_every_threshold_cites_rows_and_no_name_stands_twice():
    text = (FOLDER / "thresholds.yaml").read_text()
    names = re.findall(r"^([a-z]\w*):", text, re.MULTILINE)
    assert len(names) == len(set(names)) == len(thresholds()) > 30
    for name, found in thresholds().items():
        assert found.evidence and all(id in rows() for id in found.evidence), name


def test_every_threshold_is_used():
    code = "".join(path.read_text() for path in CODE)
    assert [name for name in thresholds() if f'"{name}"' not in code] == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.stem)
def test_detectors_hold_no_bare_number(path):
    """0, 1 and 2 build formulas; 1.4826 belongs to the normal distribution, 8, 4 and 3 are no thresholds."""
    tree = ast.parse(path.read_text())
    numbers = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)
    }
    allowed = {0, 1, 2} | {"robust": {1.4826}, "movement": {8}, "rollouts": {3}, "spikes": {4}}.get(path.stem, set())
    assert numbers <= allowed


def test_a_share_of_the_run_keeps_its_bounds():
    assert [share_of_run("divergence_updates", total) for total in (10, 100, 1000)] == [5, 10, 20]

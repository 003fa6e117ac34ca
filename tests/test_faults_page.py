"""docs/faults.md names tests that exist, for every fault of the list."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "faults.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", PAGE)


def test_every_fault_has_its_row():
    firsts = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| T")]
    found = [int(number) for first in firsts for number in re.findall(r"T(\d+)", first)]
    assert sorted(found) == list(range(1, 41))


def test_every_finding_has_its_row():
    pytest.importorskip("torch")
    from welltuned.training.monitor.page import ENTRIES

    rows = "".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", rows)) == {entry.id for entries in ENTRIES.values() for entry in entries}


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_the_tests_are_there(file):
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {name for other, name in NAMED if other == file and name} - there == set()

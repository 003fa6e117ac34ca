import ast
import re
from importlib.resources import files
from pathlib import Path

import pytest

import welltuned.advice.learning_rate as law
from welltuned.advice.evidence import Grade, matching, row, rows
from welltuned.advice.rules import number, rules


def test_ids_are_unique_and_rows_are_whole():
    assert len(rows()) > 150
    for found in rows().values():
        assert re.fullmatch(r"[EPMDSL]\d{3}", found.id)
        assert found.hyperparameter and found.value and found.source and found.grades
        assert found.access in {"P", "A", "S", "A/S", "P/S"}, found


def test_every_rule_cites_rows_and_no_key_stands_twice():
    text = files("welltuned.advice").joinpath("rules.yaml").read_text(encoding="utf-8")
    names = re.findall(r"^([a-z]\w*):", text, re.MULTILINE)
    assert len(names) == len(set(names)) == len(rules())
    for name, found in rules().items():
        assert found.evidence, name
        if found.low is not None and not isinstance(found.value, str):  # `none` has a range for who sets one
            assert found.low <= found.value <= found.high, name


def test_every_rule_is_used():
    code = "".join(path.read_text() for path in Path(law.__file__).parent.glob("*.py"))
    patterns = [
        r"bytes_\w+",
        r"memory_(overhead|fragmentation|logit_tile|adam_8bit_work)_\w+",
        r"token_budget_\w+",
        r"\w+_(alpha|full)_rate",
        r"\w+_(batch|epochs)_by_rows",
        r"grpo_epsilon(_high)?(_range)?",
        r"rate_(size|small|rank)_exponent(_unknown)?",
    ]
    for name in rules():
        quoted = f'"{name}"' in code or f"'{name}'" in code
        assert quoted or any(re.fullmatch(pattern, name) for pattern in patterns), name


def test_rows_are_found_by_words():
    assert row("M006") in matching(hyperparameter="learning_rate", method="sft", family="llama", grade=Grade.MEASURED)
    assert row("P012") in matching(method="dpo", hyperparameter="seed")
    with pytest.raises(KeyError):
        row("E999")


def test_bytes_of_nf4_state():
    assert number("memory_nf4_state_bytes") == 1 / 64 + 4 / (64 * 256)


ROOM = Path(law.__file__).parent
WORDS = {"settle", "warn", "why", "page", "codec", "describe", "reference", "contexts"}  # print, weigh warnings
FORMULAS = {"batch": {6}, "effort": {4, 6, 7}, "plan": {4, 120, 1e9}}  # operations a weight, digits, columns, GB


@pytest.mark.parametrize("module", sorted({path.stem for path in ROOM.glob("*.py")} - WORDS))
def test_rules_hold_no_bare_number(module):
    """0, 1 and 2 build formulas. Everything else comes from rules.yaml."""
    tree = ast.parse((ROOM / f"{module}.py").read_text(encoding="utf-8"))
    numbers = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)
    }
    allowed = {0, 1, 2} | FORMULAS.get(module, set())
    assert numbers <= allowed, numbers - allowed

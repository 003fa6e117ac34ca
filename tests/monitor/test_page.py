"""docs/when_it_goes_wrong.md says what the code does: ids, keys, thresholds, and the words that it quotes."""

import ast
from pathlib import Path

import welltuned
from welltuned.recipe.keys import KEYS
from welltuned.training.monitor import thresholds
from welltuned.training.monitor.page import ENTRIES, SAID, page
from welltuned.training.watch import DETECTORS

SOURCE = Path(welltuned.__file__).parent
FOLDER = Path(thresholds.__file__).parent
ENTRY = {entry.id: entry for entries in ENTRIES.values() for entry in entries}
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.py") if path.stem != "page"}
FUNCTIONS = {
    (module, node.name): node
    for module, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.FunctionDef)
}


def called(module, function):
    """(module, name) of the functions of this package that one calls, and the recipe keys that its `change`s set."""
    functions, keys = set(), set()
    for node in ast.walk(FUNCTIONS[module, function]):
        if isinstance(node, ast.Dict):
            keys |= {key.value for key in node.keys if isinstance(key, ast.Constant) and key.value in KEYS}
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name == "change":
            keys |= {keyword.arg for keyword in node.keywords}
        functions |= {place for place in ((module, name), ("remedies", name)) if place in FUNCTIONS}
    return functions, keys


def keys_of(module, function):
    """All recipe keys that a detector may tell to change."""
    waiting, seen, keys = {(module, function)}, set(), set()
    while waiting:
        place = waiting.pop()
        seen.add(place)
        functions, found = called(*place)
        keys |= found
        waiting |= functions - seen
    return keys


def id_of(module, function):
    [node] = [
        node
        for node in ast.walk(FUNCTIONS[module, function])
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Finding"
    ]
    first = node.args[0]
    if isinstance(first, ast.Constant):
        return first.value
    [value] = [n.value.value for n in TREES[module].body if isinstance(n, ast.Assign) and n.targets[0].id == first.id]
    return value


DETECTED = {
    id_of(place[0], place[1]): keys_of(*place)
    for place in ((detector.__module__.rpartition(".")[2], detector.__name__) for detector in DETECTORS)
}


def test_the_page_is_up_to_date():
    committed = Path(__file__).parents[2] / "docs" / "when_it_goes_wrong.md"
    made = "run python -m welltuned.training.monitor.page > docs/when_it_goes_wrong.md"
    assert committed.read_text(encoding="utf-8") == page(), made


def test_every_finding_has_its_entry_and_no_other():
    assert len(DETECTED) == len(DETECTORS) and ENTRY.keys() == DETECTED.keys()


def test_its_keys_are_those_that_the_code_sets():
    for id, entry in ENTRY.items():
        assert set(entry.keys) == DETECTED[id], id
        assert set(entry.keys) <= set(KEYS)


def test_what_is_said_without_a_key_is_said_in_words():
    assert all(entry.keys or entry.besides for entry in ENTRY.values())


def test_thresholds_stand_in_the_page():
    text = page()
    assert "{" not in text and f"{thresholds.limit('overfit_hint'):g}, and no held-out loss" in text


def test_what_is_quoted_of_a_run_stands_in_the_code():
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py") if path.stem != "page")
    assert [said.quoted for said in SAID if said.quoted not in code] == []

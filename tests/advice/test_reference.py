"""docs/hyperparameters.md says what the advice says now, of every key."""

from pathlib import Path

from welltuned.advice import reference
from welltuned.advice.why import entries
from welltuned.recipe import HYPERPARAMETERS

PAGE = Path(__file__).parents[2] / "docs" / "hyperparameters.md"


def test_the_page_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == reference.page(), "docs/hyperparameters.md is out of date: make docs"


def test_every_key_stands_in_one_group():
    grouped = [key for keys in reference.GROUPS.values() for key in keys]
    assert sorted(grouped) == sorted(HYPERPARAMETERS)


def test_every_example_fits_its_machine_and_is_planned_as_asked():
    for example in reference.examples():
        plan = reference.planned(example)
        assert plan.memory.fits and plan.recipe.tune is example.tune and plan.recipe.method is example.method


def test_disagreement_is_counted_from_the_rows():
    (entry,) = (entry for entry in entries()["learning_rate"] if entry.methods[0] == "kto")
    assert reference._disagreement(entry).startswith(f"{len(entry.evidence)} rows speak for it, {len(entry.against)} ")

"""Every key of a recipe is applied in a search, or told, or refused: none is ignored."""

from dataclasses import replace
from types import MappingProxyType

import pytest

from welltuned.errors import InputError
from welltuned.recipe import FIELDS, KEYS, Method
from welltuned.recipe.keys import METHOD_KEYS
from welltuned.search import applied
from welltuned.search.applied import APPLIED, METHODS, OTHER_METHODS, REFUSED, TOLD, require_searchable, told


def test_every_key_has_its_place():
    places = [set(APPLIED), set(REFUSED), set(TOLD), set(OTHER_METHODS)]
    assert set().union(*places) == set(KEYS)
    assert sum(map(len, places)) == len(KEYS)  # and only one


def test_keys_of_other_methods_are_theirs_alone():
    for key in OTHER_METHODS:
        assert not METHOD_KEYS[key] & set(METHODS), key


@pytest.fixture(scope="module")
def plan(prepared_for):
    return prepared_for().plan


def with_key(plan, key, value):
    if key in FIELDS:
        return replace(plan, recipe=replace(plan.recipe, **{key: value}))
    hyperparameters = MappingProxyType({**plan.recipe.hyperparameters, key: value})
    return replace(plan, recipe=replace(plan.recipe, hyperparameters=hyperparameters))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter", "runs/earlier"),
        ("ema_decay", 0.99),
        ("modules_to_save", ("lm_head",)),
        ("embedding_learning_rate", 1e-5),
    ],
)
def test_what_cannot_be_is_refused_by_name(plan, key, value):
    require_searchable(plan)
    with pytest.raises(InputError, match=f"^{key}: "):
        require_searchable(with_key(plan, key, value))
    assert key in REFUSED


def test_a_key_without_a_place_is_refused(plan, monkeypatch):
    monkeypatch.setattr(applied, "APPLIED", APPLIED - {"group_by"})
    with pytest.raises(InputError, match="a search does nothing with it"):
        require_searchable(with_key(plan, "group_by", "topic"))


@pytest.mark.parametrize("method", [m for m in Method if m not in METHODS])
def test_other_methods_are_refused(plan, method):
    with pytest.raises(InputError, match=f"{method} cannot be searched"):
        require_searchable(replace(plan, recipe=replace(plan.recipe, method=method)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end: arms are compared by the weights after their last"),
        ({"load_best_model_at_end": False}, None),
        ({"early_stopping_patience": 3}, "early_stopping_patience: an arm ends when it cannot win"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: an arm that diverges ends"),
        ({"eval_steps": 2}, "eval_steps: arms are judged at the same shares"),
        ({"on_nonfinite": "back"}, "on_nonfinite: an arm whose numbers are not finite ends"),
        ({"report_to": ["tensorboard"]}, "report_to: tensorboard will be told the winner's run"),
        ({}, "learning_rate: yours, 0.01, is the middle of what is tried"),
    ],
)
def test_what_is_otherwise_is_told(prepared_for, options, sentence):
    found = told(prepared_for(**options).plan, [], centred=True)
    names = [name for name in options if name in TOLD] if sentence is None else []
    assert (
        any(text.startswith(sentence) for text in found)
        if sentence
        else not any(text.startswith(name) for text in found for name in names)
    )


def test_values_that_arms_replace_are_told(prepared_for):
    found = told(prepared_for(r=4).plan, ["learning_rate", "r"], centred=False)
    assert "r: the arms' values replace yours, 4" in found and not any("middle" in text for text in found)


def test_that_seeds_share_their_rows_is_told(prepared_for, data_file):
    sentence = "seed: all arms share the held-out rows"
    plan = prepared_for().plan
    assert any(text.startswith(sentence) for text in told(plan, ["seed"], centred=False))
    plan = replace(plan, recipe=replace(plan.recipe, eval_data=data_file))
    assert not any(text.startswith(sentence) for text in told(plan, ["seed"], centred=False))

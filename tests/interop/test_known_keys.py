"""The lists of keys against the libraries themselves, where they are installed."""

import dataclasses
from importlib.util import find_spec

import pytest

from welltuned.advice.lint.keys import _OPTIMIZERS, _SCHEDULES
from welltuned.interop.known import DEPRECATED, REMOVED, TRL_CONFIGS, _lists, config_keys, keys_of, versions
from welltuned.interop.trl import METHODS, PEFT_ADAPTER, defaults

TRL = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
TABLES = {owner for table in (REMOVED, DEPRECATED) for owner in table}


def test_what_is_removed_is_not_taken_and_what_is_deprecated_is():
    for owner, gone in REMOVED.items():
        known = config_keys(owner) if owner in (*TRL_CONFIGS, "TrainingArguments") else frozenset()
        assert not known & gone.keys(), owner
    for owner, gone in DEPRECATED.items():
        if owner in (*TRL_CONFIGS, "TrainingArguments"):
            assert gone.keys() <= config_keys(owner), owner


def test_names_of_optimisers_and_schedules_are_the_lists():
    assert set(_lists()["optimizers"]) == _OPTIMIZERS
    assert set(_lists()["schedulers"]) == _SCHEDULES
    assert {"transformers", "trl", "axolotl", "llamafactory"} <= versions().keys()


def _theirs(owner):
    from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig

    classes = (SFTConfig, DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig)
    return {cls.__name__: cls for cls in classes}[owner]


def _fields(cls):
    return {field.name: field for field in dataclasses.fields(cls)}


@TRL
def test_the_lists_are_those_of_the_installed_trl():
    import transformers
    import trl

    if (trl.__version__, transformers.__version__) != (versions()["trl"], versions()["transformers"]):
        pytest.skip(f"the lists are of TRL {versions()['trl']} with transformers {versions()['transformers']}")
    base = set(_fields(transformers.TrainingArguments))
    assert base == keys_of("TrainingArguments")
    for owner in ("SFTConfig", "DPOConfig", "GRPOConfig", "KTOConfig", "RewardConfig", "RLOOConfig"):
        assert set(_fields(_theirs(owner))) - base == keys_of(owner), owner


@TRL
def test_the_defaults_are_those_of_the_installed_trl():
    for owner, method in METHODS.items():
        if owner == "ORPOConfig":
            continue
        fields = _fields(_theirs(owner))
        for name, value in defaults(method).items():
            theirs = fields[name]
            default = theirs.default if theirs.default is not dataclasses.MISSING else theirs.default_factory()
            assert default == value, (owner, name)


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
def test_the_adapters_defaults_are_pefts():
    from peft import LoraConfig

    fields = _fields(LoraConfig)
    assert {name: fields[name].default for name in PEFT_ADAPTER} == dict(PEFT_ADAPTER)

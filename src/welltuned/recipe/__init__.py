"""Recipe: what the user asks for. Model, data and method; every other value may be left to the advice ("auto").

A recipe comes from three places, the later ones win: a YAML file, options, and `--set key=value`. Whatever is wrong in
it is one `InputError` that names the file and line (or the option) and how to mend it. Nothing is guessed: an unknown
key is an error, because a misspelt `lerning_rate` that is quietly ignored costs a whole run.
"""

from welltuned.recipe.check import parse_memory
from welltuned.recipe.keys import (
    ALL_LINEAR,
    AUTO,
    DENSE_BASES,
    FIELDS,
    FSDP,
    FULL_SHARD,
    HYPERPARAMETERS,
    KEYS,
    METHOD_KEYS,
    OPTIMIZERS_8BIT,
    POLICIES,
    VARIANTS,
    Key,
    Method,
    Tracker,
    Tune,
)
from welltuned.recipe.read import PlainLoader, Recipe, Trust, YamlLoader, load_recipe, recipe_to_dict, recipe_to_yaml

__all__ = [
    "ALL_LINEAR",
    "AUTO",
    "DENSE_BASES",
    "FIELDS",
    "FSDP",
    "FULL_SHARD",
    "HYPERPARAMETERS",
    "VARIANTS",
    "KEYS",
    "METHOD_KEYS",
    "OPTIMIZERS_8BIT",
    "POLICIES",
    "PlainLoader",
    "Key",
    "Method",
    "Recipe",
    "Tracker",
    "Trust",
    "Tune",
    "YamlLoader",
    "load_recipe",
    "parse_memory",
    "recipe_to_dict",
    "recipe_to_yaml",
]

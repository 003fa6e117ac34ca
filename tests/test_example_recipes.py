"""The recipes that teach: they are read, they name every key, and what they leave in comments is right too."""

import re
from pathlib import Path

import pytest

from welltuned.data.policies import DEFAULT_POLICIES
from welltuned.recipe import KEYS, METHOD_KEYS, Method, Tune, load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CUT = {"per_device_train_batch_size", "gradient_accumulation_steps", "packing"}  # said otherwise: token_budget


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_is_read(path):
    recipe = load_recipe(str(path))
    for data in (*recipe.datasets, *recipe.eval_datasets):
        assert (ROOT / data).is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_comments_are_valid_too(path, tmp_path):
    """A line of `# key: value` becomes a setting when its mark is taken away, one at a time."""
    text = path.read_text(encoding="utf-8")
    offers = re.findall(r"^# (([a-z_0-9]+): .*)$", text, flags=re.MULTILINE)
    offers = [(line, key) for line, key in offers if key in KEYS]
    assert offers
    for line, key in offers:
        lines = text.replace("# " + line, line).splitlines()
        if key in ("eval_fraction", "group_by"):  # instead of eval_data
            lines = [other for other in lines if not other.startswith("eval_data:")]
        changed = tmp_path / f"{key}.yaml"
        changed.write_text("\n".join(lines), encoding="utf-8")
        recipe = load_recipe(str(changed))
        assert key in recipe.hyperparameters or key in recipe.policies or getattr(recipe, key) is not None


def test_sft_lora():
    path = ROOT / "recipes" / "sft_lora.yaml"
    recipe = load_recipe(str(path))
    assert (recipe.method, recipe.tune, dict(recipe.hyperparameters)) == (Method.SFT, Tune.LORA, {})
    assert recipe.eval_data is not None
    text = path.read_text(encoding="utf-8")
    others = {key for key, methods in METHOD_KEYS.items() if Method.SFT not in methods}
    unnamed = [k for k in KEYS if not re.search(rf"\b{k}: ", text) and k not in others]
    assert set(unnamed) == CUT
    defaults = dict(re.findall(r"^# (on_\w+): (\w+) ", text, flags=re.MULTILINE))
    assert defaults == {f"on_{kind}": policy for kind, policy in DEFAULT_POLICIES.items()}

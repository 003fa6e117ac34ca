"""Searches on a tiny model."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(scope="session")
def prepared_for(tiny_model_dir, data_file):
    """A function that plans a run of the tiny model: 12 updates of 16 rows, unless options say otherwise."""
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare

    def prepared(**options):
        usual = dict(model=str(tiny_model_dir), data=data_file, effective_batch_size=16, max_steps=12)
        return prepare(load_recipe(None, {**usual, "learning_rate": 1e-2, "eval_fraction": 0.2, **options}))

    return prepared


@pytest.fixture(scope="session")
def pairs(write_rows, tmp_path_factory):
    """A file of preference pairs: the chosen answers name a hat, the rejected ones a cup."""
    rows = [
        {"prompt": f"{i} times the hat", "chosen": f"hat {'red ' * (i % 4)}", "rejected": f"cup {i}"} for i in range(40)
    ]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)

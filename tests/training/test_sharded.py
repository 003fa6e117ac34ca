"""A model in pieces (FSDP2) gives the run of one process: losses, adapters and weights to fp32 rounding."""

import pytest
from ranked import finished, in_ranks, trained
from test_ranks import assert_same_run

import welltuned

UPDATES = 6
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    return dict(
        model=str(tiny_model_dir), data=data_file, effective_batch_size=14, max_steps=UPDATES, token_budget=64,
        eval_steps=3, save_steps=3, load_best_model_at_end=False, dtype="float32", fsdp="full_shard",
    )  # fmt: skip


LORA = dict(r=4, lora_dropout=0.1, learning_rate=1e-2)
FULL = dict(tune="full", learning_rate=1e-3)


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    """One process, with everything whole."""
    found = {}

    def of(kind):
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp("straight") / "out"
            welltuned.train(out=found[kind], **options, **(LORA if kind == "lora" else FULL))
        return found[kind]

    return of


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=SLOW)])
def test_adapters_on_a_base_in_pieces(options, straight, tmp_path, world):
    ended = finished(in_ranks(trained(tmp_path / "run", **options, **LORA), world, tmp_path / "said"))
    assert_same_run(tmp_path / "run", straight("lora"))
    told, evaluated = ended[0].value
    assert len(told) == UPDATES and all(e.value == ([], evaluated) for e in ended[1:])


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=SLOW)])
def test_full_fine_tuning_in_pieces(options, straight, tmp_path, world):
    finished(in_ranks(trained(tmp_path / "run", **options, **FULL), world, tmp_path / "said"))
    assert_same_run(tmp_path / "run", straight("full"))

"""When a plan cuts the model in pieces: several processes, and none of them has room for all of it."""

from dataclasses import replace

import pytest

from welltuned.advice.memory import forecast_memory
from welltuned.advice.plan import make_plan, require_memory
from welltuned.choice import SetBy
from welltuned.errors import InputError
from welltuned.facts.machine import Device
from welltuned.recipe import load_recipe


@pytest.fixture
def planned(model_of, data_of, machine_of):
    def build(gigabytes, processes, *sets, gpus=0, **options):
        recipe = load_recipe(None, {"model": "m/m", "data": "d", **options}, sets)
        machine = replace(machine_of(gigabytes, Device.CUDA), processes=processes, gpus=gpus or processes)
        return make_plan(recipe, model_of("llama-8b"), data_of(2000, 200, 900), machine)

    return build


def test_one_process_is_told_nothing_of_it(planned):
    assert "fsdp" not in planned(24, 1, tune="lora").choices
    said = planned(24, 1, "fsdp=full_shard", tune="lora").choices["fsdp"]
    assert said.value == "full_shard" and said.set_by is SetBy.USER and "there is one process" in said.reason


def test_a_model_that_fits_stays_whole(planned):
    choice = planned(80, 4, tune="lora").choices["fsdp"]
    assert choice.value == "none" and "fits into the 80" in choice.reason


def test_a_model_that_does_not_fit_is_cut_before_its_weights_are_rounded(planned):
    plan = planned(12, 4)  # nobody named a tune: QLoRA would fit
    choice = plan.choices["fsdp"]
    assert choice.value == "full_shard" and choice.set_by is SetBy.ADVICE and plan.recipe.tune == "lora"
    assert "the whole model would take" in choice.reason and plan.memory.fits
    parts, whole = plan.memory.parts, planned(80, 4, tune="lora").memory.parts
    assert parts["weights"] == pytest.approx(whole["weights"] / 4, rel=1e-6) and parts["adapters"] == whole["adapters"]
    assert "gathered" in parts and "gathered" not in whole
    assert planned(9, 1).recipe.tune == "qlora"


def test_full_fine_tuning_shares_all_of_its_state(planned):
    alone, eight = planned(160, 8, tune="full"), planned(80, 8, tune="full")
    assert alone.value("fsdp") == "none" and eight.value("fsdp") == "full_shard" and eight.value("optim") == "adamw"
    for part in ("weights", "gradients", "optimizer"):
        assert eight.memory.parts[part] == pytest.approx(alone.memory.parts[part] / 8, rel=1e-6)


def test_the_users_word_stands(planned):
    cut = planned(160, 4, "fsdp=full_shard", tune="lora")
    assert cut.value("fsdp") == "full_shard" and "set by you where the advice is none" in cut.choices["fsdp"].reason
    assert "gathered" in cut.memory.parts
    whole = planned(12, 4, "fsdp=none", tune="lora")
    assert whole.value("fsdp") == "none" and not whole.memory.fits
    with pytest.raises(InputError, match="in each process, which holds the whole model"):
        require_memory(whole)
    with pytest.raises(InputError, match="in each of 4 processes, though each keeps only a part"):
        require_memory(planned(2, 4, "fsdp=full_shard", tune="lora"))


def test_where_one_process_was_started_beside_several_gpus_the_way_out_is_named(planned):
    plan = planned(12, 1, tune="full", gpus=8)
    assert any("torchrun --nproc-per-node 8 -m welltuned train" in text for text in plan.warnings)
    assert not any("torchrun" in text for text in planned(2, 1, tune="qlora", gpus=8).warnings)


def test_pieces_are_not_asked_of_what_cannot_be_cut(planned):
    plan = planned(12, 4, tune="lora", method="dpo")
    assert plan.value("fsdp") == "none" and "only sft" in plan.choices["fsdp"].reason


def test_what_is_whole_at_a_time_is_counted(model_of):
    from welltuned.advice.activations import MemorySetting
    from welltuned.recipe import Tune

    model = model_of("llama-8b")
    setting = MemorySetting(
        tune=Tune.FULL, dtype="float32", device=Device.CUDA, micro_tokens=1024, checkpointing=True, parts=8
    )
    parts = forecast_memory(model, setting).parts
    outside = 2 * model.head_parameters
    layer = (model.parameters - outside) / model.layers
    assert parts["gathered"] == pytest.approx(4 * (outside + 4 * layer) + 2 * 4 * (outside + layer), rel=1e-6)

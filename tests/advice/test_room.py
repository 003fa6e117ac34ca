"""What the plan does as memory gets short on a GPU: fewest recomputed layers, their inputs on the host, the base."""

from dataclasses import replace

import pytest

from welltuned.advice.memory import forecast_memory
from welltuned.advice.plan import make_plan, plan_from_yaml, plan_to_yaml
from welltuned.choice import SetBy
from welltuned.errors import InputError
from welltuned.facts.machine import Device
from welltuned.recipe import load_recipe


@pytest.fixture
def planned(model_of, data_of, machine_of):
    def build(gigabytes, *sets, longest=900, host=500, device=Device.CUDA, **options):
        recipe = load_recipe(None, {"model": "m/m", "data": "d", **options}, sets)
        machine = replace(machine_of(gigabytes, device), memory_available=int(host * 1e9))
        model = replace(model_of("llama-8b"), context_length=131_072)
        return make_plan(recipe, model, data_of(2000, 200, longest), machine)

    return build


def room(plan):
    names = ("gradient_checkpointing", "checkpointed_layers", "offload_checkpoints", "dense_base")
    return {name: plan.value(name) for name in names if name in plan.choices}


def test_less_memory_means_more_layers_and_then_the_host(planned):
    assert room(planned(80, tune="lora")) == {"gradient_checkpointing": False}
    counts = []
    for gigabytes in (24, 22.5, 21):
        found = room(planned(gigabytes, tune="lora"))
        assert found["gradient_checkpointing"] and not found["offload_checkpoints"]
        counts.append(found["checkpointed_layers"])
    assert 0 < counts[0] < counts[1] < counts[2] <= 32
    far = planned(24, tune="lora", longest=15_000)
    assert room(far) == {"gradient_checkpointing": True, "checkpointed_layers": 32, "offload_checkpoints": True}
    assert far.memory.fits and "wait in the host's memory" in far.choices["offload_checkpoints"].reason
    assert far.value("max_length") >= 15_000, "no row is cut for want of memory"
    without = planned(24, "offload_checkpoints=false", tune="lora", longest=15_000)
    assert without.value("max_length") < 15_000 or not without.memory.fits


def test_one_layer_fewer_would_not_fit(planned):
    plan = planned(22.5, tune="lora")
    layers = plan.value("checkpointed_layers")
    fewer = planned(22.5, f"checkpointed_layers={layers - 1}", "offload_checkpoints=false", tune="lora")
    assert plan.memory.total_bytes <= 0.9 * 22.5e9 < fewer.memory.total_bytes
    assert fewer.value("checkpointed_layers") == layers - 1
    assert fewer.choices["checkpointed_layers"].set_by is SetBy.USER
    assert plan.time.flops_per_token > planned(80, tune="lora").time.flops_per_token


def test_no_host_memory_no_offloading(planned):
    assert not planned(24, tune="lora", longest=15_000, host=1).choices["offload_checkpoints"].value


def test_gradient_checkpointing_means_what_it_meant(planned):
    every = planned(80, "gradient_checkpointing=true", tune="lora")
    assert every.value("checkpointed_layers") == 32 and "yours" in every.choices["checkpointed_layers"].reason
    assert room(planned(22.5, "gradient_checkpointing=false", tune="lora")) == {"gradient_checkpointing": False}


def test_a_dense_base_where_there_is_room(planned):
    much, little = planned(140, tune="qlora"), planned(24, tune="qlora")
    assert much.value("dense_base") == "cached" and little.value("dense_base") == "rebuilt"
    trunk = much.facts.model.trunk_linear_parameters
    assert much.memory.parts["dense_base"] == 2 * trunk and "dense_base" not in little.memory.parts
    assert planned(140, "dense_base=rebuilt", tune="qlora").memory.total_bytes < much.memory.total_bytes - trunk
    assert "dense_base" not in planned(80, tune="lora").choices
    forced = planned(24, "dense_base=cached", tune="qlora")
    assert forced.value("dense_base") == "cached" and forced.memory.parts["dense_base"] == 2 * trunk


def test_a_cpu_that_keeps_its_base_is_not_warned_of_expanding_it(planned):
    said = "every pass expands them again"
    assert not any(said in text for text in planned(80, tune="qlora", device=Device.CPU).warnings)
    assert any(said in text for text in planned(80, "dense_base=rebuilt", tune="qlora", device=Device.CPU).warnings)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["checkpointed_layers=33"], "the model has 32"),
        (["gradient_checkpointing=false", "checkpointed_layers=3"], "contradict"),
        (["gradient_checkpointing=true", "checkpointed_layers=0"], "contradict"),
        (["gradient_checkpointing=false", "offload_checkpoints=true"], "none is recomputed"),
        (["dense_base=cached"], "only tune: qlora"),
        (["dense_base=perhaps"], "cached, rebuilt"),
        (["checkpointed_layers=-1"], "0 or more"),
    ],
)
def test_what_contradicts_itself_is_refused(planned, sets, words):
    with pytest.raises(InputError, match=words):
        planned(80, *sets)


def test_a_cpu_has_no_host_to_offload_to(planned):
    with pytest.raises(InputError, match="no GPU"):
        planned(80, "offload_checkpoints=true", device=Device.CPU)


def test_the_plan_is_read_back_and_an_older_one_too(planned):
    from welltuned.training.settings import Room, room_of

    plan = planned(24, tune="lora", longest=15_000)
    assert room_of(plan_from_yaml(plan_to_yaml(plan))) == Room(True, 32, True, False, False)
    old = {name: choice for name, choice in plan.choices.items() if not name.endswith(("layers", "checkpoints"))}
    assert room_of(replace(plan, choices=old)) == Room(True, None, False, False, False)


def test_offloading_leaves_three_inputs_on_the_gpu(model_of):
    from welltuned.advice.activations import MemorySetting
    from welltuned.advice.contexts import eight_billion
    from welltuned.recipe import Tune

    setting = MemorySetting(
        tune=Tune.LORA, dtype="bfloat16", device=Device.CUDA, micro_tokens=4096, checkpointing=True, r=16
    )
    model = eight_billion()
    here, away = (forecast_memory(model, s).parts["activations"] for s in (setting, replace(setting, offload=True)))
    assert (here, away) == (32 * 4096 * 4096 * 2, 3 * 4096 * 4096 * 2)

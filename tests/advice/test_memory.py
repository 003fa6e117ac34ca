"""The memory forecast: its parts, its bounds, and that it agrees with what an update allocates."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from welltuned.advice.activations import MemorySetting
from welltuned.advice.memory import forecast_memory
from welltuned.advice.plan import make_plan, require_memory
from welltuned.advice.rules import rule
from welltuned.choice import SetBy
from welltuned.errors import InputError
from welltuned.facts.machine import Device
from welltuned.facts.model import read_model_facts
from welltuned.recipe import Tune, load_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = MemorySetting(
    tune=Tune.LORA, dtype="float32", device=Device.CPU, micro_tokens=512, checkpointing=False, r=16, lengths=(128,)
)


def test_tiles_and_blocks_are_the_kernels():
    from welltuned.kernels import attention, token_loss

    assert tuple(rule("memory_logit_tile_cpu").value) == token_loss.ON_CPU
    assert tuple(rule("memory_logit_tile_cuda").value) == token_loss.ON_GPU
    assert (rule("memory_attention_short").value, rule("memory_attention_block").value) == (
        attention.SHORT,
        attention.BLOCK,
    )


settings = st.builds(
    replace,
    st.just(SMALL),
    tune=st.sampled_from(list(Tune)),
    device=st.sampled_from(list(Device)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    micro_tokens=st.integers(1, 9000),
    checkpointing=st.booleans(),
    r=st.integers(1, 256),
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=4).map(tuple),
)


ROUNDING = 16  # bytes: each part is rounded by itself


@given(settings, st.integers(1, 2000), st.integers(1, 64))
def test_more_tokens_and_more_rank_never_need_less(smollm2, setting, tokens, rank):
    here = forecast_memory(smollm2, setting)
    assert here.total_bytes == sum(here.parts.values()) and all(part >= 0 for part in here.parts.values())
    for more in (
        replace(setting, micro_tokens=setting.micro_tokens + tokens),
        replace(setting, r=setting.r + rank),
        replace(setting, lengths=(*setting.lengths, 5)),
    ):
        assert forecast_memory(smollm2, more).total_bytes >= here.total_bytes - ROUNDING
    assert forecast_memory(smollm2, replace(setting, checkpointing=False)).total_bytes >= (
        forecast_memory(smollm2, replace(setting, checkpointing=True)).total_bytes - ROUNDING
    )


@given(settings, st.integers(1, 40), st.integers(1, 40))
def test_more_layers_never_need_less(layers_of, setting, few, more):
    small, large = layers_of(few), layers_of(few + more)
    assert forecast_memory(large, setting).total_bytes >= forecast_memory(small, setting).total_bytes


@pytest.fixture(scope="module")
def smollm2(facts_of):
    return facts_of("smollm2")


@pytest.fixture(scope="module")
def layers_of(smollm2):
    """The same model with another number of layers."""

    def build(layers):
        def scaled(shape):
            return replace(
                shape, count=shape.count // smollm2.layers * layers, active=shape.active // smollm2.layers * layers
            )

        shapes = tuple(scaled(shape) for shape in smollm2.lora_shapes)
        trunk = sum(shape.parameters for shape in shapes)
        rest = smollm2.parameters - smollm2.trunk_linear_parameters
        return replace(smollm2, layers=layers, lora_shapes=shapes, parameters=trunk + rest)

    return build


@pytest.fixture(scope="module")
def facts_of(tmp_path_factory, shapes):
    def read(shape, **more):
        folder = tmp_path_factory.mktemp(shape)
        config = {"model_type": "llama", "max_position_embeddings": 8192, **shapes[shape], **more}
        (folder / "config.json").write_text(json.dumps(config))
        return read_model_facts(str(folder), weights_needed=False)

    return read


# ── what fits ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def plan_for(facts_of, data_of, machine_of):
    def build(shape, gigabytes, *sets, **options):
        recipe = load_recipe(None, {"model": "m/m", "data": "d", **options}, sets)
        return make_plan(recipe, facts_of(shape), data_of(2000, 200, 900), machine_of(gigabytes, Device.CUDA))

    return build


def test_70b_in_4_bits_fits_in_48_gb_part_by_part(plan_for):
    plan = plan_for("llama-70b", 80, "r=16", "offload_checkpoints=false", tune="qlora", memory="48GB")
    parts, linears = plan.memory.parts, 68_451_041_280
    assert plan.memory.fits and plan.memory.total_bytes < 48e9
    assert plan.facts.model.trunk_linear_parameters == linears
    assert parts["weights"] == pytest.approx(linears / 2 + (plan.facts.model.parameters - linears) * 2, abs=1)
    assert parts["quantisation_state"] == pytest.approx(linears * 0.015869, rel=1e-3)
    trained = plan.facts.model.lora_parameters(16)
    assert (parts["adapters"], parts["gradients"], parts["optimizer"]) == (4 * trained, 4 * trained, 8 * trained)
    assert plan.value("gradient_checkpointing") is True
    assert parts["activations"] >= 80 * 8192 * 2 * plan.facts.dataset.length_max
    assert parts["workspace"] + parts["logits"] > 8192 * 28672 * 2  # one dense weight at the least
    assert parts["overhead"] > 0
    require_memory(plan)


def test_4_bits_are_chosen_where_nothing_else_fits_and_nobody_forbade_it(plan_for):
    plan = plan_for("llama-70b", 80)
    assert plan.recipe.tune is Tune.QLORA and plan.memory.fits
    [said] = [text for text in plan.warnings if "4 bits" in text]
    assert "tune: lora" in said
    forbidden = plan_for("llama-70b", 80, tune="lora")
    assert forbidden.recipe.tune is Tune.LORA and not forbidden.memory.fits
    with pytest.raises(InputError, match=r"needs about 1\d\d\.\d GB and has 80\.0 GB.*--tune qlora"):
        require_memory(forbidden)
    assert plan_for("llama-8b", 80).recipe.tune is Tune.LORA
    hopeless = plan_for("llama-70b", 24)
    with pytest.raises(InputError, match="choose a smaller model"):
        require_memory(hopeless)


def test_recomputing_comes_before_4_bits_and_a_users_word_stands(plan_for):
    plan = plan_for("llama-8b", 22)
    assert plan.recipe.tune is Tune.LORA and plan.value("gradient_checkpointing") is True and plan.memory.fits
    kept = plan_for("llama-8b", 22, "gradient_checkpointing=false", tune="lora")
    assert kept.value("gradient_checkpointing") is False
    assert kept.choices["gradient_checkpointing"].set_by is SetBy.USER


# ── against what torch allocates ─────────────────────────────────────────────────────────────────────────────────────

CASES = {
    "lora": {},
    "lora, one long row": {"lengths": (600,)},
    "lora checkpointed": {"checkpointing": True},
    "lora on q and v": {"targets": ("q_proj", "v_proj")},
    "full": {"tune": Tune.FULL},
    "full checkpointed": {"tune": Tune.FULL, "checkpointing": True},
}


@pytest.mark.parametrize("name", CASES)
def test_forecast_is_what_an_update_allocates(name, tmp_path, one_thread):
    changes = {"lengths": (128,) * 4, "micro_tokens": 0, **CASES[name]}
    setting = replace(SMALL, **changes | {"micro_tokens": sum(changes["lengths"])})
    facts, peak, state = measured(setting, tmp_path)
    parts = forecast_memory(facts, setting).parts
    held = sum(parts[part] for part in parts.keys() & {"weights", "adapters", "gradients", "optimizer"})
    assert held == pytest.approx(state, rel=0.002)
    worked = parts["activations"] + parts["logits"] + parts["workspace"]
    assert worked == pytest.approx(peak, rel=0.08)


def measured(setting, folder):
    """The model's facts, the peak of one update's allocations, and the bytes of all that was there before it."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import LlamaConfig, LlamaForCausalLM

    from welltuned.models.full import FullParameters
    from welltuned.models.fuse import find_head, fuse
    from welltuned.models.lora import AdapterBank, LoraSettings, attach
    from welltuned.models.packed import packed_model
    from welltuned.models.recompute import checkpoint_layers
    from welltuned.training.optimizer import AdamWSettings, FlatAdamW
    from welltuned.training.step import Engine, accumulate_gradient

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192, intermediate_size=640, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=2000, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    model = LlamaForCausalLM(config).eval()
    size = sum(p.numel() for p in model.parameters()) * 4
    wanted = LoraSettings(r=setting.r, target_modules=setting.targets or "all-linear")
    trained = FullParameters(model) if setting.tune is Tune.FULL else attach(model, wanted)
    fused = fuse(model, trained if isinstance(trained, AdapterBank) else None)
    if setting.checkpointing:
        checkpoint_layers(model, fused)
    optimizer = FlatAdamW(trained.flat_KP, trained.grad_KP, trained.decayed, AdamWSettings())
    optimizer.step([0.0])
    moments = [t for state in optimizer.adamw.state.values() for t in state.values() if t.dim()]
    buffers = [trained.flat_KP, trained.grad_KP, *moments]
    buffers += [trained.start_KP] if isinstance(trained, AdapterBank) else []
    state = sum(t.numel() * t.element_size() for t in buffers) + (size if isinstance(trained, AdapterBank) else 0)
    rows = [
        SimpleNamespace(ids=np.arange(n) % 1000 + 5, mask=np.ones(n, dtype=bool), origin=str(n))
        for n in setting.lengths
    ]
    engine = Engine(model, trained, find_head(model), setting.micro_tokens)
    record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with packed_model(model), record:
        optimizer.zero_grad()
        accumulate_gradient(engine, rows, range(len(rows)))
        optimizer.step([1e-3])
    assert math.isfinite(float(trained.flat_KP.sum()))
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        now += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, now)
    return read_model_facts(str(folder), weights_needed=False), peak, state


def test_every_measured_configuration_is_forecast_within_a_tenth(monkeypatch):
    """A change of a rule must not undo the benchmark: its measurements against today's forecast."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_of_memory", BENCHMARKS / "memory.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    recorded = json.loads((BENCHMARKS / "results" / "memory.json").read_text(encoding="utf-8"))["cases"]
    measured_of = {run["name"]: run["allocated"] for run in recorded}
    assert len(measured_of) >= 12 and set(measured_of) == {case.name for case in benchmark.CASES}
    for case in benchmark.CASES:
        parts = benchmark.forecast_parts(case)
        assert sum(parts.values()) - parts["overhead"] == pytest.approx(measured_of[case.name], rel=0.1), case.name

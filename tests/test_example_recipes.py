"""The recipes that teach: they are read and planned, and what their comments offer, or say of the advice, is right."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from welltuned.advice.plan import make_plan
from welltuned.choice import SetBy
from welltuned.data.policies import DEFAULT_POLICIES
from welltuned.facts.data import dataset_facts
from welltuned.facts.machine import Device, MachineFacts
from welltuned.facts.model import read_model_facts
from welltuned.recipe import KEYS, METHOD_KEYS, Method, Tune, load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CUT = {"per_device_train_batch_size", "gradient_accumulation_steps", "packing"}  # said otherwise: token_budget
ROWS_OF = {
    "HuggingFaceH4/ultrachat_200k": (207_865, 2048),
    "HuggingFaceH4/ultrafeedback_binarized": (61_135, 1024),
    "trl-lib/ultrafeedback_binarized": (62_135, 1024),
    "trl-lib/kto-mix-14k": (13_500, 1024),
    "argilla/distilabel-capybara-dpo-7k-binarized": (7_563, 2048),
    "openai/gsm8k": (7_473, 256),
    "roneneldan/TinyStories": (2_119_719, 1024),
}
"""Hub datasets: rows of the split, and how long they are allowed to be."""

# Published configurations, as far as parameters and memory depend on them, and the number of parameters they make.
QWEN3 = dict(model_type="qwen3", head_dim=128, num_key_value_heads=8, vocab_size=151936, max_position_embeddings=40960)
MISTRAL = dict(
    model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=32000, max_position_embeddings=32768,
)  # fmt: skip
SMOLLM2 = dict(
    model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": (494_032_768, dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True)),
    "Qwen/Qwen3-1.7B": (1_720_574_976, dict(
        QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True)),
    "Qwen/Qwen3-8B": (8_190_735_360, dict(
        QWEN3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=False)),
    "Qwen/Qwen3-14B": (14_768_307_200, dict(
        QWEN3, hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
        tie_word_embeddings=False)),
    "Qwen/Qwen3-32B": (32_762_123_264, dict(
        QWEN3, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        tie_word_embeddings=False)),
    "meta-llama/Llama-3.3-70B-Instruct": (70_553_706_496, dict(
        model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072)),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, MISTRAL),
    "alignment-handbook/zephyr-7b-sft-full": (7_241_732_096, MISTRAL),
    "HuggingFaceTB/SmolLM2-135M": (134_515_008, SMOLLM2),
    "smollm2-135m-instruct": (134_515_008, SMOLLM2),
}  # fmt: skip


@pytest.fixture(scope="module")
def facts_of_model(tmp_path_factory):
    def read(model):
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(MODELS[model][1]))
        return read_model_facts(str(folder), weights_needed=False)

    return read


@pytest.mark.parametrize("model", MODELS)
def test_dimensions_are_the_published_ones(facts_of_model, model):
    facts = facts_of_model(model)
    assert facts.parameters == MODELS[model][0] and facts.parameters_exact


@pytest.fixture(scope="module")
def plan_for(facts_of_model):
    """The plan of a recipe on one GPU of 140 GB (a recipe's own `memory` is less), from facts alone."""
    memory = 140 * 10**9
    machine = MachineFacts(
        device=Device.CUDA, cores=16, memory_total=memory, memory_available=memory, native_bf16=True, gpu_name="a GPU",
        gpu_memory_total=memory, gpu_memory_available=memory,
    )  # fmt: skip

    def plan(path, *sets):
        recipe = load_recipe(str(path), sets=sets)
        count, longest = ROWS_OF.get(recipe.datasets[0], (340, 220))
        lengths = np.linspace(longest // 10, longest, count).astype(int)
        held = lengths[:: max(1, count // 1000)]
        data = dataset_facts(lengths, lengths // 2, held, held // 2, "messages")
        return make_plan(recipe, facts_of_model(recipe.model), data, machine)

    return plan


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_is_read(path):
    recipe = load_recipe(str(path))
    for data in (*recipe.datasets, *recipe.eval_datasets):
        assert data in ROWS_OF or (ROOT / data).is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_is_planned_and_fits(path, plan_for):
    plan = plan_for(path)
    assert plan.memory.fits, plan.memory
    for name, choice in plan.choices.items():
        assert choice.value is not None and choice.reason and choice.evidence, name
        number = isinstance(choice.value, int | float) and not isinstance(choice.value, bool)
        assert (choice.low is not None) == (number and name != "seed"), name
        assert choice.low is None or choice.low <= choice.high, name
    user = {name for name, choice in plan.choices.items() if choice.set_by is SetBy.USER}
    assert user == set(load_recipe(str(path)).hyperparameters) & set(plan.choices)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_comments_are_valid_too(path, tmp_path):
    """A line of `# key: value` becomes a setting when its mark is taken away, one at a time."""
    text = path.read_text(encoding="utf-8")
    offers = re.findall(r"^# (([a-z_0-9]+): .*)$", text, flags=re.MULTILINE)
    offers = [(line, key) for line, key in offers if key in KEYS]
    assert offers or "\nmemory: " in text
    for line, key in offers:
        lines = text.replace("# " + line, line).splitlines()
        if key in ("eval_fraction", "group_by"):  # instead of eval_data
            lines = [other for other in lines if not other.startswith("eval_data:")]
        lines = [other for other in lines if other == line or not other.startswith(f"{key}: ")]  # offered instead
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


# ── the handbook's pairs ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "rate", "low", "high"),
    [
        ("sft_full", 2e-5, 0.5, 2),  # "the advice lands within a factor of two of it"
        ("sft_qlora", 2e-4, 1.3, 4),  # "the advice says about twice this here"
        ("dpo_full", 5e-7, 0.5, 2),  # "nearly the same number"
        ("dpo_qlora", 5e-6, 0.25, 1),  # "within the advice's range, in its upper half"
    ],
)
def test_zephyr_rates_and_the_advice(name, rate, low, high, plan_for):
    """What the comments say of the advice, in words, holds of today's rules."""
    path = ROOT / "recipes" / f"zephyr_7b_{name}.yaml"
    plan = plan_for(path)
    assert plan.value("learning_rate") == rate
    advised = plan_for(path, "learning_rate=auto").value("learning_rate")
    assert low <= advised / rate <= high
    if name == "dpo_qlora":
        assert rate <= plan.choices["learning_rate"].high


def test_zephyr_pairs():
    recipes = {
        (method, tune): load_recipe(str(ROOT / "recipes" / f"zephyr_7b_{method}_{tune}.yaml")).hyperparameters
        for method in ("sft", "dpo")
        for tune in ("full", "qlora")
    }
    for method in ("sft", "dpo"):
        full, qlora = recipes[method, "full"], recipes[method, "qlora"]
        assert qlora["learning_rate"] == pytest.approx(10 * full["learning_rate"])
    assert recipes["dpo", "qlora"]["r"] == recipes["dpo", "qlora"]["lora_alpha"] == 128
    assert recipes["dpo", "full"]["beta"] == recipes["dpo", "qlora"]["beta"] == 0.01


@pytest.mark.parametrize("name", ["sft_full", "sft_qlora", "dpo_full", "dpo_qlora"])
def test_zephyr_warm_up_is_a_tenth(name):
    """The handbook says it as a share; the number of rows, less those held out, makes it a number of updates."""
    recipe = load_recipe(str(ROOT / "recipes" / f"zephyr_7b_{name}.yaml"))
    rows = ROWS_OF[recipe.datasets[0]][0] * (1 - recipe.eval_fraction)
    updates = rows / recipe.hyperparameters["effective_batch_size"]
    assert recipe.hyperparameters["warmup_steps"] == pytest.approx(updates / 10, rel=0.01)


@pytest.mark.parametrize("size", ["0.5b", "1b_3b", "7b_9b", "14b_qlora", "32b_qlora", "70b_qlora"])
def test_sizes_leave_the_numbers_to_the_advice(size, plan_for):
    path = ROOT / "recipes" / f"sft_{size}.yaml"
    assert dict(load_recipe(str(path)).hyperparameters) == {}
    plan = plan_for(path)
    small = size in ("0.5b", "1b_3b")  # far above the common default of 2e-4; larger ones are near it
    assert plan.value("learning_rate") > (5e-4 if small else 1e-4)
    if size == "70b_qlora":
        assert plan.value("gradient_checkpointing") and plan.memory.total_bytes < 48e9

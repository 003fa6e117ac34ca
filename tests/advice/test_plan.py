import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from welltuned.advice.activations import MemorySetting
from welltuned.advice.effort import SpeedFrom, flops_per_token
from welltuned.advice.evidence import row
from welltuned.advice.memory import forecast_memory
from welltuned.advice.plan import make_plan, plan_from_yaml, plan_lines, plan_to_yaml, require_memory
from welltuned.advice.rules import number
from welltuned.choice import SetBy
from welltuned.errors import InputError
from welltuned.facts.data import dataset_facts
from welltuned.facts.machine import Device
from welltuned.recipe import Method, Tune, load_recipe

NAMES = [
    "learning_rate",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "torch_compile",
    "init_lora_weights",
    "bias",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "effective_batch_size",
    "num_train_epochs",
    "warmup_steps",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "optim",
    "max_grad_norm",
    "max_length",
    "packing",
    "assistant_only_loss",
    "gradient_checkpointing",
    "dtype",
    "seed",
    "eval_steps",
    "token_budget",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "early_stopping_patience",
]
OBJECTIVE = {
    Method.DPO: {"loss_type", "beta", "label_smoothing"},
    Method.ORPO: {"beta"},
    Method.KTO: {"beta", "desirable_weight", "undesirable_weight"},
    Method.REWARD: {"center_rewards_coefficient"},
    Method.GRPO: {
        *("loss_type", "beta", "num_generations", "max_completion_length", "temperature", "top_p", "epsilon"),
        *("epsilon_high", "scale_rewards", "mask_truncated_completions", "num_iterations"),
    },
}
LORA = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights", "bias"}


@pytest.fixture
def plan_for(model_of, data_of, machine_of):
    smollm2 = model_of("smollm2")

    def build(*sets, model=None, data=None, machine=None, speed=None, **options):
        recipe = load_recipe(None, {"model": "m/m", "data": "d", **options}, sets)
        return make_plan(recipe, model or smollm2, data or data_of(), machine or machine_of(), speed)

    return build


GENERAL = {"bias", "init_lora_weights", "seed", "use_rslora", "lora_alpha", "target_modules"}


@pytest.mark.parametrize("tune", Tune)
@pytest.mark.parametrize("method", Method)
def test_every_choice_has_value_reason_and_evidence(plan_for, method, tune):
    """And a range, where one can be had, and this run's numbers in its reason."""
    plan = plan_for(method=str(method), tune=str(tune))
    names = set(NAMES) - (LORA if tune is Tune.FULL else set()) | OBJECTIVE.get(method, set())
    names |= {"dense_base"} if tune is Tune.QLORA else set()
    assert set(plan.choices) == (names if method is Method.SFT else names - {"assistant_only_loss"})
    for name, choice in plan.choices.items():
        assert choice.value is not None and choice.set_by is SetBy.ADVICE, name
        assert len(choice.reason) > 30 and choice.evidence, name
        assert all(row(id) for id in choice.evidence)
        assert name in GENERAL or any(digit.isdigit() for digit in choice.reason), name
        number = isinstance(choice.value, int | float) and not isinstance(choice.value, bool)
        assert (choice.low is not None) == (number and name != "seed"), name
        if choice.low is not None:
            assert choice.low <= choice.value <= choice.high, name


@pytest.mark.parametrize("tune", Tune)
def test_continued_pretraining_too(plan_for, data_of, tune):
    """Every choice for plain texts has its range, reason and evidence, and some are other than for answers."""
    texts = plan_for(tune=str(tune), data=replace(data_of(), format_name="text", supervised_tokens=50_000))
    answers = plan_for(tune=str(tune))
    for name, choice in texts.choices.items():
        assert choice.reason and all(row(id) for id in choice.evidence) and choice.evidence, name
        assert choice.low is None or choice.low <= choice.value <= choice.high, name
    assert texts.value("learning_rate") < answers.value("learning_rate") and not texts.value("assistant_only_loss")


def test_reasons_speak_of_this_users_numbers(plan_for):
    plan = plan_for()
    assert "where your 340 rows make 129 updates of 8" in plan.choices["learning_rate"].reason
    assert plan.updates == 129 and plan.value("effective_batch_size") == 8


def test_a_short_small_run_does_not_get_the_common_default(plan_for):
    small = plan_for("lora_alpha=16", "max_steps=40", "effective_batch_size=8")
    assert 3.5e-3 <= small.value("learning_rate") <= 6e-3 and small.updates == 40


def test_json_contract(plan_for):
    document = json.loads(json.dumps(plan_for(memory="8GB").to_json(), allow_nan=False))
    assert set(document) == {"choices", "facts", "memory", "warnings"}
    assert set(document["memory"]) == {"total_bytes", "parts", "fits"}
    assert document["memory"]["total_bytes"] == sum(document["memory"]["parts"].values())
    assert set(document["choices"]["r"]) == {"value", "low", "high", "reason", "evidence", "set_by"}
    assert (
        document["choices"]["r"]["set_by"] == "advice"
        and document["choices"]["target_modules"]["value"] == "all-linear"
    )
    assert document["facts"]["model"]["parameters"] == 134_515_008
    assert document["facts"]["dataset"]["rows"] == 340 and document["facts"]["run"]["updates"] == 129


def test_yaml_round_trip(plan_for):
    plan = plan_for("target_modules=[q_proj]", "learning_rate=1e-5", memory="8GB", speed=1.234e11)
    again = plan_from_yaml(plan_to_yaml(plan))
    assert again == plan and again.value("target_modules") == ("q_proj",)
    for broken in ("choices: 1", "[1]", "a: [", plan_to_yaml(plan) + "more: 1\n", ""):
        with pytest.raises(InputError, match="not a plan"):
            plan_from_yaml(broken)


def test_lines_for_the_screen(plan_for):
    lines = {line.name: line for line in plan_lines(plan_for())}
    assert lines["learning_rate"].value == "2.6e-3"
    assert "–" in lines["learning_rate"].span and lines["optim"].span == "" and lines["seed"].value == "3407"


USER = {
    "learning_rate": 5.0, "r": 3, "lora_alpha": 7.0, "lora_dropout": 0.5, "use_rslora": True, "bias": "all",
    "init_lora_weights": "gaussian", "num_train_epochs": 11.0, "warmup_steps": 99, "lr_scheduler_type": "constant",
    "weight_decay": 3.0, "adam_beta1": 0.1, "adam_beta2": 0.2, "optim": "adamw_torch", "max_grad_norm": 77.0,
    "max_length": 90, "packing": False, "assistant_only_loss": False, "gradient_checkpointing": True,
    "dtype": "bfloat16", "seed": 1, "eval_steps": 5, "token_budget": 333, "effective_batch_size": 7,
    "target_modules": ["q_proj", "down_proj"], "max_steps": 12, "save_steps": 13, "save_total_limit": 9,
    "load_best_model_at_end": False, "early_stopping_patience": 8,
}  # fmt: skip


@given(st.sets(st.sampled_from(sorted(USER)), min_size=1))
def test_user_values_are_never_changed(smollm2_facts, data_of, machine_of, keys):
    recipe = load_recipe(None, {"model": "m/m", "data": "d", **{key: USER[key] for key in keys}})
    plan = make_plan(recipe, smollm2_facts, data_of(), machine_of())
    for key in keys:
        value = tuple(USER[key]) if isinstance(USER[key], list) else USER[key]
        assert plan.value(key) == value and plan.choices[key].set_by is SetBy.USER
        assert plan.choices[key].reason.startswith("set by you")
    for name in set(plan.choices) - keys:
        assert plan.choices[name].set_by is SetBy.ADVICE
    size = plan.value("per_device_train_batch_size") * plan.value("gradient_accumulation_steps")
    assert plan.value("effective_batch_size") == size


@pytest.fixture(scope="module")
def smollm2_facts(tmp_path_factory, shapes):
    from welltuned.facts.model import read_model_facts

    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **shapes["smollm2"]}))
    return read_model_facts(str(folder), weights_needed=False)


def test_far_out_values_are_warned_of_weightiest_first(plan_for):
    plan = plan_for("learning_rate=1e-7", "r=1", "lora_dropout=0.5")
    first, *rest = plan.warnings
    assert first.startswith("learning_rate 1e-7 (yours) is below the sound range")
    assert any("r 1 (yours)" in text for text in rest) and any("lora_dropout 0.5" in text for text in rest)
    assert plan_for().warnings == ()


def test_rate_follows_the_users_alpha_and_batch(plan_for):
    base, doubled = plan_for("max_steps=100"), plan_for("lora_alpha=64", "max_steps=100")
    fall = 2 ** -number("rate_alpha_exponent")
    assert doubled.value("learning_rate") == pytest.approx(base.value("learning_rate") * fall, rel=0.05)


@pytest.mark.parametrize(
    ("sets", "numbers"),
    [
        ((), (8, 8, 1)),
        (("effective_batch_size=32",), (32, None, None)),
        (("per_device_train_batch_size=2", "gradient_accumulation_steps=8"), (16, 2, 8)),
        (("per_device_train_batch_size=2",), (8, 2, 4)),
        (("per_device_train_batch_size=3",), (9, 3, 3)),
        (("per_device_train_batch_size=64",), (64, 64, 1)),
        (("gradient_accumulation_steps=4",), (8, 2, 4)),
        (("effective_batch_size=16", "gradient_accumulation_steps=16"), (16, 1, 16)),
        (("effective_batch_size=16", "gradient_accumulation_steps=2", "per_device_train_batch_size=8"), (16, 8, 2)),
    ],
)
def test_batch_numbers_agree(plan_for, sets, numbers):
    plan = plan_for(*sets)
    names = ("effective_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
    found = tuple(plan.value(name) for name in names)
    assert found[0] == found[1] * found[2]
    assert all(want is None or want == got for want, got in zip(numbers, found, strict=True)), found


def test_contradictory_batch_numbers(plan_for):
    with pytest.raises(InputError, match="2 × gradient_accumulation_steps 3 is not effective_batch_size 7"):
        plan_for("effective_batch_size=7", "per_device_train_batch_size=2", "gradient_accumulation_steps=3")
    with pytest.raises(InputError, match="not a multiple of per_device_train_batch_size 2"):
        plan_for("effective_batch_size=7", "per_device_train_batch_size=2")


@pytest.mark.parametrize(("rows", "epochs", "batch"), [(2, 3, 2), (100, 3, 4), (340, 3, 8), (1000, 3, 16),
                                                       (4000, 2, 16), (20_000, 2, 32), (100_000, 1, 64)])  # fmt: skip
def test_epochs_and_batch_by_rows(plan_for, rows, epochs, batch, data_of):
    plan = plan_for(data=data_of(rows, heldout=1))
    assert (plan.value("num_train_epochs"), plan.value("effective_batch_size")) == (epochs, batch)
    assert 1 <= plan.value("warmup_steps") <= max(1, plan.updates // 10)
    assert 1 <= plan.value("eval_steps") <= plan.updates


def test_few_updates_are_warned_of(plan_for, data_of):
    assert any("only 3 updates" in text for text in plan_for(data=data_of(2, heldout=1)).warnings)


def test_rank_grows_with_the_data(plan_for, data_of):
    assert plan_for().value("r") == 16
    assert plan_for(data=data_of(300_000)).value("r") == 32
    assert plan_for(data=data_of(1_000_000)).value("r") == 64
    assert plan_for(data=data_of(2_000_000)).value("r") == 128


def test_unknown_target_is_refused(plan_for):
    with pytest.raises(InputError, match="no linear layer named 'q_porj'; did you mean 'q_proj'"):
        plan_for("target_modules=q_porj")


def test_nothing_is_cut_unless_the_context_or_memory_demands(plan_for, data_of):
    plan = plan_for()
    assert plan.value("max_length") >= 220 and not plan.warnings
    long = plan_for(data=data_of(high=9000, heldout=1))
    assert long.value("max_length") == 8192 and "context is 8,192" in long.warnings[0]
    tail = dataset_facts([200] * 990 + [6000] * 10, [50] * 1000, [200], [50], "messages")
    assert plan_for(data=tail).value("max_length") == 6000
    tight = plan_for(data=tail, memory="1.5GB")
    assert tight.value("gradient_checkpointing") and tight.value("max_length") < 6000 and tight.memory.fits
    assert "cuts about" in tight.warnings[0]


def test_too_little_memory_says_what_would_do(plan_for, model_of, machine_of):
    plan = plan_for(model=model_of("llama-8b"), machine=machine_of(24, Device.CUDA), tune="full")
    assert plan.memory.fits is False and plan.warnings[0].startswith("does not fit: needs about ")
    with pytest.raises(InputError, match="memory: the run needs about .* --tune lora"):
        require_memory(plan)
    require_memory(plan_for())
    hopeless = plan_for(model=model_of("llama-70b"), machine=machine_of(8, Device.CUDA))
    assert "choose a smaller model" in hopeless.warnings[0]


def test_eight_bits_only_where_nothing_else_fits(plan_for, model_of, machine_of):
    """AdamW's state of 8B is 64 GB in fp32 and 16 in 8 bits: only a full fine-tune that does not fit gets it."""
    full = dict(model=model_of("llama-8b"), machine=machine_of(200, Device.CUDA), tune="full")
    tight = plan_for(**full, memory="110GB")
    choice = tight.choices["optim"]
    assert choice.value == "adamw_8bit" and tight.memory.fits and "E229" in choice.evidence
    assert choice.reason.startswith("only so does the run fit into 110.0 GB") and "47.9 GB" in choice.reason
    assert tight.memory.parts["optimizer"] == pytest.approx(2.03 * model_of("llama-8b").parameters, rel=0.02)
    longest = plan_for(**full).value("max_length")
    assert tight.value("max_length") == longest  # rather than cut rows
    assert plan_for(**full).value("optim") == "adamw"
    mine = plan_for("optim=adamw_torch", **full, memory="110GB")
    assert mine.value("optim") == "adamw_torch" and mine.memory.fits is False
    assert plan_for(**full, memory="20GB").value("optim") == "adamw"  # nothing would do
    small = plan_for(model=model_of("llama-8b"), machine=machine_of(17, Device.CUDA), tune="lora")
    assert small.memory.fits is False and small.value("optim") == "adamw"  # an adapter's state is small


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"])
def test_eight_bits_where_the_user_says_so(plan_for, name):
    plan = plan_for(f"optim={name}")
    usual = plan_for().memory.parts["optimizer"] / number("memory_adam_bytes") * number("memory_adam_8bit_bytes")
    assert plan.value("optim") == name and "the advice is adamw" in plan.choices["optim"].reason
    work = number("memory_adam_8bit_work_cpu")
    assert plan.memory.parts["optimizer"] == pytest.approx(usual + work, abs=2)
    assert any("nothing is paged out" in text for text in plan.warnings) is name.startswith("paged")


def memory(model, tune, tokens=2048, checkpointing=False, r=16):
    setting = MemorySetting(
        tune=tune, dtype="bfloat16", device=Device.CUDA, micro_tokens=tokens, checkpointing=checkpointing, r=r
    )
    return forecast_memory(model, setting)


def test_memory_of_8b(model_of):
    model = model_of("llama-8b")
    lora, qlora, full = (memory(model, tune) for tune in (Tune.LORA, Tune.QLORA, Tune.FULL))
    assert lora.parts["weights"] == model.parameters * 2
    assert lora.parts["activations"] / 2048 == 32 * 2 * (4 * 4096 + 2 * (4096 + 1024) + 2 * 14336 + 7 * 16)
    assert 24e9 < lora.total_bytes < 27e9 and 14e9 < qlora.total_bytes < 17e9
    nf4 = qlora.parts["weights"] - (model.parameters - model.trunk_linear_parameters) * 2
    assert (nf4 + qlora.parts["quantisation_state"]) / model.trunk_linear_parameters * 8 == pytest.approx(
        4.127, abs=1e-3
    )
    trained = sum(full.parts[part] for part in ("weights", "gradients", "optimizer"))
    assert trained == model.parameters * 16
    assert lora.parts["optimizer"] == 8 * model.lora_parameters(16)
    assert memory(model, Tune.LORA, checkpointing=True).total_bytes < lora.total_bytes - 5e9


def test_70b_qlora_fits_in_48_gb_with_its_parts(plan_for, model_of, machine_of):
    plan = plan_for(model=model_of("llama-70b"), machine=machine_of(80, Device.CUDA), tune="qlora", memory="48GB")
    assert plan.memory.fits and 40e9 < plan.memory.total_bytes < 48e9
    assert plan.value("gradient_checkpointing") is True
    parts = {"weights", "quantisation_state", "adapters", "gradients", "optimizer", "activations", "workspace",
             "logits", "overhead"}  # fmt: skip
    assert set(plan.memory.parts) == parts


def test_plenty_of_memory_means_no_recomputation(plan_for, model_of, data_of, machine_of):
    plan = plan_for(model=model_of("llama-8b"), machine=machine_of(140, Device.CUDA), data=data_of(5000, 1000, 4000))
    assert plan.value("gradient_checkpointing") is False and plan.value("token_budget") == 16384
    assert plan.value("dtype") == "bfloat16"


def test_dtype_on_cpu(plan_for, machine_of):
    assert plan_for().value("dtype") == "float32"
    assert plan_for(machine=machine_of(amx=True)).value("dtype") == "bfloat16"
    half = plan_for(machine=replace(machine_of(), native_bf16=True))  # AVX512-BF16
    assert half.value("dtype") == "bfloat16"
    assert half.memory.parts["overhead"] - plan_for().memory.parts["overhead"] > 0.8 * number("memory_compiled_cpu")
    assert plan_for(machine=machine_of(amx=True), tune="full").value("dtype") == "float32"


def test_arithmetic_of_8b_lora(model_of):
    model = model_of("llama-8b")
    flops = flops_per_token(model, Tune.LORA, model.lora_parameters(16), 4096, 1.0, False)
    assert flops == pytest.approx(34.0e9, rel=0.01)
    assert flops_per_token(model, Tune.LORA, model.lora_parameters(16), 4096, 1.0, True) == pytest.approx(
        49.1e9, rel=0.01
    )


def test_time_forecast(plan_for):
    plan = plan_for(speed=1e11)
    assert plan.time.tokens == pytest.approx(3 * 340 * 150, rel=0.01) and plan.time.speed_from is SpeedFrom.MEASURED
    assert plan.time.seconds == pytest.approx(plan.time.tokens * plan.time.flops_per_token / 1e11, rel=1e-3)
    by_arithmetic = plan_for().time
    assert by_arithmetic.speed_from is SpeedFrom.ARITHMETIC and 20 < by_arithmetic.tokens_per_second < 1000
    assert plan_for(method="grpo").time.seconds is None and plan_for(method="grpo", speed=1e9).time.seconds > 0


@pytest.mark.parametrize(("sets", "updates"), [(("max_steps=50",), 50), (("max_steps=50", "num_train_epochs=1"), 43),
                                               (("max_steps=20", "num_train_epochs=1"), 20)])  # fmt: skip
def test_the_run_ends_at_the_earlier_limit(plan_for, sets, updates):
    plan = plan_for(*sets, "effective_batch_size=8")
    assert plan.updates == updates and plan.value("max_steps") == int(sets[0].split("=")[1])


def test_warnings_about_the_data(plan_for, data_of):
    data = replace(data_of(), heldout_rows=0, heldout_tokens=0, duplicates=3, unsupervised_rows=1)
    texts = "\n".join(plan_for(data=data).warnings)
    assert "no held-out rows" in texts and "1 row without a trained token" in texts
    assert "3 training rows duplicated" in texts


def test_planning_imports_no_torch(write_config, shapes):
    folder = write_config(model_type="llama", **shapes["smollm2"])
    script = f"""
import sys
from welltuned.advice.plan import make_plan, plan_lines
from welltuned.facts.data import dataset_facts
from welltuned.facts.machine import read_machine_facts
from welltuned.facts.model import read_model_facts
from welltuned.recipe import load_recipe
facts = read_model_facts({folder!r}, weights_needed=False)
data = dataset_facts([9, 9], [3, 3], [9], [3], "messages")
plan_lines(make_plan(load_recipe(None, dict(model="m", data="d")), facts, data, read_machine_facts()))
print([name for name in ("torch", "transformers", "huggingface_hub", "gguf") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ── variants of LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_variants_are_shown_where_they_are_asked_for(plan_for):
    sets = ("use_dora=true", "rank_pattern={down_proj: 64}", "layers_to_transform=[0, 1, 2]", "ema_decay=0.99")
    plan, plain = plan_for(*sets), plan_for()
    for name in ("use_dora", "rank_pattern", "layers_to_transform", "ema_decay"):
        choice = plan.choices[name]
        assert choice.set_by is SetBy.USER and choice.reason.startswith("set by you") and choice.evidence
        assert name not in plain.choices
    assert "3 of 30 layers" in plan.choices["layers_to_transform"].reason
    assert plan_from_yaml(plan_to_yaml(plan)) == plan
    assert "average" in plan.memory.parts and "average" not in plain.memory.parts


def test_loraplus_keeps_bs_rate(plan_for):
    """A's rate is the law's over the ratio, so that what moves first moves as far."""
    plain, plus = plan_for(), plan_for("loraplus_lr_ratio=16", "modules_to_save=[embed_tokens]")
    assert plus.value("learning_rate") * 16 == pytest.approx(plain.value("learning_rate"), rel=0.05)
    assert plus.choices["learning_rate"].low <= plus.value("learning_rate") <= plus.choices["learning_rate"].high
    assert "A's is 16 times lower" in plus.choices["learning_rate"].reason
    assert plus.value("embedding_learning_rate") == pytest.approx(plain.value("learning_rate") / 10, rel=0.05)
    own = plan_for("modules_to_save=[embed_tokens]", "embedding_learning_rate=1e-5", "learning_rate=1e-3")
    assert (own.value("embedding_learning_rate"), own.value("learning_rate")) == (1e-5, 1e-3)


@pytest.mark.parametrize(
    "sets",
    [
        ("use_dora=true",),
        ("rank_pattern={down_proj: 64, q_proj: 2}",),
        ("layers_to_transform=[3, 4]",),
        ("modules_to_save=[embed_tokens]",),
        ("modules_to_save=[lm_head]", "use_dora=true", "layers_to_transform=[1]"),
    ],
)
def test_what_variants_train_is_counted(smollm2_facts, shapes, plan_for, sets):
    """By the plan as by the model without numbers."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from welltuned.models.lora import attach
    from welltuned.models.saved import named_modules
    from welltuned.training.starting import lora_settings

    plan = plan_for(*sets)
    known = {k: v for k, v in shapes["smollm2"].items() if k != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**known))
    model.requires_grad_(False)
    saved = plan.value("modules_to_save") if "modules_to_save" in plan.choices else ()
    bank = attach(model, lora_settings(plan), named_modules(model, saved))
    counted = plan.memory.parts["gradients"] / 4
    assert counted == bank.flat_KP.numel()

"""Every check fires on a config that has its fault and no other; nothing fires on the config without it."""

import json
import math
from pathlib import Path

import pytest
import yaml

from welltuned.advice.lint import CHECKS, FAMILIES, Severity, findings_of
from welltuned.advice.lint.config import Config, Form, Tool
from welltuned.advice.lint.derived import active_parameters, is_mixture, parameters_in_name, updates
from welltuned.advice.lint.page import page
from welltuned.interop import read_config
from welltuned.recipe import Method, Tune

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON = {
    "model_name_or_path": "org/Base-7B",
    "dataset_name": "org/data",
    "dtype": "bfloat16",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_length": 2048,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "bf16": True,
}
ADAPTER = {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": LINEAR}
SFT = {**COMMON, **ADAPTER, "learning_rate": 0.0002, "assistant_only_loss": True}
FULL = {**COMMON, "learning_rate": 0.00002, "assistant_only_loss": True}
DPO = {**COMMON, **ADAPTER, "learning_rate": 0.000005, "beta": 0.1, "precompute_ref_log_probs": False}
DPO_FULL = {**COMMON, "learning_rate": 0.0000005, "beta": 0.1, "precompute_ref_log_probs": False}
GRPO = {**COMMON, **ADAPTER, "learning_rate": 0.00001, "num_generations": 8, "max_completion_length": 512}
del GRPO["max_length"]
AXOLOTL = {
    "base_model": "org/Base-7B",
    "datasets": [{"path": "org/data", "type": "chat_template"}],
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
    "sequence_len": 2048,
    "val_set_size": 0.05,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "num_epochs": 2,
    "learning_rate": 0.0002,
    "optimizer": "adamw_torch",
    "bf16": "auto",
}
FACTORY = {
    "stage": "sft",
    "finetuning_type": "lora",
    "model_name_or_path": "org/Base-7B",
    "dataset": "data",
    "template": "default",
    "cutoff_len": 2048,
    "lora_rank": 16,
    "lora_target": "all",
    "val_size": 0.05,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "learning_rate": 0.0002,
    "warmup_ratio": 0.05,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 2,
    "bf16": True,
}
OURS = {"model": "org/Base-7B", "data": "rows.jsonl"}
SCRIPT = """
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

{before}
args = SFTConfig(
    output_dir="out", learning_rate=2e-4, num_train_epochs=2, max_length=2048, warmup_steps=0.05, bf16=True,
    per_device_train_batch_size=4, gradient_accumulation_steps=4, assistant_only_loss=True,
    eval_strategy="steps", eval_steps=100, {args}
)
adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
trainer = SFTTrainer(
    model={model}, args=args, train_dataset=rows["train"], eval_dataset=rows["test"], peft_config={peft}, {trainer}
)
{after}
"""


def script(before="", args="", model='"org/Base-7B"', peft="adapter", trainer="", after=""):
    return SCRIPT.format(before=before, args=args, model=model, peft=peft, trainer=trainer, after=after)


QUANTISED = 'model = AutoModelForCausalLM.from_pretrained("org/Base-7B", quantization_config=BitsAndBytesConfig({}))'
NF4 = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"'
UNSLOTH = """
from trl import GRPOConfig, GRPOTrainer
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Base-7B", max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
trainer = GRPOTrainer(model=model, args=GRPOConfig(learning_rate=5e-6, num_generations=4, per_device_train_batch_size=1,
    gradient_accumulation_steps=1, max_steps=300), train_dataset=rows)
"""


def changed(base, drop=(), **values):
    return {key: value for key, value in {**base, **values}.items() if key not in drop}


CASES = [  # what must be found, and in what; a text is a script, a dict a YAML file
    ("WT001", changed(SFT, learning_rate=0.01)),
    ("WT001", changed(SFT, model_name_or_path="org/Base-135M", learning_rate=0.05)),
    ("WT001", changed(AXOLOTL, loraplus_lr_ratio=64, learning_rate=0.0002)),
    ("WT002", changed(SFT, learning_rate=0.002)),
    ("WT003", changed(SFT, learning_rate=0.00002)),
    ("WT003", changed(SFT, ("learning_rate",))),
    ("WT003", changed(AXOLOTL, learning_rate="2e-5")),
    ("WT003", changed(FACTORY, ("learning_rate",), lora_alpha=16)),
    ("WT004", changed(SFT, learning_rate=0.000001)),
    ("WT005", changed(FULL, learning_rate=0.0002)),
    ("WT005", changed(FACTORY, ("lora_rank", "lora_target"), finetuning_type="full")),
    ("WT006", changed(FULL, learning_rate=0.0001)),
    ("WT007", changed(FULL, learning_rate=0.0000003)),
    ("WT008", changed(SFT, max_steps=2000, learning_rate=0.00005, drop=("num_train_epochs",))),
    ("WT009", changed(DPO, learning_rate=0.00005)),
    ("WT009", changed(DPO_FULL, learning_rate=0.000006)),
    ("WT010", changed(DPO, learning_rate=0.0002)),
    ("WT010", changed(DPO_FULL, learning_rate=0.00001)),
    ("WT010", changed(AXOLOTL, rl="dpo")),
    ("WT011", changed(DPO, ("learning_rate",), lora_alpha=16)),
    ("WT012", changed(GRPO, learning_rate=0.0003)),
    ("WT013", changed(GRPO, learning_rate=0.001)),
    ("WT014", changed(GRPO, ("learning_rate",), lora_alpha=16)),
    ("WT015", changed(SFT, lr_scheduler_type="constant")),
    (
        "WT016",
        changed(SFT, ("num_train_epochs",), warmup_steps=100, max_steps=100, lora_alpha=16, learning_rate=0.0005),
    ),
    ("WT017", changed(SFT, ("num_train_epochs",), warmup_steps=100, max_steps=300, learning_rate=0.0003)),
    ("WT017", changed(SFT, warmup_steps=0.3)),
    ("WT018", changed(SFT, warmup_steps=0, learning_rate=0.0009)),
    ("WT019", changed(SFT, ("num_train_epochs",), max_steps=1000, weight_decay=0.01, learning_rate=0.0003)),
    ("WT020", changed(SFT, ("use_peft",))),
    ("WT020", changed(AXOLOTL, ("adapter",), learning_rate=0.00002)),
    ("WT020", script(peft="None", before="lora = LoraConfig(r=8)").replace("learning_rate=2e-4", "learning_rate=2e-5")),
    ("WT021", changed(SFT, lora_r=32, lora_alpha=16)),
    ("WT022", changed(SFT, lora_r=64, lora_alpha=64, use_rslora=True, learning_rate=0.0001, model_name_or_path="m")),
    ("WT023", changed(SFT, lora_target_modules=["q_proj", "v_proj"])),
    ("WT023", changed(SFT, ("lora_target_modules",))),
    ("WT024", changed(SFT, lora_target_modules=[*LINEAR, "qproj"])),
    ("WT025", changed(SFT, lora_target_modules=[*LINEAR, "lm_head"])),
    ("WT026", changed(SFT, lora_dropout=0.5)),
    ("WT027", changed(SFT, lora_target_parameters=["mlp.experts.gate_up_proj"], lora_dropout=0.05)),
    ("WT028", changed(SFT, lora_r=512, lora_alpha=512, learning_rate=0.00005)),
    ("WT028", changed(SFT, lora_r=2)),
    ("WT030", changed(SFT, ("eval_strategy", "eval_steps"))),
    ("WT030", changed(AXOLOTL, val_set_size=0)),
    ("WT031", changed(AXOLOTL, val_set_size=0, num_epochs=5)),
    ("WT031", changed(SFT, ("eval_strategy", "eval_steps"), num_train_epochs=5)),
    ("WT032", script().replace('eval_strategy="steps", eval_steps=100, ', "")),
    ("WT033", changed(FACTORY, val_size=0, drop=("eval_steps",))),
    ("WT034", changed(SFT, load_best_model_at_end=True, save_steps=150)),
    ("WT034", changed(SFT, load_best_model_at_end=True, save_strategy="epoch")),
    ("WT035", script(trainer="callbacks=[EarlyStoppingCallback(early_stopping_patience=3)]")),
    ("WT036", changed(SFT, dataset_name="small.jsonl", gradient_accumulation_steps=64, num_train_epochs=3)),
    ("WT037", changed(SFT, ("num_train_epochs",), max_steps=60, learning_rate=0.0006)),
    ("WT038", changed(SFT, max_steps=2000)),
    ("WT039", changed(DPO, num_train_epochs=5)),
    ("WT040", changed(DPO, gradient_accumulation_steps=1)),
    ("WT041", changed(SFT, gradient_accumulation_steps=128)),
    ("WT042", changed(SFT, ("max_length",))),
    ("WT042", changed(AXOLOTL, ("sequence_len",))),
    ("WT043", changed(SFT, dataset_name="long.jsonl", max_length=16)),
    ("WT044", changed(SFT, model_name_or_path="model", max_length=4096)),
    ("WT050", changed(AXOLOTL, train_on_inputs=True)),
    ("WT050", changed(FACTORY, train_on_prompt=True)),
    ("WT051", changed(SFT, ("assistant_only_loss",), dataset_name="long.jsonl", packing=True)),
    ("WT052", changed(AXOLOTL, datasets=[{"path": "p", "type": "chat_template", "train_on_eos": "none"}])),
    (
        "WT053",
        script(
            before="tokenizer.pad_token = tokenizer.eos_token",
            trainer="data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)",
        ),
    ),
    ("WT054", script(before="tokenizer.pad_token = tokenizer.eos_token")),
    ("WT054", changed(AXOLOTL, special_tokens={"pad_token": "</s>", "eos_token": "</s>"})),
    ("WT055", changed(FACTORY, ("template",))),
    ("WT056", changed(FACTORY, template="llama3", model_name_or_path="Qwen/Qwen2.5-7B")),
    ("WT057", changed(FACTORY, packing=True)),
    ("WT057", changed(SFT, packing=True, packing_strategy="wrapped")),
    ("WT057", changed(AXOLOTL, sample_packing=True)),
    ("WT058", changed(SFT, padding_free=True)),
    ("WT059", script(before="from trl import DataCollatorForCompletionOnlyLM")),
    ("WT060", changed(FACTORY, ("bf16",), fp16=True, logging_nan_inf_filter=False)),
    ("WT061", changed(SFT, fp16=True, logging_nan_inf_filter=False)),
    ("WT062", changed(FULL, load_in_4bit=True)),
    (
        "WT062",
        script(before=QUANTISED.format(NF4), model="model", peft="None")
        .replace("2e-4", "2e-5")
        .replace("adapter = LoraConfig", "print"),
    ),
    ("WT063", changed(SFT, load_in_4bit=True, load_in_8bit=True)),
    ("WT063", changed(AXOLOTL, adapter="qlora")),
    ("WT064", script(before=QUANTISED.format(NF4), model="model", after="merged = trainer.model.merge_and_unload()")),
    ("WT065", script(before=QUANTISED.format('load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16"'), model="model")),
    ("WT066", script(before=QUANTISED.format('load_in_4bit=True, bnb_4bit_quant_type="nf4"'), model="model")),
    ("WT067", changed(SFT, ("dtype",))),
    ("WT068", changed(SFT, logging_nan_inf_filter=True)),
    ("WT070", changed(SFT, weight_decay=0.5)),
    ("WT071", changed(SFT, max_grad_norm=0)),
    ("WT072", changed(SFT, adam_beta2=0.5)),
    ("WT080", changed(DPO, beta=5.0)),
    ("WT081", changed(GRPO, num_generations=1)),
    ("WT082", changed(GRPO, num_generations=2)),
    ("WT083", changed(GRPO, num_generations=5)),
    ("WT083", changed(GRPO, num_generations=32)),
    ("WT083", UNSLOTH),
    ("WT084", changed(GRPO, temperature=0.1)),
    ("WT085", changed(GRPO, loss_type="bnpo")),
    ("WT086", changed(GRPO, beta=0.5)),
    ("WT087", changed(GRPO, max_completion_length=128)),
    ("WT090", changed(SFT, ("warmup_steps",), warmup_ratio=0.05)),
    ("WT090", changed(SFT, ("max_length",), max_seq_length=2048)),
    ("WT090", changed(AXOLOTL, datasets=[{"path": "p", "type": "sharegpt"}])),
    ("WT090", script(trainer="tokenizer=tokenizer")),
    ("WT091", changed(SFT, gradient_checkpointing=True)),
    ("WT092", changed(SFT, lerning_rate=0.1)),
    ("WT092", changed(FACTORY, lora_drpout=0.1)),
    ("WT092", script(args="gradient_acumulation_steps=4")),
    ("WT092", changed(OURS, leraning_rate=0.1)),
    ("WT093", changed(AXOLOTL, lora_dropuot=0.1)),
    ("WT094", yaml.safe_dump(SFT) + "seed: 1\nseed: 2\n"),
    ("WT095", changed(OURS, tune="full", lora_alpha=32)),
    ("WT096", changed(SFT, per_device_train_batch_size=0)),
    ("WT096", changed(FACTORY, learning_rate="fast")),
    ("WT097", changed(SFT, optim="adamw_tourch")),
    ("WT098", yaml.safe_dump(changed(SFT, ("learning_rate",))) + "learning_rate: 2e-4\n"),
]


@pytest.fixture
def folder(tmp_path):
    """Where the cases' local files are: a few long chat rows, a few short rows, a model's configuration."""
    turns = [{"role": "user", "content": "Why? " * 40}, {"role": "assistant", "content": "So. " * 40}]
    (tmp_path / "long.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 2000), encoding="utf-8")
    short = json.dumps({"prompt": "Why?", "completion": "So."})
    (tmp_path / "small.jsonl").write_text("\n".join([short] * 200), encoding="utf-8")
    model = tmp_path / "model"
    model.mkdir()
    sizes = {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32}
    config = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, **sizes}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def found_in(case, folder):
    is_script = isinstance(case, str) and "import" in case
    path = folder / ("train.py" if is_script else "config.yaml")
    path.write_text(case if isinstance(case, str) else yaml.safe_dump(case), encoding="utf-8")
    return [finding for config in read_config(str(path)) for finding in findings_of(config)]


@pytest.mark.parametrize(("id", "case"), CASES, ids=[f"{id}-{number}" for number, (id, _) in enumerate(CASES)])
def test_a_fault_is_found_and_nothing_else(id, case, folder):
    found = found_in(case, folder)
    assert {finding.id for finding in found} == {id}, [(f.id, f.sentence) for f in found]
    for finding in found:
        assert finding.sentence and finding.mend and "\n" not in finding.sentence
        assert finding.evidence == CHECKS[id].evidence
        assert finding.key


@pytest.mark.parametrize("base", [SFT, FULL, DPO, DPO_FULL, GRPO, AXOLOTL, FACTORY, OURS, script()])
def test_nothing_is_found_without_a_fault(base, folder):
    assert found_in(base, folder) == []


def test_every_check_has_a_case():
    assert {id for id, _ in CASES} == CHECKS.keys()
    assert len(CHECKS) >= 40


def test_checks_are_whole_and_listed():
    for id, check in CHECKS.items():
        assert id.startswith("WT") and len(id) == 5 and check.evidence, id
        assert check.looks_for.endswith((".", "...")) and check.why.endswith("."), id
        assert check.mend.endswith("...") or not check.mend.endswith("."), id
        assert all(math.isfinite(number) for number in check.numbers.values())
    names = [check.name for check in CHECKS.values()]
    assert len(set(names)) == len(names)
    modules = {module.__name__ for module in FAMILIES.values()}
    assert {check.find.__module__ for check in CHECKS.values()} == modules


def test_the_page_is_up_to_date():
    committed = Path(__file__).parents[2] / "docs" / "checks.md"
    assert committed.read_text(encoding="utf-8") == page(), "run python -m welltuned.advice.lint.page > docs/checks.md"


def test_a_line_and_a_key_are_the_files_own(folder):
    (finding,) = found_in(
        "base_model: a/b-7b\n" + yaml.safe_dump(changed(AXOLOTL, ("base_model",), num_epochs=9, val_set_size=0)), folder
    )
    lines = (folder / "config.yaml").read_text().splitlines()
    assert finding.key == "num_epochs" and lines[finding.line - 1] == "num_epochs: 9"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("unsloth/llama-3-8b-bnb-4bit", 8e9),
        ("HuggingFaceTB/SmolLM2-1.7B", 1.7e9),
        ("stabilityai/stablelm-2-1_6b", 1.6e9),
        ("Qwen/Qwen3-30B-A3B", 30e9),
        ("mistralai/Mixtral-8x22B-v0.1", 176e9),
        ("moonshotai/Kimi-K2-1T", None),
        ("openai-community/gpt2", None),
        ("my/run7b2", None),
        ("", None),
    ],
)
def test_sizes_are_read_from_names(name, size):
    assert parameters_in_name(name) == size


def config_of(**settings):
    from welltuned.advice.lint.config import Setting

    return Config(
        file="x",
        tool=Tool.TRL,
        form=Form.YAML,
        method=Method.SFT,
        tune=Tune.LORA,
        settings={name: Setting(value, name, 1) for name, value in settings.items()},
    )


def test_a_mixtures_active_parameters():
    config = config_of(model="Qwen/Qwen3-30B-A3B")
    assert is_mixture(config) and active_parameters(config) == 3e9
    assert not is_mixture(config_of(model="Qwen/Qwen3-8B"))


def test_updates_are_known_only_where_they_follow():
    assert updates(config_of(max_steps=60)) == 60
    assert updates(config_of(num_train_epochs=1, per_device_train_batch_size=2)) is None


def test_severities_are_ordered():
    found = sorted([Severity.NOTE, Severity.ERROR, Severity.WARNING], key=list(Severity).index)
    assert found == [Severity.ERROR, Severity.WARNING, Severity.NOTE]

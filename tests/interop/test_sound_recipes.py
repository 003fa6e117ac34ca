"""No false alarm: what the field has published, at its own values, has neither errors nor warnings."""

import re
from pathlib import Path

import pytest

from welltuned.advice.lint import Severity, findings_of
from welltuned.advice.lint.config import Tool
from welltuned.interop import read_config

FIXTURES = Path(__file__).parent / "fixtures"
SOUND = sorted(path for path in FIXTURES.glob("*/*") if path.suffix in (".yaml", ".yml", ".py"))
EXPECTED = {  # method and tune that each must be read as
    "zephyr_7b_sft_full": "sft full",
    "zephyr_7b_sft_qlora": "sft qlora",
    "zephyr_7b_dpo_full": "dpo full",
    "zephyr_7b_dpo_qlora": "dpo qlora",
    "smollm2_1b7_sft": "sft full",
    "smollm2_360m_sft": "sft full",
    "smollm2_1b7_dpo": "dpo full",
    "tulu3_8b_sft": "sft full",
    "guanaco_7b_qlora": "sft qlora",
    "orpo_7b": "orpo full",
    "sft_lora": "sft lora",
    "dpo_full": "dpo full",
    "grpo_lora": "grpo lora",
    "llama3_8b_lora": "sft lora",
    "mistral_7b_qlora": "sft qlora",
    "llama3_8b_full": "sft full",
    "qwen3_lora_sft": "sft lora",
    "qwen3_lora_dpo": "dpo lora",
    "qwen3_full_sft": "sft full",
    "qwen3_lora_kto": "kto lora",
    "llama3_8b_sft": "sft qlora",
    "zephyr_7b_dpo": "dpo qlora",
    "qwen3_4b_grpo": "grpo lora",
}


@pytest.mark.parametrize("path", SOUND, ids=lambda path: path.stem)
def test_a_sound_recipe_has_neither_errors_nor_warnings(path):
    (config,) = read_config(str(path))
    alarms = [finding for finding in findings_of(config) if finding.severity is not Severity.NOTE]
    assert alarms == []
    assert config.tool == path.parent.name
    assert f"{config.method} {config.tune}" == EXPECTED[path.stem]


def test_every_fixture_is_expected():
    assert {path.stem for path in SOUND} == EXPECTED.keys()


@pytest.mark.parametrize(
    "name", ["zephyr_7b_sft_full", "zephyr_7b_sft_qlora", "zephyr_7b_dpo_full", "zephyr_7b_dpo_qlora"]
)
def test_the_handbooks_own_names_are_what_is_wrong_with_it_today(name, tmp_path):
    text = (FIXTURES / "trl" / f"{name}.yaml").read_text(encoding="utf-8")
    old = "max_prompt_length: 512\nmax_length" if "dpo" in name else "max_seq_length"
    for today, then in (("dtype:", "torch_dtype:"), ("warmup_steps", "warmup_ratio"), ("max_length", old)):
        text = re.sub(rf"^{today}", then, text, flags=re.MULTILINE)
    text = text.replace("activation_checkpointing", "gradient_checkpointing")
    path = tmp_path / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    (config,) = read_config(str(path), Tool.TRL)
    found = findings_of(config)
    assert {finding.id for finding in found if finding.severity is not Severity.NOTE} == {"WT090"}
    keys = {finding.key for finding in found if finding.id == "WT090"}
    assert "warmup_ratio" in keys and ({"max_seq_length", "max_prompt_length"} & keys)


def test_our_own_recipes_are_sound():
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        (config,) = read_config(str(path))
        assert config.tool is Tool.WELLTUNED
        assert [f for f in findings_of(config) if f.severity is Severity.ERROR] == [], path

"""The table of row lengths in docs/guides/fit_in_memory.md is what the forecast says now."""

from dataclasses import replace
from pathlib import Path

import pytest

from welltuned.advice import contexts
from welltuned.advice.activations import MemorySetting
from welltuned.advice.memory import forecast_memory
from welltuned.facts.machine import Device
from welltuned.recipe import Tune

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "fit_in_memory.md"


def test_the_table_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert contexts.with_table(text) == text, "docs/guides/fit_in_memory.md is out of date: make docs"
    assert "Forecast, not measured" in text
    assert contexts.with_table(text.replace("| 24 GB | lora |", "| 24 GB | other |")) == text


@pytest.mark.parametrize("tune", [Tune.LORA, Tune.QLORA])
def test_a_row_longer_by_one_step_does_not_fit(tune):
    model = contexts.eight_billion()
    assert model.parameters == 8_030_261_248
    setting = MemorySetting(
        tune=tune, dtype="bfloat16", device=Device.CUDA, micro_tokens=0, checkpointing=True, r=16, offload=True
    )
    for limit in (24e9, 80e9):
        row = contexts.longest_row(model, setting, limit)
        needs = [
            forecast_memory(model, replace(setting, micro_tokens=n, lengths=(n,))).total_bytes
            for n in (row, row + contexts.STEP)
        ]
        assert needs[0] <= 0.9 * limit < needs[1]

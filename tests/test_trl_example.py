"""examples/trl_sft.py: our adapters and fused parts inside TRL's SFTTrainer give what PEFT gives there."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is no dependency; this is tested where it is installed")
pytest.importorskip("peft")

from welltuned import LoraSettings  # noqa: E402
from welltuned.errors import InputError  # noqa: E402
from welltuned.models.adapter_file import load_adapter, save_adapter  # noqa: E402
from welltuned.models.load import load_model, load_tokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "trl_sft.py"
    spec = importlib.util.spec_from_file_location("trl_sft", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trains_and_saves(example, tiny_model_dir, data_file, tmp_path):
    out, model = str(tmp_path / "run"), str(tiny_model_dir)
    options = ["--steps", "10", "--rate", "2e-2", "--r", "4", "--instruction-part", USER, "--response-part", ASSISTANT]
    losses = example.main(example.parse([model, data_file, "--out", out, *options]))
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.1
    tuned = load_model(model, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = tuned(input_ids=ids).logits
        load_adapter(tuned, tmp_path / "run" / "adapter")
        assert not torch.allclose(tuned(input_ids=ids).logits, before, rtol=1e-2)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"padding_free": True}], ids=str)
def test_same_as_peft(example, changes, tiny_model_dir, data_file, tmp_path):
    """From the same start, over the same rows: the losses and gradient norms of PEFT's adapter in the same trainer."""
    from peft import PeftModel
    from trl import SFTTrainer

    folder = str(tiny_model_dir)
    tokenizer = load_tokenizer(folder)
    rows = example.rows_for_trl(data_file, tokenizer)

    def run(model, changes):
        config = example.config(str(tmp_path / "out"), steps=4, rate=1e-2, batch=4, **changes)
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        assert model.is_gradient_checkpointing == ("gradient_checkpointing" in changes)
        return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]

    model, bank = example.load(folder, LoraSettings(r=4, lora_alpha=8))
    save_adapter(bank, tmp_path / "start", base=folder)
    ours = run(model, changes)
    start = load_model(folder, dtype=torch.float32)
    peft = run(PeftModel.from_pretrained(start, tmp_path / "start", is_trainable=True), {})
    assert len(ours) == 4
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(peft), rtol=1e-5, atol=0)


def test_parts(example, tiny_model_dir, data_file):
    """Part markers give the template's own spans, and a part that does not fit is an error, not an empty mask."""
    tokenizer = load_tokenizer(str(tiny_model_dir))
    plain = example.rows_for_trl(data_file, tokenizer)
    parts = example.rows_for_trl(data_file, tokenizer, instruction_part=USER, response_part=ASSISTANT)
    assert plain[:] == parts[:]
    assert all(-100 in row["labels"] and max(row["labels"]) > 0 for row in parts)
    with pytest.raises(InputError, match="does not occur in the rendered row"):
        example.rows_for_trl(data_file, tokenizer, instruction_part=USER, response_part="### Answer:")

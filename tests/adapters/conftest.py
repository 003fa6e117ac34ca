"""Runs of a tiny model, each trained once: what comes after training is tried on them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(scope="session")
def trained_run(tiny_model_dir, data_file, tmp_path_factory):
    """A function that gives the finished run of a tiny Llama; options make another one. Tests read it, or copy it."""
    import welltuned

    made = {}

    def run(tune="lora", **options):
        key = (tune, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / tune
            rate = {"full": 5e-3}.get(tune, 2e-2)
            usual = dict(model=str(tiny_model_dir), data=data_file, tune=tune, eval_fraction=0.25, max_steps=12)
            usual |= dict(learning_rate=rate, effective_batch_size=16)
            welltuned.train(out=made[key], **(usual | options))
        return made[key]

    return run


@pytest.fixture
def copied(trained_run, tmp_path):
    """A copy of a run that may be spoilt, with a function to change its adapter's tensors."""

    def copy(tune="lora", **options):
        folder = tmp_path / "run"
        shutil.copytree(trained_run(tune, **options), folder)
        adapter = folder / "adapter"

        def tensors(change):
            path = adapter / "adapter_model.safetensors"
            found = load_file(path)
            change(found)
            save_file(found, path, metadata={"format": "pt"})

        def config(**changes):
            path = adapter / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        def run_json(**changes):
            path = folder / "run.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return SimpleNamespace(path=folder, adapter=adapter, tensors=tensors, config=config, run_json=run_json)

    return copy


IDS = torch.arange(5, 29)[None]


@pytest.fixture(scope="session")
def logits():
    """A function: a model's logits on some tokens."""

    @torch.no_grad()
    def of(model):
        return model(input_ids=IDS.to(model.device), use_cache=False).logits.float()

    return of


@pytest.fixture(scope="session")
def plain():
    """A function: a folder's model by transformers alone, in float32."""
    from transformers import AutoModelForCausalLM

    return lambda folder, **more: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()

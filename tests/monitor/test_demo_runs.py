"""Runs of the demo as they were recorded: SmolLM2-135M-Instruct on tickets, at its own rate and at two others.

fixtures/*.jsonl are metrics.jsonl of whole runs on two CPU cores. Their held-out losses carry no single rows, so that
differences are judged by the two standard errors, which are wider.
"""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from welltuned.training.events import Evaluated, Updated
from welltuned.training.monitor.thresholds import limit
from welltuned.training.watch import Watch

RUNS = sorted((Path(__file__).parent / "fixtures").glob("*.jsonl"))
SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


def updated(step, loss):
    return Updated(
        step=step, total_steps=85, loss=loss, learning_rate=1e-4, grad_norm=1.0, tokens=100, supervised_tokens=100,
        tokens_per_second=1e5, epoch=step / 85, memory_bytes=0, seconds_left=0.0, evaluation_follows=False,
    )  # fmt: skip


def events_of(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    total = max(line.get("step", 0) for line in lines)
    names = {field.name for field in fields(Updated)}
    for line in lines:
        evaluated = "eval_loss" in line
        if "loss" in line:
            known = {name: value for name, value in line.items() if name in names}
            yield Updated(**known, total_steps=total, seconds_left=0.0, evaluation_follows=evaluated)
        if evaluated:
            yield Evaluated(line["step"], line["eval_loss"], line["eval_loss_se"])


@pytest.fixture
def plan(tmp_path):
    from welltuned.advice.plan import make_plan
    from welltuned.facts.data import dataset_facts
    from welltuned.facts.machine import Device, MachineFacts
    from welltuned.facts.model import read_model_facts
    from welltuned.recipe import load_recipe

    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    lengths = np.full(337, 100)
    data = dataset_facts(lengths, lengths // 3, lengths[:84], lengths[:84] // 3, "messages")
    machine = MachineFacts(
        device=Device.CPU, cores=2, memory_total=2**34, memory_available=2**34, native_bf16=False, amx_bf16=False,
        gpu_name=None, gpu_memory_total=None, gpu_memory_available=None,
    )  # fmt: skip
    recipe = load_recipe(None, {"model": "m", "data": "d", "num_train_epochs": 1.0, "effective_batch_size": 4})
    return make_plan(recipe, read_model_facts(str(tmp_path), weights_needed=False), data, machine)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_nothing_is_said_of_the_demo(plan, path):
    watch, evaluations = Watch(plan), []
    for event in events_of(path):
        assert watch.see(event) == (), event
        evaluations += [event] if isinstance(event, Evaluated) else []
    assert watch.history.step == plan.updates == 85 and watch.stop_reason is None
    assert watch.best_step == min(evaluations, key=lambda e: e.eval_loss).step
    assert watch.history.smooth < limit("overfit_hint")  # the hint alone would have been wrong


def test_the_same_run_with_held_out_rows_that_get_worse(plan):
    """The demo's own numbers, the held-out loss rising from the third evaluation on."""
    watch, told, seen = Watch(plan), {}, 0
    for event in events_of(RUNS[0]):
        if isinstance(event, Evaluated):
            seen += 1
            if seen > 2:
                event = Evaluated(event.step, 0.2 + 0.1 * (seen - 2), event.eval_loss_se)
        told |= {finding.id: finding for finding in watch.see(event)}
    assert "overfitting" in told and "memorising" in told


@pytest.mark.parametrize(("rows", "ends"), [(5, False), (84, True)])
def test_a_held_out_loss_of_few_rows_ends_no_run(plan, rows, ends):
    """Both losses a little above their start: with rows enough that is divergence, with five it is chance."""
    facts = replace(plan.facts, dataset=replace(plan.facts.dataset, heldout_rows=rows))
    watch, told = Watch(replace(plan, facts=facts)), set()
    updates = [updated(i, 0.5 + 0.001 * i) for i in range(1, 61)]
    for event in (Evaluated(0, 0.5, 0.0005), *updates, Evaluated(60, 0.52, 0.0005)):
        told |= {finding.id for finding in watch.see(event)}
    assert ("divergence" in told) is ends

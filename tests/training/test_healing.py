"""A run that mends itself: no memory, numbers that are not finite, a disk that is full."""

import errno
import json
import math
import os
import threading

import pytest
import torch
from faulty import Faulty, failing

import welltuned
from welltuned.errors import InputError, RunError
from welltuned.training import durable, memory_guard
from welltuned.training import step as step_module
from welltuned.training.checkpoint import checkpoints, newest
from welltuned.training.events import Note, Skipped, Updated
from welltuned.training.healing import culprits, halved
from welltuned.training.memory_guard import MemoryGuard
from welltuned.training.resume import resume
from welltuned.training.snapshot import Numbers

UPDATES = 9
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to …"),
]


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    return dict(
        model=str(tiny_model_dir), data=data_file, effective_batch_size=16, max_steps=UPDATES, r=4, lora_dropout=0.1,
        token_budget=4096, eval_steps=3, save_steps=2, save_total_limit=20, load_best_model_at_end=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    welltuned.train(out=out, learning_rate=2e-2, **options)
    return out


def trained(out, options, **changes):
    """Events of a run with a rate of the user's own; the error that ended it, or None."""
    seen, error = [], None
    try:
        welltuned.train(out=out, observer=seen.append, **{**options, "learning_rate": 2e-2, **changes})
    except RunError as caught:
        error = caught
    return seen, error


def texts(seen):
    return [event.text for event in seen if isinstance(event, Note)]


def updates(run):
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def adapter(run):
    from safetensors.torch import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")


def nearly_same(run, straight):
    """Up to the rounding of another cut."""
    a, b = adapter(run), adapter(straight)
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=1e-2, atol=2e-4) for name in a)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def out_of_memory_above(monkeypatch, tokens, error, phase):
    """Passes over more than so many tokens find no memory: in their forward or in their backward part."""
    real = step_module._loss

    def loss(engine, batch, weight):
        value = real(engine, batch, weight)
        if len(batch.packed.ids_N) > tokens:
            if phase == "forward":
                raise error

            def fail(gradient):
                raise error

            value.register_hook(fail)
        return value

    monkeypatch.setattr(step_module, "_loss", loss)


@pytest.mark.parametrize(
    "phase,error", [("forward", ERRORS[0]), ("backward", ERRORS[1]), ("backward", ERRORS[2])], ids=["1", "2", "3"]
)
def test_out_of_memory_in_an_update(options, straight, tmp_path, monkeypatch, error, phase):
    out_of_memory_above(monkeypatch, 300, error, phase)
    seen, failed = trained(tmp_path / "run", options)
    assert failed is None and nearly_same(tmp_path / "run", straight)
    assert [u["tokens"] for u in updates(tmp_path / "run")] == [u["tokens"] for u in updates(straight)]
    said = [t for t in texts(seen) if "ran out of memory" in t]
    assert said and said[0].startswith("update 1 ran out of memory: micro-batches hold at most 2,048 tokens")
    budget = json.loads((tmp_path / "run" / "run.json").read_text())["healed"]["token_budget"]
    assert budget <= 300 and newest(tmp_path / "run", None)[0].position.token_budget == budget
    assert len(said) < 6  # it is remembered, not found out again in each update


def test_what_a_failed_pass_added_does_not_count(options, straight, tmp_path, monkeypatch):
    """The third micro-batch of an update fails: the first two must not be in the gradient twice."""
    real, passes = step_module._loss, []

    def loss(*arguments):
        passes.append(1)
        if len(passes) == 6:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(step_module, "_loss", loss)
    seen, failed = trained(tmp_path / "run", options, token_budget=200)
    assert failed is None and nearly_same(tmp_path / "run", straight)
    assert sum("ran out of memory" in text for text in texts(seen)) == 1


def test_a_gradient_that_is_not_cleared_would_be_seen(options, straight, tmp_path, monkeypatch):
    """Planted: the retry adds to what the failed pass left."""
    from welltuned.training.optimizer import FlatAdamW

    real_clear, real_loss, passes, forgotten = FlatAdamW.zero_grad, step_module._loss, [], []

    def forgetful(self):
        if len(passes) == 6 and not forgotten:
            forgotten.append(1)
        else:
            real_clear(self)

    monkeypatch.setattr(FlatAdamW, "zero_grad", forgetful)

    def loss(*arguments):
        passes.append(1)
        if len(passes) == 6:  # not the first of its update
            raise MemoryError
        return real_loss(*arguments)

    monkeypatch.setattr(step_module, "_loss", loss)
    trained(tmp_path / "run", options, token_budget=200)
    assert forgotten and not nearly_same(tmp_path / "run", straight)


def test_no_memory_for_even_one_row(options, tmp_path, monkeypatch):
    out_of_memory_above(monkeypatch, 0, MemoryError(), "forward")
    _, failed = trained(tmp_path / "run", options)
    assert "though every example is computed by itself" in str(failed) and "max_length" in str(failed)


def test_out_of_memory_in_an_evaluation(options, straight, tmp_path, monkeypatch):
    real, calls = step_module.evaluate, []

    def evaluate(engine, rows):
        calls.append(engine.token_budget)
        if engine.token_budget > 500 and len(calls) > 1:
            raise ERRORS[2]
        return real(engine, rows)

    monkeypatch.setattr(step_module, "evaluate", evaluate)
    seen, failed = trained(tmp_path / "run", options)
    assert failed is None and nearly_same(tmp_path / "run", straight)
    assert any("the evaluation ran out of memory" in text for text in texts(seen))


def test_out_of_memory_in_a_save(options, straight, tmp_path, monkeypatch):
    """No room for a copy of the numbers: they are written from where they are."""
    real = Numbers.take

    def take(*arguments, copied):
        if copied:
            raise MemoryError
        return real(*arguments, copied=copied)

    monkeypatch.setattr(Numbers, "take", take)
    seen, failed = trained(tmp_path / "run", options)
    assert failed is None and len(checkpoints(tmp_path / "run")) == 5
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()


def test_out_of_memory_in_generation(options, straight, monkeypatch):
    from welltuned.models import generate

    tuned = welltuned.load(straight, device="cpu")
    prompts = [list(range(5, 5 + n)) for n in (3, 9, 4, 7, 5)]
    decoding = generate.Decoding(max_new_tokens=6)
    expected = generate.replies(tuned.model, tuned.tokenizer, prompts, decoding)
    real, sizes = generate._batch, []

    def batch(model, tokenizer, some, decoding):
        sizes.append(len(some))
        if len(some) > 2:
            raise ERRORS[0]
        return real(model, tokenizer, some, decoding)

    monkeypatch.setattr(generate, "_batch", batch)
    assert generate.replies(tuned.model, tuned.tokenizer, prompts, decoding) == expected
    assert sizes == [5, 3, 2, 2, 1]


@pytest.fixture(scope="module")
def grpo(tiny_model_dir, write_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "rewards.py").write_text(
        "def vowels(completion):\n    return sum(completion.count(v) for v in 'aeiou')\n"
    )
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": f"say {c}", "answer": c} for c in "abcdefghijkl"])
    return dict(
        model=str(tiny_model_dir), data=prompts, method="grpo", rewards=[f"{folder / 'rewards.py'}:vowels"],
        num_generations=4, effective_batch_size=16, max_completion_length=8, max_steps=3, learning_rate=1e-2,
        eval_steps=2, token_budget=512, mask_truncated_completions=False,
    )  # fmt: skip


@pytest.mark.parametrize("most", [8, pytest.param(2, marks=pytest.mark.slow)], ids=["fewer prompts", "fewer of one"])
def test_out_of_memory_while_completions_are_sampled(grpo, tmp_path, monkeypatch, most):
    """In smaller batches, down to single completions; what is drawn for each is the same in any batch."""
    from welltuned.models import sample

    welltuned.train(out=tmp_path / "straight", **grpo)
    real, sizes = sample._sample, []

    def some(decoder, names, *rest):
        sizes.append(sum(map(len, names)))
        if sizes[-1] > most:
            raise ERRORS[0]
        return real(decoder, names, *rest)

    monkeypatch.setattr(sample, "_sample", some)
    seen = []
    welltuned.train(out=tmp_path / "run", observer=seen.append, **grpo)
    assert nearly_same(tmp_path / "run", tmp_path / "straight")
    rewards = [[line["reward"] for line in updates(tmp_path / name)] for name in ("run", "straight")]
    assert rewards[0] == rewards[1]
    said = [text for text in texts(seen) if "ran out of memory" in text]
    assert said and len(said) < 10
    found = json.loads((tmp_path / "run" / "run.json").read_text())["healed"]["token_budget"]
    assert found < 512 and max(sizes[-6:]) <= most  # remembered, of the evaluation too


def test_out_of_memory_while_the_reference_is_asked(tiny_model_dir, rows, write_rows, tmp_path, monkeypatch):
    from welltuned.training import reference

    pairs = [
        {"prompt": a["content"], "chosen": b["content"], "rejected": b["content"] + " no"}
        for a, b in (row["messages"] for row in rows[:40])
    ]
    monkeypatch.setenv("WELLTUNED_CACHE", str(tmp_path / "cache"))
    real, budgets = reference.answer_logps, []

    def logps(token, laid):
        budgets.append(len(laid.packed.ids_N))
        if budgets[-1] > 300:
            raise ERRORS[1]
        return real(token, laid)

    monkeypatch.setattr(reference, "answer_logps", logps)
    seen = []
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    options = dict(model=str(tiny_model_dir), data=data, method="dpo", max_steps=2, effective_batch_size=8)
    welltuned.train(out=tmp_path / "run", observer=seen.append, learning_rate=1e-3, token_budget=2048, **options)
    assert any("asking the reference ran out of memory" in text for text in texts(seen))
    assert max(budgets) > 300 and budgets[-1] <= 300


def test_out_of_memory_while_the_model_is_loaded(options, tmp_path, monkeypatch):
    from welltuned.training import run

    def load_model(*_, **__):
        raise ERRORS[2]

    monkeypatch.setattr(run, "load_model", load_model)
    _, failed = trained(tmp_path / "run", options)
    assert "not enough memory for this model" in str(failed) and not (tmp_path / "run").exists()


def test_other_errors_are_not_taken_for_it(options, tmp_path, monkeypatch):
    def loss(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(step_module, "_loss", loss)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trained(tmp_path / "run", options)


def test_memory_that_would_not_suffice_is_seen_beforehand(options, straight, tmp_path, monkeypatch):
    """Linux kills without a word: the growth that an update brings is compared with what is free."""
    from welltuned.training.process import MemoryUsed

    monkeypatch.setattr(MemoryGuard.__init__, "__defaults__", (lambda: memory_guard.RESERVE + 40_000,))
    monkeypatch.setattr(memory_guard, "memory_used", lambda device: MemoryUsed(10**8, 10**8))
    seen, failed = trained(tmp_path / "run", options)
    assert failed is None and nearly_same(tmp_path / "run", straight)
    said = [text for text in texts(seen) if "more than are free" in text]
    assert said and said[0].startswith("update 1 would need ")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["healed"]["token_budget"] <= 512


def test_halved():
    assert [halved(4096, None), halved(4096, 300), halved(3, None), halved(1, None)] == [2048, 150, 1, 1]


# ── not finite ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def train_rows(options):
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare

    return prepare(load_recipe(None, {**options, "learning_rate": 2e-2})).train


def spoil_rows(monkeypatch, where, bad, value):
    """The loss, or the gradient, of passes that hold this row is not finite."""
    real = step_module.accumulate_gradient

    def spoiled(engine, rows, keys):
        made = real(engine, rows, keys)
        if all(row.origin != bad for row in rows):
            return made
        if where == "loss":
            raise step_module.NotFinite(f"the loss is not finite in {rows[0].origin}")
        engine.trained.grad_KP[0, 3] = value
        return made

    monkeypatch.setattr(step_module, "accumulate_gradient", spoiled)


@pytest.mark.parametrize("where,value", [("loss", math.nan), ("gradient", math.nan), ("gradient", math.inf)])
def test_a_bad_row_is_left_out_with_its_update_and_named(options, train_rows, tmp_path, monkeypatch, where, value):
    bad = train_rows[5].origin
    spoil_rows(monkeypatch, where, bad, value)
    seen, failed = trained(tmp_path / "run", options)
    assert failed is None
    skipped = [event for event in seen if isinstance(event, Skipped)]
    assert skipped and all(event.rows == (bad,) for event in skipped)
    assert where in skipped[0].what
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["healed"]["updates_left_out"] == len(skipped) and run["updates"] == UPDATES
    assert all(torch.isfinite(tensor).all() for tensor in adapter(tmp_path / "run").values())
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e.get("event") == "skipped"] == [event.step for event in skipped]
    steps = [line["step"] for line in updates(tmp_path / "run")] + [event.step for event in skipped]
    assert sorted(steps) == list(range(1, UPDATES + 1))


def test_nothing_of_a_left_out_update_stays(options, tmp_path, monkeypatch):
    """Weights and moments after it are those of before, to the bit."""
    from welltuned.training.optimizer import FlatAdamW

    real_loss, real_step, states, made = step_module._loss, FlatAdamW.step, [], []

    def step(self, rates):
        made.append(self)
        if len(made) == 5:  # the first one after the update that was left out
            states.append((engines[0].trained.flat_KP.clone(), self.exp_avg_KP.clone(), self.exp_avg_sq_KP.clone()))
        real_step(self, rates)
        if len(made) == 4:
            states.append((engines[0].trained.flat_KP.clone(), self.exp_avg_KP.clone(), self.exp_avg_sq_KP.clone()))

    engines, skips = [], []

    def loss(engine, batch, weight):
        engines[:] = [engine]
        value = real_loss(engine, batch, weight)
        return value * math.nan if len(made) == 4 and not skips else value

    monkeypatch.setattr(step_module, "_loss", loss)
    monkeypatch.setattr(FlatAdamW, "step", step)

    def observer(event):
        if isinstance(event, Skipped):
            skips.append(event)

    welltuned.train(out=tmp_path / "run", observer=observer, learning_rate=2e-2, **options)
    assert [event.step for event in skips] == [5] and len(made) == UPDATES - 1
    assert all(torch.equal(before, after) for before, after in zip(*states, strict=True))


def test_an_activation_that_overflows_is_named(options, train_rows, tmp_path, monkeypatch):
    """Not the loss is spoiled here but what a layer puts out, for one row's own tokens."""
    from welltuned.objectives import supervised

    real = supervised.hidden_states

    def hidden_states(model, batch):
        hidden_NH, start = real(model, batch), 0
        for n in batch.lengths:
            if n == longest:
                hidden_NH = hidden_NH.clone()
                hidden_NH[start : start + n] = math.inf
            start += n
        return hidden_NH

    longest = max(len(row.ids) for row in train_rows)
    bad = {row.origin for row in train_rows if len(row.ids) == longest}
    monkeypatch.setattr(supervised, "hidden_states", hidden_states)
    seen, _ = trained(tmp_path / "run", options)
    skipped = [event for event in seen if isinstance(event, Skipped)]
    assert skipped and all(set(event.rows) <= bad for event in skipped)


@pytest.fixture(scope="module")
def even(options):
    """Updates of 12: the 72 rows make six of them, none smaller."""
    return {**options, "effective_batch_size": 12}


def spoil_from(monkeypatch, first, until=10**9):
    """From so many calls on, and until so many, every gradient is not finite."""
    real, calls = step_module.accumulate_gradient, []

    def spoiled(engine, rows, keys):
        made = real(engine, rows, keys)
        if len(rows) == 12:  # whole updates; the search for rows at fault asks for fewer
            calls.append(1)
            if first <= len(calls) < until:
                engine.trained.grad_KP[0, 0] = math.nan
        return made

    monkeypatch.setattr(step_module, "accumulate_gradient", spoiled)


def test_three_in_a_row_stop_a_run_whose_rate_is_the_users(even, tmp_path, monkeypatch):
    spoil_from(monkeypatch, 6)
    seen, failed = trained(tmp_path / "run", even)
    assert "3 updates in a row were not finite" in str(failed) and "--accept-changes" in str(failed)
    assert len([event for event in seen if isinstance(event, Skipped)]) == 3
    found, _ = newest(tmp_path / "run", None)
    assert found.position.step == 4 and not (tmp_path / "run" / "run.json").exists()


def test_three_in_a_row_go_back_where_the_advice_chose_the_rate(even, tmp_path, monkeypatch):
    spoil_from(monkeypatch, 6, until=9)
    seen = []
    welltuned.train(out=tmp_path / "run", observer=seen.append, **even)
    said = [text for text in texts(seen) if "back to update 4, from there with 0.5 of the planned rate" in text]
    assert len(said) == 1
    rates = {event.step: event.learning_rate for event in seen if isinstance(event, Updated)}
    planned = {line["step"]: line["learning_rate"] for line in updates(tmp_path / "run")}
    assert [line["step"] for line in updates(tmp_path / "run")] == list(range(1, UPDATES + 1))
    assert rates == planned and rates[5] < 0.7 * rates[4]
    healed = json.loads((tmp_path / "run" / "run.json").read_text())["healed"]
    assert healed["returns_to_a_checkpoint"] == 1 and healed["rate_factor"] == 0.5 and healed["updates_left_out"] == 3


def test_the_policy_can_be_said(even, tmp_path, monkeypatch):
    spoil_from(monkeypatch, 6, until=9)
    seen, failed = trained(tmp_path / "back", even, on_nonfinite="back")
    assert failed is None and any("back to update 4" in text for text in texts(seen))
    monkeypatch.undo()
    spoil_from(monkeypatch, 6)
    with pytest.raises(RunError, match="3 updates in a row"):
        welltuned.train(out=tmp_path / "stop", on_nonfinite="stop", **even)


def test_before_the_first_checkpoint_it_goes_back_to_the_start(even, tmp_path, monkeypatch):
    spoil_from(monkeypatch, 2, until=5)
    seen = []
    welltuned.train(out=tmp_path / "run", observer=seen.append, **{**even, "save_steps": 100, "eval_steps": 100})
    assert any("back to update 0, from there with 0.5" in text for text in texts(seen))
    assert [line["step"] for line in updates(tmp_path / "run")] == list(range(1, UPDATES + 1))


def test_it_does_not_go_back_for_ever(even, tmp_path, monkeypatch):
    spoil_from(monkeypatch, 6)
    with pytest.raises(RunError, match="after 3 returns to a checkpoint"):
        welltuned.train(out=tmp_path / "run", **even)


def test_two_in_a_row_at_the_end_are_a_failure(even, tmp_path, monkeypatch):
    """No later update can show that only rows were at fault: weights may be past saving, and nobody would know."""
    spoil_from(monkeypatch, UPDATES - 1)
    seen, failed = trained(tmp_path / "run", even)
    assert f"{2} updates in a row were not finite, the last: the gradient of update {UPDATES}" in str(failed)
    assert [event.step for event in seen if isinstance(event, Skipped)] == [UPDATES - 1, UPDATES]
    assert (
        not (tmp_path / "run" / "run.json").exists() and newest(tmp_path / "run", None)[0].position.step < UPDATES - 1
    )


def test_one_at_the_end_is_left_out_as_elsewhere(even, tmp_path, monkeypatch):
    spoil_from(monkeypatch, UPDATES)
    seen, failed = trained(tmp_path / "run", even)
    assert failed is None and [event.step for event in seen if isinstance(event, Skipped)] == [UPDATES]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["healed"]["updates_left_out"] == 1


def test_two_in_a_row_before_the_end_are_left_out(even, tmp_path, monkeypatch):
    spoil_from(monkeypatch, UPDATES - 2, until=UPDATES)
    seen, failed = trained(tmp_path / "run", even)
    assert failed is None and len([event for event in seen if isinstance(event, Skipped)]) == 2


def test_two_at_the_end_go_back_where_the_advice_chose_the_rate(even, tmp_path, monkeypatch):
    spoil_from(monkeypatch, UPDATES - 1, until=UPDATES + 1)
    seen = []
    result = welltuned.train(out=tmp_path / "run", observer=seen.append, **even)
    assert result.updates == UPDATES
    assert any("2 updates in a row were not finite" in text and "back to update" in text for text in texts(seen))
    assert [line["step"] for line in updates(tmp_path / "run")] == list(range(1, UPDATES + 1))


def test_a_lower_rate_is_accepted_after_a_stop(even, tmp_path, monkeypatch):
    """What the message says to do."""
    spoil_from(monkeypatch, 6)
    run = tmp_path / "run"
    _, failed = trained(run, even)
    assert f"lower learning_rate in {run}/recipe.yaml and: welltuned resume {run} --accept-changes" in str(failed)
    monkeypatch.undo()
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("learning_rate: 0.02", "learning_rate: 0.01")
    )
    seen = []
    resume(run, seen.append, accept_changes=True)
    assert [line["step"] for line in updates(run)] == list(range(1, UPDATES + 1))
    assert max(event.learning_rate for event in seen if isinstance(event, Updated)) <= 0.01


def spoil_evaluation(monkeypatch, number):
    """The n-th evaluation's loss is not finite."""
    real, calls = step_module.evaluate, []

    def evaluate(engine, rows):
        calls.append(1)
        if len(calls) == number:
            raise step_module.NotFinite("the held-out loss is not finite in rows.jsonl:7")
        return real(engine, rows)

    monkeypatch.setattr(step_module, "evaluate", evaluate)


def test_an_evaluation_that_is_not_finite_goes_back_or_stops(even, tmp_path, monkeypatch):
    spoil_evaluation(monkeypatch, 3)
    seen = []
    welltuned.train(out=tmp_path / "back", observer=seen.append, **even)
    assert any("not finite in rows.jsonl:7: back to update 4" in text for text in texts(seen))
    assert [line["step"] for line in updates(tmp_path / "back")] == list(range(1, UPDATES + 1))
    monkeypatch.undo()
    spoil_evaluation(monkeypatch, 3)
    _, failed = trained(tmp_path / "stop", even)
    assert "the held-out loss is not finite in rows.jsonl:7; the last checkpoint is as it was" in str(failed)
    assert newest(tmp_path / "stop", None)[0].position.step == 4


def test_a_weight_that_is_not_finite_is_taken_from_the_last_checkpoint(options, tmp_path, monkeypatch):
    """A memory error in a weight: no row is at fault, and nothing can be learned from there."""
    engines = []
    real = step_module.accumulate_gradient

    def seen_by(engine, rows, keys):
        engines[:] = [engine]
        return real(engine, rows, keys)

    monkeypatch.setattr(step_module, "accumulate_gradient", seen_by)
    hits, seen = [], []

    def observer(event):
        seen.append(event)
        if isinstance(event, Updated) and event.step == 5 and not hits:
            hits.append(1)
            engines[0].trained.flat_KP[0, 7] = math.nan

    welltuned.train(out=tmp_path / "run", observer=observer, **options)
    assert any("trained weights are not finite at update 6: back to update 4" in text for text in texts(seen))
    assert not any(isinstance(event, Skipped) for event in seen)
    assert all(torch.isfinite(tensor).all() for tensor in adapter(tmp_path / "run").values())


def test_culprits():
    def finite(bad):
        return lambda some: not bad & set(some)

    rows = list(range(13))
    for bad in ({0}, {12}, {3, 4}, {0, 6, 12}, set(rows)):
        assert culprits(rows, finite(bad)) == sorted(bad)
    together = culprits(rows, lambda some: len(some) < 13)  # none alone
    assert together == rows and culprits([1], finite({0})) == [0]


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Full(Faulty):
    """A disk on which saves of checkpoints fail between two updates of the run."""

    def __init__(self, name, number):
        super().__init__(lambda call: self.broken and call == name, failing(number))
        self.broken = False


@pytest.mark.parametrize(
    "name,number",
    [
        ("write", errno.ENOSPC),
        ("fsync", errno.EIO),
        pytest.param("make_folder", errno.EROFS, marks=pytest.mark.slow),
        pytest.param("open", errno.EACCES, marks=pytest.mark.slow),
    ],
)
def test_a_save_that_fails_is_told_and_the_next_one_tries_again(options, straight, tmp_path, monkeypatch, name, number):
    disk = Full(name, number)
    monkeypatch.setattr(durable, "SYSTEM", disk)
    seen = []

    def observer(event):
        seen.append(event)
        if isinstance(event, Updated):
            disk.broken = event.step in (4, 5)

    welltuned.train(out=tmp_path / "run", observer=observer, learning_rate=2e-2, **options)
    said = [text for text in texts(seen) if "could not be written" in text and "checkpoint" in text]
    assert said == [
        f"the checkpoint of update 4 could not be written ({os.strerror(number)}); that of update 2 is safe"
    ]
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [9, 8, 6, 2]
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (straight / file).read_bytes()
    assert [line["step"] for line in updates(tmp_path / "run")] == list(range(1, UPDATES + 1))


def test_training_goes_on_while_a_checkpoint_is_written(options, tmp_path, monkeypatch):
    """A disk so slow that a save ends only after the next update is done."""
    import threading

    from welltuned.training import keeper

    real, made, waited = keeper.write_checkpoint, threading.Event(), []

    def slow(run, snapshot):
        if snapshot.position.step == 2:
            waited.append(made.wait(timeout=60))
        return real(run, snapshot)

    def observer(event):
        if isinstance(event, Updated) and event.step == 3:
            made.set()

    monkeypatch.setattr(keeper, "write_checkpoint", slow)
    welltuned.train(out=tmp_path / "run", observer=observer, learning_rate=2e-2, **options)
    assert waited == [True] and checkpoints(tmp_path / "run")[-1][0] == 2


def test_a_disk_that_stays_full_ends_the_run_after_training_with_the_last_checkpoint_intact(
    options, tmp_path, monkeypatch
):
    disk = Full("write", errno.ENOSPC)
    monkeypatch.setattr(durable, "SYSTEM", disk)
    seen = []

    def observer(event):
        seen.append(event)
        if isinstance(event, Updated) and event.step == 5:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":  # that of update 4
                    thread.join()
            disk.broken = True

    with pytest.raises(RunError, match="No space left on device"):
        welltuned.train(out=tmp_path / "run", observer=observer, learning_rate=2e-2, **options)
    assert any("metrics.jsonl cannot be written (No space left on device)" in text for text in texts(seen))
    assert [event.step for event in seen if isinstance(event, Updated)] == list(range(1, UPDATES + 1))
    found, notes = newest(tmp_path / "run", None)
    assert found.position.step == 4 and not notes
    disk.broken = False
    resume(tmp_path / "run")
    assert [line["step"] for line in updates(tmp_path / "run")] == list(range(1, UPDATES + 1))


def test_a_disk_without_room_is_refused_before_training(options, tmp_path, monkeypatch):
    disk = Faulty()
    disk.free = lambda path: 1000
    monkeypatch.setattr(durable, "SYSTEM", disk)
    with pytest.raises(InputError, match="GB free, and a checkpoint with the result takes"):
        trained(tmp_path / "run", options)
    assert not (tmp_path / "run").exists()


def test_a_disk_with_little_room_is_said(options, tmp_path, monkeypatch):
    disk = Faulty()
    disk.free = lambda path: 500_000
    monkeypatch.setattr(durable, "SYSTEM", disk)
    seen, failed = trained(tmp_path / "run", options)
    assert failed is None and any("a lower save_total_limit would fit" in text for text in texts(seen))


def test_what_goes_wrong_in_the_writing_thread_is_raised(options, tmp_path, monkeypatch):
    """A fault of ours is no full disk."""
    from welltuned.training import keeper

    def write_checkpoint(run, snapshot):
        raise KeyError("a bug")

    monkeypatch.setattr(keeper, "write_checkpoint", write_checkpoint)
    with pytest.raises(KeyError, match="a bug"):
        trained(tmp_path / "run", options)


def test_guard(monkeypatch, options):
    """By the forecast before anything is measured, by what was measured afterwards."""
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare
    from welltuned.training.process import MemoryUsed

    plan = prepare(load_recipe(None, {**options, "learning_rate": 2e-2})).plan
    used = [10**9]
    monkeypatch.setattr(memory_guard, "memory_used", lambda device: MemoryUsed(used[0], used[0]))
    passing = plan.memory.parts["activations"] + plan.memory.parts["workspace"]
    room = memory_guard.RESERVE + passing // 2
    guard = MemoryGuard(plan, lambda: room)
    assert guard.short_of(4096) == pytest.approx(passing // 2, abs=2) and guard.short_of(2048) <= 2
    assert guard.short_of(256) == 0
    used[0] += passing
    guard.learn(4096)
    assert guard.short_of(4096) == 0  # it holds that memory already
    used[0] -= passing
    assert guard.short_of(4096) == pytest.approx(passing // 2, abs=2)

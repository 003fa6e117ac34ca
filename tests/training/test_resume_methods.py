"""DPO and GRPO that were cut off go on bit for bit: from every update, in the middle of one, again and again."""

import json
import os
import shutil
import signal

import pytest

import welltuned
from welltuned.training import grpo_step, preference_step
from welltuned.training.checkpoint import checkpoints, folder_of
from welltuned.training.events import Updated
from welltuned.training.interrupt import Interrupted
from welltuned.training.resume import resume

UPDATES = 7
FILES = ("trained.safetensors", "optimizer.safetensors")
COMMON = dict(
    max_steps=UPDATES, r=4, lora_dropout=0.1, packing=True, eval_steps=3, save_steps=1, save_total_limit=20,
    load_best_model_at_end=False, early_stopping_patience=0,
)  # fmt: skip
SLOW = pytest.mark.slow


class CutOff(Exception):
    """The run ends here, as it would by a kill."""


def cut_off_at(step):
    def observer(event):
        if isinstance(event, Updated) and event.step == step:
            raise CutOff

    return observer


@pytest.fixture(scope="module")
def cases(rows, write_rows, tiny_model_dir, tmp_path_factory):
    """Options of each kind of run; an epoch ends after 3 and after 6 updates (of `grpo twice` after 6)."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = []
    for i, row in enumerate(rows[:40]):
        asked, answer = (message["content"] for message in row["messages"])
        other = rows[(3 * i + 1) % len(rows)]["messages"][1]["content"] + " no"
        pairs.append({"prompt": asked, "chosen": answer, "rejected": other})
    prompts = [{"prompt": f"say {c}", "answer": c} for c in "abcdefghijkl"]
    (folder / "rewards.py").write_text(
        "def vowels(completions):\n    return [sum(c.count(v) for v in 'aeiou') for c in completions]\n"
    )
    dpo = dict(method="dpo", data=write_rows(folder / "pairs.jsonl", pairs), effective_batch_size=16, token_budget=300)
    grpo = dict(
        method="grpo", data=write_rows(folder / "prompts.jsonl", prompts), rewards=[f"{folder / 'rewards.py'}:vowels"],
        num_generations=4, effective_batch_size=16, max_completion_length=8, beta=0.1, token_budget=100,
        mask_truncated_completions=False,
    )  # fmt: skip
    usual = {**COMMON, "model": str(tiny_model_dir), "learning_rate": 1e-2}
    return {
        "dpo": {**usual, **dpo},
        "grpo": {**usual, **grpo},
        "grpo twice": {**usual, **grpo, "num_iterations": 2},
    }


@pytest.fixture(scope="module")
def straight(cases, tmp_path_factory):
    """A function: the run of a case that nothing disturbed, with the checkpoint of every update."""
    made = {}

    def straight(case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp("straight") / "run"
            welltuned.train(out=made[case], **cases[case])
        return made[case]

    return straight


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = ("tokens_per_second", "memory_bytes")
    return [
        {k: v for k, v in line.items() if k not in times and not k.startswith("seconds/")}
        for line in found
        if line.get("event") != "note"
    ]


def same(run, straight):
    """Metrics but for times, adapter, moments, held-out numbers: all bits of them."""
    name = "adapter/adapter_model.safetensors"
    a, b = (json.loads((r / "run.json").read_text()) for r in (run, straight))
    last = [folder_of(r, UPDATES) for r in (run, straight)]
    return (
        lines(run) == lines(straight)
        and (run / name).read_bytes() == (straight / name).read_bytes()
        and all((last[0] / f).read_bytes() == (last[1] / f).read_bytes() for f in FILES)
        and a["held_out"] == b["held_out"]
        and a["trained_tensors"] == b["trained_tensors"]
    )


EVERY = [
    pytest.param(case, step, marks=() if step == 3 and case != "grpo twice" else SLOW)
    for case in ("dpo", "grpo", "grpo twice")
    for step in range(1, UPDATES + 1)
    if case != "grpo twice" or step % 2 == 0 or step == UPDATES
]


@pytest.mark.parametrize(("case", "step"), EVERY)
def test_from_every_update(straight, tmp_path, case, step):
    run = tmp_path / "run"
    shutil.copytree(straight(case), run)
    (run / "run.json").unlink()
    for number, folder in checkpoints(run):
        if number > step:
            shutil.rmtree(folder)
    seen = []
    resume(run, seen.append)
    assert [e.step for e in seen if isinstance(e, Updated)] == list(range(step + 1, UPDATES + 1))
    assert same(run, straight(case))


def in_the_middle(monkeypatch, case, number):
    """The n-th micro-batch ends the run; an update has several."""
    place, name = (preference_step.Dpo, "__call__") if case == "dpo" else (grpo_step.Grpo, "_batch_loss")
    real, passes = getattr(place, name), []

    def failing(*arguments, **options):
        passes.append(1)
        if len(passes) == number:
            raise CutOff
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, failing)


@pytest.mark.parametrize("case", ["dpo", "grpo", pytest.param("grpo twice", marks=SLOW)])
def test_three_times_in_a_row_and_in_the_middle_of_an_update(cases, straight, tmp_path, monkeypatch, case):
    run = tmp_path / "run"
    in_the_middle(monkeypatch, case, 14)
    with pytest.raises(CutOff):
        welltuned.train(out=run, **cases[case])
    monkeypatch.undo()
    assert 1 <= checkpoints(run)[0][0] < 5
    for step in (5, 6):
        with pytest.raises(CutOff):
            resume(run, cut_off_at(step))
    resume(run)
    assert same(run, straight(case))


def test_a_set_of_completions_is_never_cut_in_two(cases, straight, tmp_path):
    """Two updates follow one set, which the policy before the first of them has sampled: none is saved within it."""
    run = tmp_path / "run"
    assert [step for step, _ in checkpoints(straight("grpo twice"))] == [7, 6, 4, 2]

    def observer(event):
        if isinstance(event, Updated) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match="after update 4; update 4 of 7 is saved"):
            welltuned.train(out=run, observer=observer, **cases["grpo twice"])
    finally:
        signal.signal(signal.SIGINT, before)
    resume(run)
    assert same(run, straight("grpo twice"))

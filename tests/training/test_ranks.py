"""Two and four processes give the run of one: losses and adapters to fp32 rounding, whatever the last batch."""

import json
import os
import shutil
import signal

import pytest
import torch
from ranked import finished, in_ranks, resumed, trained
from safetensors.torch import load_file

import welltuned
from welltuned.recipe import load_recipe
from welltuned.training import grpo_step, preference_step
from welltuned.training import loop as loop_module
from welltuned.training import step as step_module
from welltuned.training.checkpoint import newest
from welltuned.training.prepare import prepare
from welltuned.training.prepare_together import sharing_notes
from welltuned.training.ranks import ALONE, Group, Ranks, fingerprint
from welltuned.training.reduce import TAIL, GradientSum

UPDATES = 7  # of 14 rows: 72 training rows make five updates and one of 2, in which two of four ranks have nothing


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    return dict(
        model=str(tiny_model_dir), data=data_file, effective_batch_size=14, max_steps=UPDATES, r=4, lora_dropout=0.1,
        learning_rate=1e-2, eval_steps=3, save_steps=3, load_best_model_at_end=False, dtype="float32",
    )  # fmt: skip


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def notes(run):
    return [line["text"] for line in lines(run) if line.get("event") == "note"]


def assert_same_run(one, other):
    """To fp32 rounding. Measured over 12 updates: losses 1e-7, tensors 8e-7 of their length (results/ranks.json)."""
    for name in ("loss", "eval_loss", "tokens", "supervised_tokens", "rewards/margins"):
        mine, theirs = ([line[name] for line in lines(run) if name in line] for run in (one, other))
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=2e-5, atol=2e-5)
    a, b = (load_file(next(run.glob("*/*model.safetensors"))) for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    welltuned.train(out=out, **options)
    return out


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_run_of_one_process(options, straight, tmp_path, world):
    ended = finished(in_ranks(trained(tmp_path / "run", **options), world, tmp_path / "said"))
    assert_same_run(tmp_path / "run", straight)
    told, evaluated = ended[0].value
    assert len(told) == UPDATES and evaluated is not None
    assert all(e.value == ([], evaluated) for e in ended[1:])  # the first speaks for all; all know the same
    assert f"{world} processes share every update of 14 rows" in notes(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == world


def test_one_sum_an_update_and_nothing_else(options, tmp_path, monkeypatch):
    """Between updates without an evaluation or a save nothing but one sum passes between the ranks."""
    said = []
    for name in ("sum_", "exchange", "spread_"):
        real = getattr(Group, name)
        monkeypatch.setattr(Group, name, lambda self, it, name=name, real=real: said.append(name) or real(self, it))
    train = trained(tmp_path / "run", **{**options, "max_steps": 5, "eval_steps": 4, "save_steps": 4})
    ended = finished(in_ranks(lambda rank: (train(rank), said)[1], 2, tmp_path / "said"))
    for e in ended:
        sums = [i for i, name in enumerate(e.value) if name == "sum_"]
        assert len(sums) == 5 and sums[:4] == list(range(sums[0], sums[0] + 4)) and sums[4] > sums[3] + 1


def test_a_share_that_is_forgotten_would_show(options, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "_bins", lambda engine, lengths: [[i] for i in engine.ranks.share(lengths)][1:])
    finished(in_ranks(trained(tmp_path / "run", **{**options, "max_steps": 2}), 2, tmp_path / "said"))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", straight)


def pairs(rows):
    asked = [[message["content"] for message in row["messages"]] for row in rows]
    return [
        {"prompt": prompt, "chosen": answer, "rejected": asked[(3 * i + 1) % len(asked)][1] + " no"}
        for i, (prompt, answer) in enumerate(asked)
    ]


MORE = {
    "dpo": dict(method="dpo", learning_rate=2e-3, max_steps=3),
    "orpo": dict(method="orpo", learning_rate=2e-3, max_steps=3),
    "reward": dict(method="reward", learning_rate=2e-3, max_steps=3),
    "full": dict(tune="full", max_steps=3, learning_rate=1e-3, r=None, lora_dropout=None),
    "full, 8 bits": dict(  # whose codes are 6 % apart: at this rate that is below what is asked
        tune="full", optim="adamw_8bit", max_steps=3, learning_rate=1e-4, r=None, lora_dropout=None
    ),
    "qlora": dict(tune="qlora", max_steps=3),
    "the best, and an average": dict(load_best_model_at_end=True, ema_decay=0.9, max_steps=4, eval_steps=1),
    "pissa": dict(init_lora_weights="pissa_niter_4", max_steps=3, learning_rate=1e-3),
}


@pytest.mark.parametrize("kind", [k if k == "dpo" else pytest.param(k, marks=pytest.mark.slow) for k in MORE])
def test_other_runs(options, rows, write_rows, tmp_path, kind, monkeypatch):
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    asked = {**options, **MORE[kind]}
    if "method" in asked:
        asked["data"] = write_rows(tmp_path / "pairs.jsonl", pairs(rows))
    monkeypatch.setenv("WELLTUNED_CACHE", str(tmp_path / "one"))
    welltuned.train(out=tmp_path / "one-run", **asked)
    monkeypatch.setenv("WELLTUNED_CACHE", str(tmp_path / "two"))  # reference log-probabilities are not known there
    finished(in_ranks(trained(tmp_path / "run", **asked), 2, tmp_path / "said"))
    assert_same_run(tmp_path / "run", tmp_path / "one-run")


# ── methods whose update needs a word between the ranks before its gradient ──────────────────────────────────────────


@pytest.fixture(scope="module")
def talking(options, rows, write_rows, tmp_path_factory):
    """The options of kto and grpo."""
    folder = tmp_path_factory.mktemp("talking")
    (folder / "rewards.py").write_text(
        "def vowels(completions):\n    return [sum(c.count(v) for v in 'aeiou') for c in completions]\n"
        "def often(completion, answer):\n    if answer == '3':\n        raise ValueError('no 3')\n"
        "    return len(completion)\n"
    )
    judged = [
        {"prompt": m[0]["content"], "completion": m[1]["content"], "label": i % 3 != 0}
        for i, m in enumerate(row["messages"] for row in rows)
    ]
    sums = [{"prompt": f"say {c} {n}", "answer": str(n)} for n, c in enumerate("abcdefgh" * 4)]
    usual = {**options, "max_steps": 3, "eval_steps": 2, "learning_rate": 2e-3}
    return {
        "kto": {**usual, "method": "kto", "data": write_rows(folder / "judged.jsonl", judged), "learning_rate": 2e-2},
        "grpo": {
            **usual, "method": "grpo", "data": write_rows(folder / "sums.jsonl", sums), "beta": 0.1,
            "rewards": [f"{folder}/rewards.py:vowels", f"{folder}/rewards.py:often"], "num_generations": 4,
            "effective_batch_size": 12, "max_completion_length": 6, "mask_truncated_completions": False,
        },
    }  # fmt: skip


TALKED = ("kl", "reward", "reward_std", "reward_faults", "rewards/vowels/mean", "rewards/chosen", "logps/rejected")
TALKED += ("entropy", "clip_ratio", "completions/mean_length", "frac_reward_zero_std", "eval_reward", "rewards/margins")


def assert_same_talk(one, other):
    assert_same_run(one, other)
    for name in TALKED:
        mine, theirs = ([line[name] for line in lines(run) if name in line] for run in (one, other))
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "world", "more"),
    [
        ("kto", 2, {}),
        ("grpo", 2, {}),
        pytest.param("grpo", 2, dict(num_iterations=2, scale_rewards="batch"), marks=pytest.mark.slow),
        pytest.param("grpo", 4, {}, marks=pytest.mark.slow),  # three groups: one rank has nothing
        pytest.param("kto", 4, {}, marks=pytest.mark.slow),
    ],
)
def test_methods_that_talk_first(talking, tmp_path, kind, world, more, monkeypatch):
    asked = {**talking[kind], **more}
    monkeypatch.setenv("WELLTUNED_CACHE", str(tmp_path / "one"))
    welltuned.train(out=tmp_path / "one-run", **asked)
    monkeypatch.setenv("WELLTUNED_CACHE", str(tmp_path / "two"))
    finished(in_ranks(trained(tmp_path / "run", **asked), world, tmp_path / "said"))
    assert_same_talk(tmp_path / "run", tmp_path / "one-run")
    assert any(line.get("kl", 0) > 0 for line in lines(tmp_path / "run"))


@pytest.mark.parametrize("kind", [pytest.param("kto", marks=pytest.mark.slow), "grpo"])
def test_memory_that_one_rank_lacks_after_the_word_asks_nobody_again(talking, tmp_path, kind, monkeypatch):
    """It makes its part of the update again; the others are at the sum by then, and would never answer a word."""
    welltuned.train(out=tmp_path / "one-run", **talking[kind])
    module, name = (preference_step, "_in_order") if kind == "kto" else (grpo_step, "token_logprobs")
    real, calls = getattr(module, name), []

    def short(*arguments, **named):
        calls.append(1)
        if os.environ.get("RANK") == "1" and len(calls) in (3, 9):
            raise MemoryError
        return real(*arguments, **named)

    monkeypatch.setattr(module, name, short)
    finished(in_ranks(trained(tmp_path / "run", **talking[kind]), 2, tmp_path / "said"))
    monkeypatch.undo()
    assert_same_talk(tmp_path / "run", tmp_path / "one-run")
    assert any("ran out of memory" in note and note.startswith("process 1") for note in notes(tmp_path / "run"))


# ── a signal, and another number of processes afterwards ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("worlds", [(2, 1), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_a_signal_at_one_rank_and_another_number_of_processes(options, straight, tmp_path, monkeypatch, worlds):
    """All end after the same update, it is saved once, and as many others go on to the same result."""
    run = tmp_path / "run"
    real, calls = loop_module.Loop._own_gradient, []

    def own(loop, rows, keys):
        calls.append(1)
        if loop.ranks.rank == 1 and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(loop, rows, keys)

    monkeypatch.setattr(loop_module.Loop, "_own_gradient", own)
    ended = in_ranks(trained(run, **options), worlds[0], tmp_path / "said")
    monkeypatch.undo()
    assert [e.code for e in ended] == [143] * worlds[0], ended
    assert f"ended by SIGTERM after update 4; update 4 of {UPDATES} is saved" in ended[0].said
    assert "welltuned" not in "".join(e.said for e in ended[1:])
    assert newest(run, None)[0].position.step == 4
    if worlds[1] == 1:
        welltuned.resume(run)
    else:
        finished(in_ranks(resumed(run), worlds[1], tmp_path / "said-again"))
    assert_same_run(run, straight)
    assert f"the run was shared by 2 processes and is by {worlds[1]}: it goes on, but not bit for bit" in notes(run)


@pytest.mark.slow
def test_a_run_of_one_goes_on_with_two_and_with_four(options, straight, tmp_path):
    welltuned.train(out=tmp_path / "short", **{**options, "max_steps": UPDATES})
    for world in (2, 4):
        run = tmp_path / f"run-{world}"
        shutil.copytree(straight, run)
        (run / "run.json").unlink()
        shutil.rmtree(run / "checkpoints" / f"step-{UPDATES:06d}")
        finished(in_ranks(resumed(run), world, tmp_path / "said"))
        assert_same_run(run, straight)


# ── what the ranks are made of ───────────────────────────────────────────────────────────────────────────────────────


def test_one_process_costs_nothing():
    class Trained:
        grad_KP = torch.zeros(1, 5)

        def claim_gradients(self):
            pass

    before = Trained.grad_KP
    GradientSum(Trained(), ALONE)
    assert Trained.grad_KP is before and list(ALONE.share([3, 1])) == [0, 1]
    assert ALONE.first(lambda: 7) == 7 and ALONE.gather(lambda: 7) == [7] and TAIL < 100
    assert type(ALONE) is Ranks and ALONE.alone and ALONE.is_first


@pytest.mark.slow
def test_moments_in_8_bits_go_on_with_two(options, tmp_path):
    """Codes and scales reach the rank that does not read the checkpoint."""
    asked = {**options, **MORE["full, 8 bits"], "save_steps": 1, "max_steps": 4}
    welltuned.train(out=tmp_path / "one", **asked)
    shutil.copytree(tmp_path / "one", tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    finished(in_ranks(resumed(tmp_path / "run"), 2, tmp_path / "said"))  # which compares its weights and moments
    assert_same_run(tmp_path / "run", tmp_path / "one")


def test_a_fingerprint_sees_one_bit_and_an_exchange():
    whole = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    other, turned = whole.clone(), whole.clone()
    other.view(torch.int32)[1, 77] ^= 1
    turned[0, 3], turned[0, 4] = whole[0, 4], whole[0, 3]
    names = {fingerprint([tensor]) for tensor in (whole, other, turned, whole.view(1, -1))}
    assert len(names) == 4 and fingerprint([whole.clone()]) in names
    assert fingerprint([whole, other]) != fingerprint([other, whole])
    codes = torch.arange(7, dtype=torch.uint8)
    assert fingerprint([codes]) == fingerprint([codes.clone()]) != fingerprint([codes.flip(0)])


def test_a_batch_that_is_not_multiplied_is_said(options):
    class Two(Ranks):
        size = here = 2

    def said(**more):
        asked = {**options, "effective_batch_size": None, **more}
        return " · ".join(sharing_notes(prepare(load_recipe(None, asked)), Two()))

    assert "for all 2 processes together, not for each" not in said()
    text = said(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert "effective_batch_size is 8 (4 × 2) for all 2 processes together, not for each" in text


def test_what_several_processes_cannot_do_is_refused(monkeypatch, capsys):
    from welltuned.cli.main import main

    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["sweep", "--model", "m", "--data", "d", "--out", "o"]) == 2
    assert (
        "welltuned sweep runs in one process, and 2 were started; start it without torchrun" in capsys.readouterr().err
    )

"""Real runs of every method on a tiny model that has been to school: healthy ones, and ones with a fault of its own."""

import pytest

from welltuned.training.monitor.thresholds import limit

SLOW = pytest.mark.slow


@pytest.fixture(scope="session")
def files(rows, write_rows, tmp_path_factory):
    """Pairs, judged answers and prompts of the rows that the model was schooled on; rewards."""
    folder = tmp_path_factory.mktemp("methods")
    pairs, labels, prompts = [], [], []
    for i, row in enumerate(rows):
        asked, answer = (message["content"] for message in row["messages"])
        other = rows[(3 * i + 1) % len(rows)]["messages"][1]["content"] + " no"
        pairs.append({"prompt": asked, "chosen": answer, "rejected": other})
        labels.append({"prompt": asked, "completion": answer if i % 2 else other, "label": bool(i % 2)})
        prompts.append({"prompt": asked, "answer": answer})
    (folder / "rewards.py").write_text(
        "def of_12(completion):\n"
        "    return -abs(len(completion) - 12) / 12\n"
        "def never(completion):\n"
        "    return 0.0\n"
        "def e(completion):\n"
        "    return completion.count('e') / 4\n"
    )
    made = {"pairs": pairs, "labels": labels, "prompts": prompts}
    return {name: write_rows(folder / f"{name}.jsonl", some) for name, some in made.items()} | {
        "rewards": str(folder / "rewards.py")
    }


@pytest.fixture
def grpo(files, schooled_dir):
    return dict(
        model=schooled_dir, method="grpo", data=files["prompts"], num_generations=4, effective_batch_size=32,
        max_completion_length=48, max_steps=30, learning_rate=5e-3, eval_steps=10,
    )  # fmt: skip


def options_of(method, files, schooled_dir):
    return dict(model=schooled_dir, method=method, data=files["labels" if method == "kto" else "pairs"])


HEALTHY = [
    pytest.param("dpo", dict(learning_rate=3e-3, num_train_epochs=4), id="dpo"),
    pytest.param("kto", dict(learning_rate=3e-3, num_train_epochs=4), id="kto", marks=SLOW),
    pytest.param("orpo", dict(learning_rate=2e-2, num_train_epochs=10), id="orpo", marks=SLOW),
]


@pytest.mark.parametrize(("method", "changes"), HEALTHY)
def test_nothing_is_said_of_a_healthy_preference_run(watched, files, schooled_dir, method, changes):
    run = watched(**options_of(method, files, schooled_dir), **changes)
    assert run.error is None and run.evaluations[-1].eval_loss < run.evaluations[0].eval_loss
    assert run.findings == {} and run.summary["diverged"] is None


@SLOW
def test_nothing_is_said_of_a_healthy_grpo_run(watched, grpo, files):
    run = watched(
        **{**grpo, "temperature": 1.2, "eval_fraction": 0.5, "eval_steps": 15}, rewards=[f"{files['rewards']}:of_12"]
    )
    rewards = [u.measures["reward"] for u in run.updates]
    assert run.error is None and sum(rewards[-5:]) > sum(rewards[:5])
    assert run.findings == {}


@SLOW
def test_nothing_is_said_of_a_healthy_qlora_run(watched):
    pytest.importorskip("bitsandbytes")
    run = watched(tune="qlora", num_train_epochs=3)
    assert run.error is None and run.evaluations[-1].eval_loss < 0.9 * run.evaluations[0].eval_loss
    assert run.findings == {}


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_preference_run_that_ends_as_it_began(watched, files, schooled_dir):
    run = watched(**options_of("dpo", files, schooled_dir), learning_rate=1e-7, num_train_epochs=4)
    found = run.findings["untrained_preference"]
    assert "ln 2" in found.what and found.changes["learning_rate"] > 1e-7
    assert abs(run.updates[-1].loss - 0.6931) < limit("preference_loss")


@SLOW
def test_a_preference_run_that_diverges(watched, files, schooled_dir):
    run = watched(**options_of("dpo", files, schooled_dir), learning_rate=1.0, num_train_epochs=8)
    assert run.findings["divergence"].changes["learning_rate"] < 0.4


def test_a_reward_that_says_nothing(watched, grpo, files):
    run = watched(**{**grpo, "max_steps": 20}, rewards=[f"{files['rewards']}:never"])
    assert all(u.measures["frac_reward_zero_std"] == 1 for u in run.updates)
    assert run.findings["no_signal"].changes == {"num_generations": 8}
    assert "a gain of 0.000" in run.findings["flat_reward"].what


def test_answers_that_are_cut(watched, grpo, files):
    run = watched(**{**grpo, "max_steps": 12, "max_completion_length": 3}, rewards=[f"{files['rewards']}:of_12"])
    assert run.findings["truncation"].changes["max_completion_length"] == 6


@SLOW
def test_a_policy_that_leaves_its_language(watched, grpo, files):
    run = watched(**{**grpo, "learning_rate": 0.1, "beta": 1e-3}, rewards=[f"{files['rewards']}:e"])
    assert {"kl_blow_up", "entropy_collapse"} & run.findings.keys()
    assert max(u.measures.get("kl", 0.0) for u in run.updates) > limit("kl_most")

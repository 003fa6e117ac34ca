"""`method: grpo` from a recipe to a verified adapter on a tiny model, and what is refused before any of it."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import welltuned
from welltuned.data.conversation import Kind
from welltuned.errors import InputError
from welltuned.recipe import load_recipe
from welltuned.training.events import Updated
from welltuned.training.prepare import prepare
from welltuned.training.resume import resume

LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def prompts(write_rows, tmp_path_factory):
    rows = [{"prompt": f"say {c} {n}", "answer": str(n), "letter": c} for n, c in enumerate(LETTERS * 4)]
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(
        "def vowels(completions, letter):\n"
        "    return [sum(c.count(v) for v in 'aeiou') for c in completions]\n"
        "def fails(completion, letter):\n"
        "    if letter == 'c':\n"
        "        raise ValueError('no c here')\n"
        "    return len(completion)\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def options(tiny_model_dir, prompts, rewards):
    return dict(
        model=str(tiny_model_dir), data=prompts, method="grpo", rewards=[f"{rewards}:vowels"], num_generations=4,
        effective_batch_size=16, max_completion_length=8, max_steps=4, learning_rate=1e-2, eval_steps=2,
        mask_truncated_completions=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(run, options):
    return run(**options)


def test_a_run_has_its_numbers(finished):
    assert len(finished.updates) == 4
    for line in finished.updates:
        assert line["seconds/generation"] > 0 and line["seconds/update"] >= 0
        assert line["reward"] == pytest.approx(line["rewards/vowels/mean"])
        assert 0 <= line["frac_reward_zero_std"] <= 1 and 0 <= line["completions/clipped_ratio"] <= 1
        assert 0 < line["completions/mean_length"] <= 8
        assert line["entropy"] > 0 and line["reward_std"] >= 0 and line["clip_ratio"] == 0
        assert "kl" not in line
    first, *_, last = finished.evaluations
    assert first["eval_reward"] == -first["eval_loss"] and last["eval_reward_se"] >= 0
    assert finished.summary["held_out"]["after"]["eval_reward"] == last["eval_reward"]
    assert finished.summary["method"] == "grpo"
    assert all(check["change"] > 0 for check in finished.summary["trained_tensors"])


def test_some_completions_of_every_evaluation_are_kept(finished):
    samples = [json.loads(line) for line in (finished.path / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 2, 4}
    for s in samples:
        assert s["prompt"].startswith("say ") and s["stopped"] in ("by its end token", "at max_completion_length")
        assert s["reward"] == s["rewards"]["vowels"] == sum(s["completion"].count(v) for v in "aeiou")


def test_the_same_run_again_is_bit_for_bit_the_same(run, options, finished):
    again = run(**options)
    for name, tensor in finished.adapter.items():
        assert (tensor == again.adapter[name]).all()


class CutOff(Exception):
    """The run ends here, as it would by a kill."""


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(options, finished, rewards, tmp_path):
    """Completions too are functions of seed, update and row: nothing of the sampler is in a checkpoint."""

    def observer(event):
        if isinstance(event, Updated) and event.step == 3:
            raise CutOff

    out, own = tmp_path / "run", tmp_path / "rewards.py"
    text = Path(rewards).read_text()
    own.write_text(text)
    with pytest.raises(CutOff):
        welltuned.train(out=out, observer=observer, **{**options, "rewards": [f"{own}:vowels"], "save_steps": 1})
    own.write_text(text + "# another\n")
    with pytest.raises(InputError, match=r"rewards\.py changed"):
        resume(out)
    own.write_text(text)
    resume(out)
    again = load_file(out / "adapter" / "adapter_model.safetensors")
    assert again.keys() == finished.adapter.keys()
    for name, tensor in finished.adapter.items():
        assert (tensor == again[name]).all()


def test_a_broken_reward_is_told_and_counted_and_ends_nothing(run, options, rewards):
    found = run(**{**options, "rewards": [f"{rewards}:fails"], "beta": 0.1})
    notes = [line["text"] for line in found.metrics if line.get("event") == "note"]
    told = [note for note in notes if note.startswith("reward fails failed on a completion of ")]
    assert told and "no c here" in told[0] and "prompts.jsonl:" in told[0]
    assert sum(line["reward_faults"] for line in found.updates) > 0
    assert all("kl" in line for line in found.updates)


def test_several_updates_of_one_set(run, options):
    found = run(**options, num_iterations=2)
    assert ["seconds/generation" in line for line in found.updates] == [True, False, True, False]


def test_the_reward_rises(run, options):
    """What it is for: thirty updates, and the rewarded letters are common, held out too."""
    found = run(**{**options, "max_steps": 30, "eval_steps": 30, "learning_rate": 2e-2})
    rewards = [line["reward"] for line in found.updates]
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5 + 0.5
    assert found.evaluations[-1]["eval_reward"] > found.evaluations[0]["eval_reward"]


def test_full_fine_tuning(run, options):
    found = run(**{**options, "tune": "full", "learning_rate": 1e-3, "max_steps": 2, "beta": 0.05})
    assert len(found.updates) == 2


# ── what is refused, and what is said ──


def prepared(options, **changes):
    return prepare(load_recipe(None, {**options, **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rewards": ["nowhere.py:score"]}, "no such reward file"),
        ({"rewards": ["FILE:nothing"]}, "no function `nothing`"),
        ({"max_length": 12}, "the prompt has .* tokens, and max_length of 12"),
        ({"max_completion_length": 250}, "the prompt has .* tokens, and the model's context of 256"),
    ],
)
def test_refused(options, rewards, changes, said, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("welltuned.models.load.load_model", loaded)
    if "rewards" in changes:
        changes = {"rewards": [spec.replace("FILE", rewards) for spec in changes["rewards"]]}
    with pytest.raises(InputError, match=said):
        prepared(options, **changes)


def test_no_rewards(options):
    without = {key: value for key, value in options.items() if key != "rewards"}
    with pytest.raises(InputError, match="something that rewards answers"):
        prepare(load_recipe(None, without))


def test_a_reward_that_compares_needs_answers(options, write_rows, tmp_path):
    bare = write_rows(tmp_path / "bare.jsonl", [{"prompt": f"say {i}", "note": "x"} for i in range(20)])
    with pytest.raises(InputError, match="no row has one"):
        prepared(options, data=bare, rewards=["numeric"])
    with pytest.raises(InputError, match="asks for `letter`"):
        prepared(options, data=bare)
    words = write_rows(tmp_path / "words.jsonl", [{"prompt": f"say {i}", "answer": "one"} for i in range(20)])
    with pytest.raises(InputError, match="no number in any row's answer"):
        prepared(options, data=words, rewards=["numeric"])


def test_prompts_that_are_too_long_can_be_dropped_and_are_counted(options, write_rows, tmp_path):
    rows = [{"prompt": "say " + "abcdefgh " * (120 if i == 7 else 1) + str(i), "answer": "1"} for i in range(20)]
    data = write_rows(tmp_path / "long.jsonl", rows)
    with pytest.raises(InputError, match=r"long\.jsonl:8"):
        prepared(options, data=data, rewards=["numeric"])
    found = prepared(options, data=data, rewards=["numeric"], on_too_long="drop")
    assert len(found.train) + len(found.held_out) == 19
    assert found.audit.findings[Kind.TOO_LONG].dropped == 1
    assert any("1" in note and "long" in note for note in found.notes)


def test_bad_rows_and_duplicates_follow_the_policies(options, tmp_path):
    rows = [json.dumps({"prompt": f"say {i % 10}", "answer": "1"}) for i in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows[:5], '{"prompt": null, "answer": "1"}', *rows[5:]]) + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:6"):
        prepared(options, data=str(path), rewards=["numeric"])
    found = prepared(options, data=str(path), rewards=["numeric"], on_bad_row="drop", on_duplicate="drop")
    assert len(found.train) + len(found.held_out) == 10
    assert found.audit.findings[Kind.BAD_ROW].dropped == 1
    assert found.audit.findings[Kind.DUPLICATE].dropped == 10


def test_prompts_of_one_group_stay_on_one_side(options):
    found = prepared(options, group_by="letter", eval_fraction=0.25)
    sides = {p.row["letter"] for p in found.train}, {p.row["letter"] for p in found.held_out}
    assert sides[1] and not sides[0] & sides[1]


def test_an_update_takes_whole_groups(options):
    found = prepared(options)
    assert len(found.mixture.update(16, 0)) == 4

"""What a sampler proposes: within what is open, never twice, a function of the seed and of what arms came to."""

import json
from importlib.util import find_spec

import pytest

from welltuned.errors import InputError
from welltuned.search import sampler as sampler_module
from welltuned.search.arms import question_of
from welltuned.search.events import ArmAdded, ArmUpdated
from welltuned.search.sampler import Dimension, OptunaSampler, starting
from welltuned.search.sweep import resume_sweep, sweep

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="optuna is not installed")
OVER = ["learning_rate", "r=2..16", "lora_dropout=0..0.2"]


def test_what_a_sampler_is_asked_for():
    assert not question_of(None, ["r=2,4", "lora_alpha=8,16", "lora_dropout=0,0.1"]).is_sampled  # 8 arms: all are tried
    many = question_of(None, ["r=2,4,8", "lora_alpha=8,16,32", "lora_dropout=0,0.1"])
    assert many.is_sampled and (many.arms, many.trials) == (4, 12)
    asked = question_of(3, OVER, trials=9)
    assert (
        asked.is_sampled
        and (asked.arms, asked.trials) == (3, 9)
        and asked.names
        == (
            "learning_rate",
            "r",
            "lora_dropout",
        )
    )
    for over, trials, match in (
        (["r=16..8"], None, "is no range"),
        (["r=8..16..32"], None, "is no range"),
        (["seed=1..9"], None, "every one is as good"),
        (["r=8..64"], 2, "4 arms at once do not go into 2 trials"),
        (["r=8,16"], 9, "nothing is left to be chosen"),
    ):
        with pytest.raises(InputError, match=match):
            question_of(None, over, trials)


def test_without_optuna_one_sentence(prepared_for, monkeypatch):
    monkeypatch.setattr(sampler_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Optuna.*not installed.*welltuned\[search\]"):
        starting(prepared_for().plan, question_of(None, OVER))
    starting(prepared_for().plan, question_of(None, []))  # needs none


def test_settings_are_what_people_write():
    rate = Dimension("learning_rate", (), 1e-4, 1e-2)
    assert rate.value(0.00123456) == 1.2e-3 and rate.value(1.001e-4) == 1e-4 and rate.parameter(5.0) == 1e-2
    rank = Dimension("r", (2, 4, 8))
    assert [rank.value(i) for i in range(3)] == [2, 4, 8] and rank.parameter(5) == 1


@needs_optuna
def test_proposals_follow_from_seed_and_results_alone():
    dimensions = (Dimension("learning_rate", (), 1e-4, 1e-2), Dimension("r", (2, 4, 8, 16)))
    sampler = OptunaSampler(dimensions, {"learning_rate": 1e-3, "r": 8}, seed=1, trials=40, batch=4)
    first = sampler.ask([], 4)
    assert first[0] == sampler.start and first == sampler.ask([], 4)

    def loss(settings):  # lowest at 1e-2 and 16
        return 1 - 0.1 * settings["learning_rate"] / 1e-2 - 0.01 * settings["r"]

    told = [(settings, loss(settings)) for settings in first]
    told[1] = (told[1][0], None)  # one diverged
    while len(told) < 40:
        asked = sampler.ask(told, 4)
        assert asked == sampler.ask(told, 4)
        told += [(settings, loss(settings)) for settings in asked]
    every = [settings for settings, _ in told]
    assert all(every.count(settings) == 1 for settings in every)
    assert all(1e-4 <= s["learning_rate"] <= 1e-2 and s["r"] in (2, 4, 8, 16) for s in every)
    early, late = ([loss(s) for s in part] for part in (every[:8], every[-8:]))
    assert sum(late) < sum(early)  # it learned where to look
    other = OptunaSampler(dimensions, sampler.start, seed=2, trials=40, batch=4)
    assert other.ask([], 4)[1:] != first[1:]


@needs_optuna
def test_no_more_than_there_is():
    sampler = OptunaSampler((Dimension("r", (2, 4)),), {"r": 2}, seed=0, trials=9, batch=4)
    assert sampler.ask([], 4) == [{"r": 2}, {"r": 4}]
    assert sampler.ask([({"r": 2}, 1.0), ({"r": 4}, 0.9)], 4) == []


class Killed(BaseException):
    pass


@needs_optuna
@pytest.mark.slow
def test_a_sampled_search_and_the_same_killed(prepared_for, tmp_path):
    """Ranks up to the largest that is open have room; the search goes on as it would have."""
    question = question_of(2, OVER, trials=5)
    told = []
    whole = sweep(prepared_for(), question, tmp_path / "whole", told.append)
    assert len(whole.found.rows) == 5 and {2, 4, 8, 16} >= {row.settings["r"] for row in whole.found.rows}
    assert sum(isinstance(e, ArmAdded) and "sampler" in e.why for e in told) == 3
    assert all(len(row.looks) >= 2 or row.status != "done" for row in whole.found.rows)
    for at in (3, 20):
        out, seen = tmp_path / f"killed-{at}", 0

        def kill(event, at=at):
            nonlocal seen
            seen += isinstance(event, ArmUpdated)
            if seen > at:
                raise Killed

        with pytest.raises(Killed):
            sweep(prepared_for(save_steps=2), question, out, kill)
        again = resume_sweep(out)
        assert again.found.rows == whole.found.rows and again.found.rungs == whole.found.rungs
        sums = [json.loads((run / "run.json").read_text())["trained_tensors"] for run in (out, tmp_path / "whole")]
        assert sums[0] == sums[1]

"""A whole search on a tiny model: what it decides, what it leaves behind, and that it can be ended at any time."""

import json

import pytest
import yaml
from safetensors.torch import load_file

import welltuned
from welltuned.cli.main import main
from welltuned.errors import InputError
from welltuned.recipe import load_recipe
from welltuned.search.arms import factors, first_arms, question_of
from welltuned.search.events import ArmAdded, ArmEnded, ArmJudged, ArmUpdated
from welltuned.search.sweep import resume_sweep, sweep
from welltuned.training.events import Note


@pytest.fixture(scope="module")
def found(prepared_for, tmp_path_factory):
    """A search over rates from a poor start, its directory, and all that it told."""
    out, events = tmp_path_factory.mktemp("sweep") / "out", []
    result = sweep(prepared_for(learning_rate=2e-3), question_of(3, []), out, events.append)
    return out, result, events


def adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)


def test_the_winner_is_a_run(found):
    out, result, _ = found
    assert welltuned.verify(out).problems == ()
    rate = result.found.rows[result.found.winner].learning_rate
    recipe = load_recipe(str(out / "recipe.yaml"))
    assert recipe.hyperparameters["learning_rate"] == rate
    plan = yaml.safe_load((out / "plan.yaml").read_text())
    assert plan["choices"]["learning_rate"]["value"] == rate and "search" in plan["choices"]["learning_rate"]["reason"]
    run = json.loads((out / "run.json").read_text())
    best = min(row.looks[-1].loss for row in result.found.rows if row.looks[-1].share == 1.0)
    assert run["held_out"]["after"]["loss"] == pytest.approx(best, rel=1e-5)
    assert run["updates"] == 12 and run["sweep"]["winner"] == result.found.winner
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [line for line in lines if "loss" in line]  # the winner's, as a run's
    assert [line["step"] for line in curve] == list(range(1, 13)) and curve[-1]["eval_loss"] == run["held_out"][
        "after"
    ]["loss"]
    text = welltuned.write_report(out).read_text()
    assert result.found.advice in text
    assert welltuned.load(out).reply("2 times the red hat")


def test_a_low_start_is_left_upwards(found):
    """The best rate lies far above the advice here: the bracket is extended, and the low arms are dropped."""
    _, result, events = found
    rows = result.found.rows
    assert len(rows) > 3 and rows[3].learning_rate > max(row.learning_rate for row in rows[:3])
    assert rows[result.found.winner].learning_rate == max(row.learning_rate for row in rows)
    assert any(isinstance(e, ArmAdded) and "edge" in e.why for e in events)
    assert any(row.status == "dropped" and "±" in row.why for row in rows)
    assert result.found.tokens < len(rows) * result.found.run_tokens


def test_every_arm_is_told_and_recorded(found):
    out, result, events = found
    for kind, name in ((ArmUpdated, "arm_update"), (ArmJudged, "arm_judged"), (ArmEnded, "arm_ended")):
        told = [e.arm for e in events if isinstance(e, kind)]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert told == [line["arm"] for line in lines if line.get("event") == name]
    summary = json.loads((out / "sweep.json").read_text())
    assert [a["number"] for a in summary["arms"]] == [r.number for r in result.found.rows]
    assert summary["rungs"] and summary["advice"].startswith("The advice was 2e-3")
    svg = (out / "sweep.svg").read_text()
    assert svg.count("<circle") == sum(len(row.looks) for row in result.found.rows)


def test_the_evidence_adds_up(found):
    """Tokens are those of the updates that were made, and nobody's update is counted twice."""
    _, result, events = found
    for row in result.found.rows:
        own = [e for e in events if isinstance(e, ArmUpdated) and e.arm == row.number]
        assert [e.step for e in own] == list(range(1, row.updates + 1))
        assert sum(e.tokens for e in own) == row.tokens
    assert result.found.tokens == sum(row.tokens for row in result.found.rows)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 21])
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(found, prepared_for, tmp_path, at):
    """Bit for bit, wherever it was ended: the adapter, every arm's updates, and every decision."""
    whole, result, _ = found
    out, seen = tmp_path / "out", 0

    def kill(event):
        nonlocal seen
        seen += isinstance(event, ArmUpdated)
        if seen > at:
            raise Killed

    prepared = prepared_for(learning_rate=2e-3, save_steps=2)
    with pytest.raises(Killed):
        sweep(prepared, question_of(3, []), out, kill)
    assert not (out / "run.json").exists()
    told = []
    again = resume_sweep(out, told.append)
    names = {e.arm: e.name for e in told if isinstance(e, ArmAdded)}
    assert names == {row.number: row.name for row in again.found.rows}  # also of those that began before
    assert same(adapter(out), adapter(whole))
    assert again.found.rows == result.found.rows and again.found.rungs == result.found.rungs

    def lines(run):
        every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in every if line.get("event", "").startswith("arm")]

    assert lines(out) == lines(whole)
    with pytest.raises(InputError, match="is finished"):
        resume_sweep(out)


def test_a_look_is_saved_with_what_it_found(prepared_for, tmp_path):
    """Also where the round before it is one that is saved: an interruption later does not make it again."""
    out = tmp_path / "out"

    def kill(event):
        if isinstance(event, ArmUpdated) and event.step == 5:
            raise Killed

    with pytest.raises(Killed):
        sweep(prepared_for(learning_rate=2e-3, save_steps=3), question_of(2, []), out, kill)  # the first look is at 3
    told = []
    resume_sweep(out, told.append)
    assert {event.step for event in told if isinstance(event, ArmJudged)} == {5, 12}


def test_a_search_that_could_not_write_its_result_has_it(found, prepared_for, tmp_path, monkeypatch):
    """All arms are trained, and only the end is made again."""
    from welltuned.search import result as result_module

    whole, result, _ = found
    out, told = tmp_path / "out", []

    def fails(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(result_module, "verify_and_save", fails)
        with pytest.raises(Killed):
            sweep(prepared_for(learning_rate=2e-3), question_of(3, []), out)
    again = resume_sweep(out, told.append)
    assert not any(isinstance(e, ArmUpdated) for e in told)
    assert same(adapter(out), adapter(whole)) and again.found.advice == result.found.advice


def test_pairs_share_their_reference(tiny_model_dir, pairs, tmp_path, monkeypatch):
    """DPO: arms of a search against separate runs, and the reference is asked once."""
    monkeypatch.setenv("WELLTUNED_CACHE", str(tmp_path / "cache"))  # other tests may have asked it before
    options = dict(model=str(tiny_model_dir), data=pairs, method="dpo", effective_batch_size=8, max_steps=4,
                   eval_fraction=0.2)  # fmt: skip
    told = []
    result = welltuned.sweep(out=tmp_path / "s", over=["learning_rate=1e-3,1e-2"], observer=told.append, **options)
    assert sum("log-probabilities" in str(e) for e in told) == 1
    rate = result.found.rows[result.found.winner].learning_rate
    single = welltuned.train(out=tmp_path / "r", learning_rate=rate, load_best_model_at_end=False, **options)
    assert result.run.after.loss == pytest.approx(single.after.loss, rel=1e-5)
    assert "rewards/accuracies" in result.run.after.measures


@pytest.mark.slow
def test_a_base_in_four_bits(prepared_for, tmp_path):
    pytest.importorskip("bitsandbytes")
    result = sweep(prepared_for(tune="qlora", max_steps=4), question_of(2, []), tmp_path / "out")
    assert result.run.after.loss < result.run.before.loss
    assert json.loads((tmp_path / "out" / "run.json").read_text())["tune"] == "qlora"


def test_questions():
    assert [round(f, 2) for f in factors(3)] == [0.5, 1, 2] and factors(7)[0] == 0.25 and factors(7)[-1] == 4
    asked = question_of(None, ["r=8, 32", "learning_rate"])
    assert asked.over == (("r", (8, 32)), ("learning_rate", ())) and asked.searches_rate
    for arms, over, match in (
        (1, [], "2 to 64 arms, not 1"),
        (3, ["colour=red"], "'colour' is nothing that arms can differ in"),
        (3, ["r"], "r has no values"),
        (3, ["r=8", "r=16"], "r is given twice"),
        (3, ["r=8,8"], "names a value twice"),
        (3, ["r=eight"], "r"),
    ):
        with pytest.raises(InputError, match=match):
            question_of(arms, over)


def test_what_cannot_be_searched_is_refused(prepared_for):
    for options, match in (
        ({"tune": "full"}, "would not share a base"),
        ({"bias": "all"}, "biases belong to the base"),
    ):
        with pytest.raises(InputError, match=match):
            first_arms(prepared_for(**options).plan, question_of(3, []))
    with pytest.raises(InputError, match="make 1 arms"):
        first_arms(prepared_for().plan, question_of(None, ["r=8"]))


def test_processes_of_torchrun_are_refused(prepared_for, tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="a sweep runs in one process"):
        sweep(prepared_for(), question_of(None, []), tmp_path / "out")
    with pytest.raises(InputError, match="a sweep runs in one process"):
        resume_sweep(tmp_path / "out")


def test_the_command(tiny_model_dir, data_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    options = ["--model", str(tiny_model_dir), "--data", data_file, "--set", "max_steps=4"]
    assert main(["sweep", *options, "--out", out, "--over", "r=2,4", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["sweep"]["arms"][1]["settings"] == {"r": 4}
    assert "did best" in " ".join(printed.err.split())
    assert main(["resume", out]) == 0
    capsys.readouterr()
    new = ["sweep", *options, "--out", str(tmp_path / "new")]
    for more, sentence in (
        (["--minutes", "0.00001"], "one run alone is forecast to take"),
        (["--workers", "2"], "--workers: belongs to --ray"),
        (["--trials", "0"], "nothing is left to be chosen from"),
        (["--over", "r=2..8", "--trials", "0"], "4 arms at once do not go into 0 trials"),
    ):
        assert main([*new, *more]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()
    assert main(["sweep", *options, "--out", out]) == 2


@pytest.mark.slow
def test_no_memory_is_a_smaller_cut(prepared_for, tmp_path, monkeypatch):
    """The round is made again in smaller micro-batches, and nothing else changes."""
    from welltuned.search import bank as bank_module

    plain = sweep(prepared_for(max_steps=3), question_of(2, []), tmp_path / "plain")
    real, calls, told = bank_module.gradients, [], []

    def lacking(engine, *rest):
        calls.append(engine.token_budget)
        if len(calls) == 2:
            raise MemoryError
        return real(engine, *rest)

    monkeypatch.setattr(bank_module, "gradients", lacking)
    again = sweep(prepared_for(max_steps=3), question_of(2, []), tmp_path / "again", told.append)
    assert calls[0] == calls[1] > calls[2] == calls[-1]
    assert any("ran out of memory" in str(event) for event in told)
    for one, other in zip(plain.found.rows, again.found.rows, strict=True):
        assert one.looks[-1].loss == pytest.approx(other.looks[-1].loss, rel=1e-5)


def test_a_tracker_hears_the_winners_run(prepared_for, tmp_path, monkeypatch):
    """Its updates and evaluations, once, in order: what a run of the same recipe would have told."""
    from welltuned.recipe import Tracker
    from welltuned.training import trackers

    heard = []

    class Sink:
        def log(self, step, numbers):
            heard.append((step, dict(numbers)))

        def say(self, step, text):
            heard.append((step, text))

        def close(self):
            heard.append("closed")

    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "_OPEN", {Tracker.TENSORBOARD: lambda plan, run, run_id: Sink()})
    told = []
    prepared = prepared_for(report_to=["tensorboard"], max_steps=4)
    result = sweep(prepared, question_of(2, []), tmp_path / "out", told.append)
    numbers = [entry for entry in heard if entry != "closed"]
    assert [step for step, n in numbers if "train/loss" in n] == [1, 2, 3, 4] and heard[-1] == "closed"
    assert numbers[-1][0] == 4 and result.run.after.loss in numbers[-1][1].values()
    said = [event.text for event in told if isinstance(event, Note)]
    assert any(text.startswith("report_to: tensorboard will be told the winner's run") for text in said)
    assert any(
        text.startswith("report_to") for text in json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    )

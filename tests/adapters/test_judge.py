"""Judging a run beside its base: losses, paired errors, replies and their scores, strengths."""

import json
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from welltuned.api import evaluate
from welltuned.cli.main import main
from welltuned.data.render import Example
from welltuned.errors import InputError, RunError
from welltuned.finished import harness
from welltuned.finished.find import find
from welltuned.finished.heldout import Difference, RowSet, mean_and_error, paired
from welltuned.finished.plot import sweep_svg
from welltuned.finished.scores import Metric, difference, last_number, score
from welltuned.finished.sweep import Strength, Sweep, choose, sweep
from welltuned.training.step import Evaluation


def held_out(run):
    return json.loads((run / "run.json").read_text())["held_out"]


@pytest.mark.parametrize("tune", ["lora", pytest.param("qlora", marks=pytest.mark.slow), "full"])
def test_the_run_is_as_good_as_it_said(trained_run, tune):
    """Base and tuned on the rows that the run held out, found again: the numbers of run.json."""
    if tune == "qlora":
        pytest.importorskip("bitsandbytes")
    run = trained_run(tune)
    found, noted = evaluate(run), held_out(run)
    assert found.tuned.loss.loss == pytest.approx(noted["after"]["loss"], rel=1e-5)
    assert found.base.loss.loss == pytest.approx(noted["before"]["loss"], rel=1e-5)
    assert found.tuned.loss.standard_error == pytest.approx(noted["after"]["standard_error"], rel=1e-4)
    assert found.tuned.perplexity == pytest.approx(math.exp(noted["after"]["loss"]), rel=1e-4)
    assert found.loss_difference.value == pytest.approx(noted["after"]["loss"] - noted["before"]["loss"], rel=1e-4)
    assert found.loss_difference.error > 0 and found.count == noted["rows"]


def test_data_that_changed_since(copied, tmp_path, write_rows, rows):
    run = copied()
    data = write_rows(tmp_path / "colours.jsonl", rows[:40])
    for name in ("recipe.yaml", "plan.yaml"):
        path = run.path / name
        text = path.read_text()
        old = next(line.split(": ", 1)[1] for line in text.splitlines() if line.strip().startswith("data: "))
        path.write_text(text.replace(old, data))
    with pytest.raises(InputError, match="the data are not those of the run"):
        evaluate(run.path)
    assert evaluate(run.path, data=data).count == 40


def test_a_model_by_itself(tiny_model_dir, data_file, capsys):
    assert main(["eval", "--model", str(tiny_model_dir), "--data", data_file, "--rows", "9", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["base"] is None and document["difference"] is None and document["rows"] == 9
    assert document["tuned"]["loss"] == pytest.approx(math.log(document["tuned"]["perplexity"]))


@pytest.mark.slow
def test_replies(trained_run, capsys):
    """Each metric is of the replies that the document holds."""
    run = trained_run(max_steps=60)
    command = ["eval", str(run), "--metrics", "exact,json", "--rows", "6", "--max-new-tokens", "40", "--json"]
    assert main(command) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert len(document["replies"]) == 6 and {r["base"] == r["tuned"] for r in document["replies"]} == {False}
    right = [r["tuned"].strip() == r["answer"].strip() for r in document["replies"]]
    assert document["tuned"]["metrics"]["exact"]["value"] == pytest.approx(np.mean(right))
    assert document["base"]["metrics"]["exact"]["value"] == 0 and document["tuned"]["metrics"]["json"]["value"] == 0
    gap = document["difference"]["exact"]
    assert gap["value"] == pytest.approx(np.mean(right))
    assert gap["standard_error"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(6))
    assert "perplexity" in said.err and "replies equal to the answer" in said.err


def test_bad_requests(trained_run, tmp_path, capsys, write_rows, tiny_model_dir):
    run = str(trained_run())
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a document"}])
    (tmp_path / "empty.jsonl").write_text("")
    for bad, match in (
        ([], "give a run or a model"),
        ([run, "--model", "x"], "give a run or a model"),
        (["--model", str(tiny_model_dir)], "give --data"),
        ([run, "--metrics", "accuracy"], "there is no metric 'accuracy'"),
        ([run, "--metrics", "number"], "no answer of these rows has what number compares"),
        ([run, "--rows", "0"], "at least 1"),
        ([run, "--data", text, "--metrics", "exact"], "does not end with an answer"),
        ([run, "--data", str(tmp_path / "empty.jsonl")], "empty.jsonl"),
        ([run, "--harness", "x"], "belongs to --tasks"),
        ([run, "--tasks", "x", "--rows", "3"], "--tasks is the harness's"),
        ([str(tmp_path)], "neither a finished run"),
    ):
        assert main(["eval", *bad]) == 2, bad
        assert match in capsys.readouterr().err, bad


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────────


def example(labels):
    return Example(np.zeros(labels + 1, np.int32), np.array([False] + [True] * labels), "x")


def evaluation(losses, counts):
    value = float(np.dot(losses, counts) / sum(counts))
    return Evaluation(value, math.nan, sum(counts), tuple(losses))


def test_paired_differences_by_simulation():
    """Rows drawn again and again: the spread of the difference is the error that one drawing claims."""
    draw = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(400):
        counts = draw.integers(1, 30, 60)
        hard = draw.normal(2, 1, 60)
        ours, theirs = hard - 0.1 + draw.normal(0, 0.05, 60), hard
        rows = RowSet("x", [example(int(c)) for c in counts], [])
        gap = paired(evaluation(ours, counts.tolist()), evaluation(theirs, counts.tolist()), rows)
        values.append(gap.value)
        errors.append(gap.error)
    assert np.mean(values) == pytest.approx(-0.1, abs=0.002)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
    assert np.mean(errors) < 0.02, "the rows' own spread, of 1, is not in it"


def test_one_row_has_no_error():
    rows = RowSet("x", [example(3)], [])
    gap = paired(evaluation([1.0], [3]), evaluation([2.0], [3]), rows)
    assert gap.value == -1 and math.isnan(gap.error) and math.isnan(mean_and_error([1.0])[1])


def test_scores():
    answers = ["12 apples #### 12", '{"a": 1}', "no number"]
    replies = ["I think 12.0", '{"a": 2}', " no number "]
    assert score(Metric.EXACT, replies, answers).of_row == (0.0, 0.0, 1.0)
    number = score(Metric.NUMBER, replies, answers)
    assert number.of_row == (1.0, 0.0) and number.left_out == 1
    assert score(Metric.JSON, [*replies, "[1]", "NaN", "3", '{"a": NaN}'], [""] * 7).of_row == (0, 1, 0, 1, 0, 0, 0)
    assert difference(number, score(Metric.NUMBER, ["0", "1", ""], answers)) == (0.0, pytest.approx(1.0))


@pytest.mark.parametrize(
    ("text", "number"),
    [("5", 5), ("-3.5 degrees", -3.5), ("1,234,567.8", 1234567.8), ("a #### 1,000\n", 1000), ("none", None),
     ("it is 7.", 7), ("x #### 3 of 4", 3), (".5", 0.5)],
)  # fmt: skip
def test_numbers(text, number):
    found = last_number(text)
    assert (None if found is None else float(found)) == number


def test_rouge():
    pytest.importorskip("rouge_score")
    found = score(Metric.ROUGE_L, ["the cat sat", "nothing"], ["the cat sat down", "at all"])
    assert found.of_row[0] == pytest.approx(2 * 1 * 0.75 / 1.75) and found.of_row[1] == 0


def test_bleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = [f"the {c} cat sat on the {m} mat today" for c in ("red", "old", "big") for m in ("new", "wet")]
    replies = [a.replace("sat", "lay") if i % 2 else a for i, a in enumerate(answers)]
    found = score(Metric.BLEU, replies, answers)
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(replies, [answers]).score / 100)
    assert 0 < found.error < 0.5
    assert score(Metric.BLEU, answers, answers).value == pytest.approx(1)


def test_packages_that_are_missing(trained_run, monkeypatch, capsys):
    from welltuned.finished import scores

    monkeypatch.setattr(scores, "find_spec", lambda name: None if name == "sacrebleu" else find_spec(name))
    assert main(["eval", str(trained_run()), "--metrics", "bleu"]) == 2
    assert "pip install sacrebleu" in capsys.readouterr().err


# ── strengths ────────────────────────────────────────────────────────────────────────────────────────────────────────


def strength(by, loss, gap=0.0, error=0.1, keep=None):
    kept = None if keep is None else Evaluation(keep, 0.1, 9, ())
    return Strength(by, Evaluation(loss, 0.1, 9, ()), Difference(gap, error), kept, None)


@pytest.mark.parametrize(
    ("judged", "chosen", "why"),
    [
        ([strength(0.0, 3, 2.0), strength(0.5, 1.0), strength(1.0, 1.05, 0.05)], 1.0, "as it was trained"),
        ([strength(0.0, 3, 2.0), strength(0.5, 1.0), strength(1.0, 1.5, 0.5)], 0.5, "lowest held-out loss"),
        ([strength(0.5, 1.05, 0.05, keep=2.0), strength(1.0, 1.0, keep=2.5)], 0.5, "what must be kept"),
        ([strength(0.5, 1.5, 0.5, keep=2.0), strength(1.0, 1.0, keep=2.5)], 1.0, "no other is within"),
        ([strength(0.0, 1.0), strength(1.0, 2.0, 1.0)], 0.0, "lowest held-out loss"),
        ([strength(0.5, 1.0, 0.0, math.nan), strength(1.0, 1.1, 0.1, math.nan)], 0.5, "lowest"),
    ],
)
def test_the_choice(judged, chosen, why):
    by, reason = choose(judged)
    assert by == chosen and why in reason


def test_a_sweep_is_what_the_written_adapters_give(trained_run, data_file, tmp_path):
    """Each strength in memory against the adapter written with it and evaluated from its files."""
    from welltuned.api import scale

    run = trained_run()
    found = sweep(find(run), strengths=(0.0, 0.5, 1.0), keep=data_file)
    noted = held_out(run)
    losses = [one.held_out.loss for one in found.strengths]
    assert losses[0] == pytest.approx(noted["before"]["loss"], rel=1e-5)
    assert losses[2] == pytest.approx(noted["after"]["loss"], rel=1e-5)
    scale(run, by=0.5, out=tmp_path / "half")
    half = evaluate(tmp_path / "half", data=data_file)
    assert found.strengths[1].keep.loss == pytest.approx(half.tuned.loss.loss, rel=1e-5)
    assert found.strengths[0].against_base.value == 0
    svg = sweep_svg(found)
    assert svg.count("<polyline") == 2 and svg.count("<circle") == 6 and svg.rstrip().endswith("</svg>")


def test_the_sweep_command(trained_run, tmp_path, capsys):
    run, out = str(trained_run()), tmp_path / "chosen"
    command = ["adapter", "scale", run, "--sweep", "--strengths", "0,1,4", "--out", str(out), "--json"]
    assert main([*command, "--plot", str(tmp_path / "plot.svg")]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["chosen"] == 1 and [s["by"] for s in document["strengths"]] == [0, 1, 4]
    assert (out / "adapter_config.json").exists() and (tmp_path / "plot.svg").read_text().startswith("<svg")
    assert "held-out loss" in said.err and "Chosen: 1, because" in said.err
    assert main(["adapter", "scale", str(trained_run("full")), "--sweep"]) == 2


def test_a_sweep_that_the_base_wins(trained_run, tmp_path, capsys, monkeypatch):
    """Planted: the adapter makes every row worse."""
    from welltuned.finished import sweep as sweeping

    real = sweeping.judge

    def worse(engine, rows):
        found = real(engine, rows)
        return replace(found, loss=found.loss + 9, loss_of_example=tuple(x + 9 for x in found.loss_of_example))

    monkeypatch.setattr(sweeping, "judge", worse)
    run, out = str(trained_run()), tmp_path / "chosen"
    assert main(["adapter", "scale", run, "--sweep", "--strengths", "0,1", "--rows", "6", "--out", str(out)]) == 1
    assert "the untuned base is as good" in capsys.readouterr().err and not out.exists()


# ── chat, and the harness ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_chat_beside_the_base(trained_run, tune, capsys):
    from welltuned.api import load

    run = trained_run(tune)
    command = ["chat", str(run), "--prompt", "3 times the red hat", "--base", "--max-new-tokens", "12"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["reply"] != document["base"] and document["prompt"] == "3 times the red hat"
    from welltuned.models.generate import Decoding

    expected = load(run, device="cpu").reply("3 times the red hat", decoding=Decoding(max_new_tokens=12))
    assert document["reply"].strip() == expected.strip()
    assert main(command) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) >= 1


def test_bad_chats(trained_run, capsys, tiny_model_dir):
    for bad, match in (
        ([str(trained_run()), "--json"], "answers one prompt"),
        ([str(trained_run()), "--max-new-tokens", "0"], "at least 1"),
        ([str(tiny_model_dir), "--base", "--prompt", "x"], "what this model was before is not known"),
    ):
        assert main(["chat", *bad]) == 2
        assert match in capsys.readouterr().err


def test_the_harness_is_told_what_to_load(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    run = trained_run()
    line = harness.command(find(run), "gsm8k", out=tmp_path, more=["--limit", "5"])
    arguments = line[line.index("--model_args") + 1].split(",")
    assert f"peft={run / 'adapter'}" in arguments and "--apply_chat_template" in line and line[-2:] == ["--limit", "5"]
    assert arguments[0] == "pretrained=" + str(Path(json.loads((run / "run.json").read_text())["model"]))
    full = harness.command(find(trained_run("full")), "gsm8k")
    assert f"pretrained={trained_run('full') / 'model'}" in full[full.index("--model_args") + 1]
    with pytest.raises(RunError, match="exit code 3"):
        harness.run_harness([sys.executable, "-c", "raise SystemExit(3)"])


def test_without_the_harness(trained_run, monkeypatch, capsys):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert main(["eval", str(trained_run()), "--tasks", "gsm8k"]) == 2
    assert "pip install 'welltuned[eval]'" in capsys.readouterr().err


def test_a_sweep_as_a_picture_without_what_to_keep():
    one = strength(1.0, 1.0)
    svg = sweep_svg(Sweep((strength(0.0, 2.0, 1.0), one), 1.0, "x", "rows <1>", None))
    assert svg.count("<polyline") == 1 and "rows &lt;1&gt;" in svg

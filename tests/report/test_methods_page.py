"""What the page of a Run on pairs or on rewards has of its own."""

import json
import re

import pytest

from welltuned.report.curves import curves
from welltuned.report.page import page
from welltuned.report.parts import measurements, sampled, tiles
from welltuned.report.read import read_run_folder
from welltuned.report.verdict import verdict


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_pairs_show_accuracy_and_margin(preferred):
    run = read_run_folder(preferred)
    judged = [line for line in lines(preferred) if "eval_loss" in line]
    drawn = curves(run)
    for name in ("rewards/accuracies", "rewards/margins"):
        tie = None if name.endswith("accuracies") else 0  # at first the model is its own reference
        ours, theirs = drawn["updates"][name], [line[name] for line in lines(preferred) if "loss" in line]
        assert ours[0] == tie and ours[1:] == pytest.approx(theirs[1:], rel=1e-5)
        ours, theirs = drawn["evaluations"][f"eval_{name}"], [line[f"eval_{name}"] for line in judged]
        assert ours[0] == tie and ours[1:] == pytest.approx(theirs[1:], rel=1e-5)
        assert len(drawn["smooth"][name]) == 4
    share = judged[-1]["eval_rewards/accuracies"]
    assert f"The chosen answer wins in {share:.0%} of the held-out pairs" in verdict(run).sentence
    assert ("chosen answer wins", f"{share:.0%}") in [tile[:2] for tile in tiles(run)]
    head, table, left = measurements(run)
    assert head[3:] == ["rewards: accuracies", "rewards: margins"] and len(table) == len(judged) and not left


def test_rewards_are_the_measure_and_not_minus_that(rewarded):
    run = read_run_folder(rewarded)
    before, after = (-run.summary["held_out"][when]["loss"] for when in ("before", "after"))
    assert ("held-out reward", f"{before:.3f} → {after:.3f}") in [tile[:2] for tile in tiles(run)]
    assert f"{before:.3f} to {after:.3f}" in verdict(run).sentence and "reward" in verdict(run).sentence
    head, table, _ = measurements(run)
    assert head[1] == "held-out reward" and float(table[-1][1]) == pytest.approx(after, rel=1e-3)
    drawn = curves(run)
    assert {"reward", "rewards/vowels/mean", "rewards/length/mean", "entropy"} <= drawn["updates"].keys()


def test_samples_stand_beside_each_other(rewarded):
    run = read_run_folder(rewarded)
    kept = [json.loads(line) for line in (rewarded / "samples.jsonl").read_text().splitlines()]
    shown = sampled(run)
    assert shown and all([look["step"] for look in one["looks"]] == [0, 4] for one in shown)
    for one in shown:
        of_row = [sample for sample in kept if sample["row"] == one["row"]]
        assert [look["completion"] for look in one["looks"]] == [of_row[0]["completion"], of_row[-1]["completion"]]
    text = page(run)
    assert text.count("<dt>after 4 updates</dt>") == len(shown) and "<dt>before</dt>" in text
    chips = re.findall(r'<span class="chip">(\w+) <b>([^<]+)</b>', text)
    assert {name for name, _ in chips} == {"reward", "vowels", "length"}
    assert "its answers were rewarded by" in text and "<img" not in text and "&lt;img" in text

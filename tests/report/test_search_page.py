"""The page of a search: its arms as sweep.json and metrics.jsonl tell of them, finished, at work or damaged."""

import json
import re
import shutil

import pytest

from welltuned.errors import InputError
from welltuned.report.arms import sentence, tokens
from welltuned.report.curves import curves
from welltuned.report.page import page
from welltuned.report.read import read_run_folder
from welltuned.report.verdict import Health, verdict


@pytest.fixture(scope="module")
def found(swept):
    return json.loads((swept / "sweep.json").read_text())


def at_work(swept, place):
    """The same search some time before its end, killed in the middle of a line."""
    shutil.copytree(swept, place)
    (place / "run.json").unlink()
    (place / "sweep.json").write_text(
        json.dumps(
            {
                name: value
                for name, value in json.loads((place / "sweep.json").read_text()).items()
                if name in ("format", "asked")
            }
        )
    )
    lines = (place / "metrics.jsonl").read_text().splitlines(keepends=True)
    ended = next(i for i, line in enumerate(lines) if '"event": "arm_ended"' in line)
    (place / "metrics.jsonl").write_text("".join(lines[: ended + 1]) + '{"event": "arm_up')
    return place


def section(text):
    return re.search(r'<section id="search".*?</section>', text, re.S)[0]


def test_the_report_is_written_and_tells_of_every_arm(swept, found):
    text = section((swept / "report.html").read_text())
    assert all(f'<th scope="row">{arm["name"]}</th>' in text for arm in found["arms"])
    dropped = [arm for arm in found["arms"] if arm["status"] == "dropped"]
    assert dropped and all(f"dropped: {arm['why']}" in text for arm in dropped)
    for arm in found["arms"]:
        assert all(f"{look['loss']:.4f}" in text for look in arm["looks"])
    assert found["advice"].split(".")[0] in text and text.count("chosen</b>") == 1
    assert f"{found['tokens']:,} tokens" in text and f"{7 * found['run_tokens']:,} tokens" in text
    assert all(f"<dt>after {rung['share']:.0%}</dt>" in text for rung in found["rungs"])


def test_what_is_drawn_is_what_was_measured(swept, found):
    drawn = curves(read_run_folder(swept))["search"]
    assert [(a["name"], a["rate"]) for a in drawn["arms"]] == [(a["name"], a["learning_rate"]) for a in found["arms"]]
    for ours, theirs in zip(drawn["arms"], found["arms"], strict=True):
        assert [look["loss"] for look in ours["looks"]] == [look["loss"] for look in theirs["looks"]]
        assert [look["error"] for look in ours["looks"]] == [look["above_best_se"] for look in theirs["looks"]]
        assert ours["step"][-1] == theirs["updates"] and ours["chosen"] == (theirs["number"] == found["winner"])
    assert drawn["advised"] == 2e-3 and drawn["best"] == found["best_rate"]
    assert drawn["fitted"] == found["fitted"] and len(drawn["fitted"]) > 20
    rates = [arm["learning_rate"] for arm in found["arms"]]
    assert drawn["fitted"][0]["rate"] < min(rates) and drawn["fitted"][-1]["rate"] > max(rates)
    assert all(point["low"] <= point["loss"] <= point["high"] for point in drawn["fitted"])


def test_a_search_at_work_is_told_from_its_lines(swept, found, tmp_path):
    """The same arms and looks as sweep.json will hold, as far as they are there."""
    run = read_run_folder(at_work(swept, tmp_path / "half"))
    assert run.search is not None and run.search.winner is None and not tokens(run.search)
    for arm, later in zip(run.search.arms, found["arms"], strict=False):
        assert (arm.name, arm.group) == (later["name"], later["group"])
        assert arm.rate == pytest.approx(later["learning_rate"], rel=0.05)  # its name has two digits
        assert 0 < len(arm.looks) <= len(later["looks"]) and 0 < arm.updates <= later["updates"]
        assert [look.loss for look in arm.looks] == pytest.approx([x["loss"] for x in later["looks"]][: len(arm.looks)])
        assert [look.share for look in arm.looks] == [x["share"] for x in later["looks"]][: len(arm.looks)]
    assert any(arm.status == "dropped" and "±" in arm.why for arm in run.search.arms)
    said = verdict(run)
    assert (
        said.health is Health.UNFINISHED
        and said.sentence == sentence(run.search)
        and "1 of them ended" in said.sentence
    )
    text = page(run)
    assert "welltuned resume" in text and "lowest held-out loss so far" in text and "What it took" not in text


def test_the_curves_of_the_chosen_arm_are_the_runs(swept):
    drawn = curves(read_run_folder(swept))
    assert drawn["updates"]["step"] == list(range(1, 13)) and "memory_bytes" not in drawn["updates"]
    text = (swept / "report.html").read_text()
    assert "Of 4 arms" in text and '<span class="by">searched</span>' in text


def test_nothing_of_others_is_run(swept, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(swept, other)
    owned = '</script><img src=x onerror="document.title=1">'
    (other / "sweep.json").write_text(
        (swept / "sweep.json").read_text().replace("worse than the best", json.dumps(owned)[1:-1])
    )
    text = page(read_run_folder(other))
    assert "&lt;img" in text and "<img" not in text


def test_damage_is_one_sentence(swept, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(swept, other)
    for text, said in (("{", "damaged"), ("[]", "no JSON object"), ('{"arms": 3}', "no search that can be read")):
        (other / "sweep.json").write_text(text)
        with pytest.raises(InputError, match=said):
            read_run_folder(other)

"""A bank of arms against separate runs, arms that die, and what a search leaves behind."""

import json

from welltuned.search.arms import question_of
from welltuned.search.sweep import sweep


def losses_by_arm(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        if line.get("event") == "arm_update":
            found.setdefault(line["arm"], []).append(line["loss"])
    return found


def test_a_sweep_runs(prepared_for, tmp_path):
    out = tmp_path / "out"
    sweep(prepared_for(), question_of(3, []), out)
    print(json.loads((out / "sweep.json").read_text())["rungs"])
    assert (out / "run.json").is_file()

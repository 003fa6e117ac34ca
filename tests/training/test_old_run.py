"""A whole unfinished run that an older version left: recipe, plan, metrics and checkpoint are read, and it goes on."""

import json
import shutil
from pathlib import Path

from welltuned.training.events import Note, Updated
from welltuned.training.resume import resume

FIXTURE = Path(__file__).parent / "run-format-1"


def test_a_run_of_an_older_version_goes_on(tiny_model_dir, data_file, tmp_path):
    """With other libraries the tests' own model is another file than it was then: so changes are accepted."""
    run = shutil.copytree(FIXTURE, tmp_path / "run")
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    shutil.copy(data_file, tmp_path / "rows.jsonl")
    (run / "started.json").write_text((run / "started.json").read_text().replace("PLACE", str(tmp_path)))
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = []
    result = resume(run, seen.append, accept_changes=True)
    assert result.updates == 8 and Note("goes on after update 4 of 8") in seen
    assert [event.step for event in seen if isinstance(event, Updated)] == [5, 6, 7, 8]
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in after if "loss" in line] == list(range(1, 9))
    first = [line for line in before if line.get("step", 9) <= 4 and "loss" in line]
    assert [line for line in after if line.get("step", 9) <= 4 and "loss" in line] == first
    assert result.after.loss < result.before.loss

"""The page of a Run: all of it is there, its numbers are the run's, and nothing that others wrote is run."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

import welltuned
from welltuned.cli.main import main
from welltuned.errors import InputError
from welltuned.report import page as page_module
from welltuned.report.curves import curves
from welltuned.report.page import page, write_report
from welltuned.report.parts import defects
from welltuned.report.read import read_run_folder
from welltuned.report.table import Table, smoothed, thinned
from welltuned.report.verdict import Health, verdict

SECTIONS = ("examples", "curves", "findings", "choices", "data", "memory", "next", "provenance")


class Tags(HTMLParser):
    """Every element of a page, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.scripts, self.handlers, self.links = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.links += [value for name, value in attributes if name in ("href", "src")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.scripts and self.lasttag == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def text(run):
    return (run / "report.html").read_text(encoding="utf-8")


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def drawn(text):
    return json.loads(next(s for s in Tags(text).scripts if s.startswith("[{")))


def test_every_section_is_there(text):
    assert set(SECTIONS) <= set(Tags(text).ids) and len(text.encode()) < 2_000_000
    assert not [link for link in Tags(text).links if not link.startswith(("#", "data:,"))]


def test_the_curves_are_the_runs(run, text):
    [one] = drawn(text)
    updates = [line for line in metrics(run) if "loss" in line]
    assert one["updates"]["step"] == [line["step"] for line in updates]
    for name in ("loss", "learning_rate", "grad_norm"):
        assert one["updates"][name] == pytest.approx([line[name] for line in updates], rel=1e-5)
    judged = [line for line in metrics(run) if "eval_loss" in line]
    assert one["evaluations"]["eval_loss"] == pytest.approx([line["eval_loss"] for line in judged], rel=1e-5)


def test_what_was_chosen_shown_and_answered(run, text):
    plan = read_run_folder(run).plan
    assert all(f"<code>{name}</code>" in text for name in plan.choices)
    shown = json.loads((run / "shown.json").read_text())
    assert len(shown["rows"]) == 5 and len(shown["replies"]) == 3
    assert all({"prompt", "expected", "before", "after"} <= reply.keys() for reply in shown["replies"])
    assert text.count("<dt>after</dt>") == 3 and "<mark>" in text
    trained = "".join(r["text"] for r in shown["rows"][0]["runs"] if r.get("trained"))
    assert trained.startswith("<b>0") or trained.startswith("kettle")


def test_nothing_of_others_is_run(text):
    """The same page with the escaping left out has more elements: the test can fail."""
    found = Tags(text)
    assert found.tags.count("script") == 5 and "img" not in found.tags and not found.handlers
    assert "49" not in re.findall(r"onerror=[^<]{0,80}", text) and "{{ 7*7 }}" in text
    careless = Tags(text.replace("&lt;", "<").replace("&#34;", '"').replace("&gt;", ">"))
    assert careless.tags.count("script") > 5 and "img" in careless.tags and careless.handlers


def test_a_run_that_is_not_finished(run, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(run, half)
    (half / "run.json").unlink()
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "loss')  # being written
    read = read_run_folder(half)
    assert verdict(read).health is Health.UNFINISHED and not read.log.damaged
    assert "welltuned resume" in page(read) and 999 not in curves(read)["updates"]["step"]
    with (half / "metrics.jsonl").open("a") as file:
        file.write("\n[]\n")
    assert read_run_folder(half).log.damaged == 2 and "2 lines of metrics.jsonl are damaged" in page(
        read_run_folder(half)
    )


def test_findings_and_what_to_change(run, tmp_path):
    other = tmp_path / "diverged"
    shutil.copytree(run, other)
    finding = {
        **{"event": "finding", "id": "divergence", "severity": "error", "step": 3, "what": "the loss is 9"},
        **{"cause": "the rate", "changes": {}, "sentence": ""},
        "remedies": [{"text": "lower the rate", "changes": {"learning_rate": 1e-4}}],
    }
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(finding) + "\n")
    text = page(read_run_folder(other))
    assert "this run is lost" in text and "--set learning_rate=0.0001" in text and "welltuned chat" not in text
    assert drawn(text)[0]["findings"] == [{"step": 3, "id": "divergence", "severity": "error"}]


def test_a_change_within_the_noise_is_no_improvement(run, tmp_path):
    other = tmp_path / "noise"
    shutil.copytree(run, other)
    summary = json.loads((run / "run.json").read_text())
    summary["held_out"] |= {
        "before": {"loss": 2.0, "standard_error": 0.1},
        "after": {"loss": 1.9, "standard_error": 0.1},
    }
    (other / "run.json").write_text(json.dumps(summary))
    said = verdict(read_run_folder(other))
    assert said.sure is False and "within the noise" in said.sentence
    summary["held_out"]["after"]["loss"] = 2.9
    (other / "run.json").write_text(json.dumps(summary))
    assert "got worse (45%)" in verdict(read_run_folder(other)).sentence


def test_runs_laid_over_each_other(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = welltuned.write_report(run, other, out=tmp_path / "both.html")
    assert [one["name"] for one in drawn(path.read_text())] == [run.name, "other"]


def test_a_long_run_stays_small_and_keeps_its_peak(run, tmp_path):
    other = tmp_path / "long"
    shutil.copytree(run, other)
    lines = ({"step": i, "loss": 9.0 if i == 77_777 else 1 + i % 7 / 10, "grad_norm": 1.0} for i in range(1, 100_001))
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page(read_run_folder(other))
    assert len(text.encode()) < 2_000_000
    updates = drawn(text)[0]["updates"]
    assert len(updates["step"]) <= 2_000 and updates["loss"][updates["step"].index(77_777)] == 9.0


def test_thinning_and_smoothing():
    assert thinned(np.full(10, np.nan), most=4).tolist() == [0, 9]
    assert smoothed(np.full(50, 2.0)) == pytest.approx(np.full(50, 2.0))
    assert np.isnan(smoothed(np.array([np.nan, 1.0]))[0])
    long = smoothed(np.arange(100_000.0))
    assert len(long) == 100_000 and (np.diff(long) >= 0).all()


def test_columns_that_come_late():
    table = Table()
    for line in ({"step": 1, "text": "x"}, {"step": 2, "kl": 0.5}, {"step": 3, "ok": True}):
        table.add(line)
    assert table.names == ("step", "kl") and table.column("kl")[1] == 0.5 and np.isnan(table.column("kl")[[0, 2]]).all()


def test_a_page_that_fails_loses_no_run(tiny_model_dir, data_file, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("planted")

    monkeypatch.setattr(page_module, "page", broken)
    seen = []
    arguments = dict(model=str(tiny_model_dir), data=data_file, out=tmp_path / "run", max_steps=1)
    result = welltuned.train(**arguments, learning_rate=1e-2, observer=seen.append)
    assert (result.path / "run.json").is_file() and "there is no report" in seen[-1].text


def test_defects_are_named_with_their_rows(run):
    found = {"leak": {"rows": 2, "of": 9, "policy": "keep", "dropped": 0, "origins": [["a:1", "b:2"], "a:3"]}}
    assert defects({"found": found})[0] == "leak: 2 of 9 rows, policy keep (a:1 and b:2, a:3)"


def test_bad_input_is_one_sentence(run, tmp_path, capsys):
    for folder, out, said in (
        (tmp_path, tmp_path / "x.html", "there is no plan.yaml"),
        (run, tmp_path / "none" / "x.html", "cannot be written"),
    ):
        assert main(["report", str(folder), "--out", str(out)]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "plan.yaml").write_text("no: plan")
    with pytest.raises(InputError, match="not a plan that can be read"):
        write_report(tmp_path)


def test_the_command(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "page.html")}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_in_a_browser(run, tmp_path):
    arguments = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--window-size=1200,900",
    ]
    command = ["chromium", *arguments, "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, (run / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    dom = Tags(done.stdout)
    assert dom.tags.count("canvas") >= 6 and "img" not in dom.tags and "<title>owned" not in done.stdout
    assert "the last value is" in done.stdout

"""What pages may do where the owner allows it: plan, start, stop, go on, ask; and what they may not."""

import json
import re
import shutil
import time

import pytest

pytest.importorskip("starlette", reason="welltuned[serve] is not installed")
from starlette.testclient import TestClient

from welltuned.report.control import KEY, Control
from welltuned.report.live import app

LOCAL = frozenset(("127.0.0.1", "localhost", "[::1]"))


@pytest.fixture
def control(tmp_path):
    (tmp_path / "runs").mkdir()
    return Control(tmp_path / "runs")


@pytest.fixture
def act(control):
    """A function that acts as a page of the server does."""
    client = TestClient(app(control.folder, LOCAL, None, control), base_url="http://127.0.0.1:8321")

    def act(what, key=control.key, **asked):
        return client.post(f"/api/{what}", json=asked, headers={KEY: key}).json()

    act.client = client
    return act


@pytest.fixture
def asked(tiny_model_dir, data_file):
    return {"model": str(tiny_model_dir), "data": data_file, "eval_data": "", "method": "sft", "tune": ""}


def test_the_plan_follows_what_is_edited(act, asked):
    first = act("plan", **asked)
    rate = next(line for line in first["choices"] if line["name"] == "learning_rate")
    assert rate["reason"] and rate["span"] and not rate["by_user"] and first["memory"]["fits"] is True
    second = act("plan", **asked, sets={"learning_rate": "0.5", "r": "4"})
    changed = {line["name"]: line for line in second["choices"] if line["by_user"]}
    assert changed.keys() == {"learning_rate", "r"} and changed["learning_rate"]["value"] == "0.5"
    assert any("learning_rate" in warning or "rate" in warning for warning in second["warnings"])
    assert "did you mean" in act("plan", **asked, sets={"lerning_rate": "1"})["error"]
    assert "there is no such" in act("plan", **{**asked, "data": "/none.jsonl"})["error"]


@pytest.mark.slow
def test_a_run_started_stopped_and_gone_on(act, asked, control):
    sets = {"learning_rate": "1e-2", "num_train_epochs": "400", "early_stopping_patience": "0", "eval_steps": "500"}
    assert act("start", **asked, sets=sets, name="one") == {"name": "one"}
    until(lambda: (control.folder / "one" / "metrics.jsonl").is_file() and made(control) > 3)
    assert "at work already" in act("resume", name="one")["error"]
    assert act("stop", name="one") == {"name": "one"}
    until(lambda: act("job", name="one")["code"] is not None)
    assert act("job", name="one")["code"] == 130 and "welltuned resume" in act("job", name="one")["said"]
    before = made(control)
    assert "nothing is at work" in act("stop", name="one")["error"]
    assert "not finished" in act("chat", name="one", prompt="x")["error"]
    assert act("resume", name="one") == {"name": "one"}
    until(lambda: made(control) > before + 3)
    act("stop", name="one")
    until(lambda: act("job", name="one")["code"] is not None)


@pytest.mark.slow
def test_a_finished_run_is_asked_beside_its_base(act, asked, control):
    act("start", **asked, sets={"learning_rate": "1e-2", "max_steps": "2"}, name="two")
    until(lambda: act("job", name="two")["code"] is not None)
    assert act("job", name="two")["code"] == 0
    said = act("chat", name="two", prompt="--json </pre>", system="Be brief.")
    assert said["prompt"] == "--json </pre>" and isinstance(said["reply"], str) and isinstance(said["base"], str)
    text = act.client.get("/run/two").text
    assert 'id="ask"' in text and f'data-key="{control.key}"' in text


def until(true, seconds=90):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def made(control):
    lines = (control.folder / "one" / "metrics.jsonl").read_text().splitlines()
    return sum('"loss"' in line for line in lines)


def test_other_keys_come_a_line_each(act, asked):
    found = act("plan", **asked, more="max_steps: 7\n\n lora_alpha=8 \nchat_template_kwargs: {a: b=c}\n")
    assert "chat_template_kwargs" in found.get("error", "chat_template_kwargs")
    found = act("plan", **asked, more="max_steps: 7\nlora_alpha=8\n")
    values = {line["name"]: line["value"] for line in found["choices"] if line["by_user"]}
    assert values == {"max_steps": "7", "lora_alpha": "8"}
    assert "no key with a value" in act("plan", **asked, more="max_steps")["error"]


def test_what_the_form_offers(control, act, run, tmp_path, monkeypatch):
    (tmp_path / "here" / "data" / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "data/b <i>.csv", "data/deep/c.jsonl", "notes.md", "data/.hidden.jsonl"):
        (tmp_path / "here" / name).write_text("")
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(run, control.folder / "one")
    text = act.client.get("/start").text
    offered = re.findall(r'<option value="([^"]+)">', text)
    assert offered[-2:] == ["a.jsonl", "data/b &lt;i&gt;.csv"] and "smollm2-135m-instruct" in offered[0:2]
    assert any(str(name).endswith("llama0") or "llama" in name for name in offered[:-2])


@pytest.mark.parametrize("name", ["../out", "a/b", "", "-x", "a b", ".hidden", None, "x" * 99])
def test_a_run_is_written_beneath_the_folder_only(act, asked, name):
    assert "letters, digits" in act("start", **asked, name=name)["error"]


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "none", "."])
def test_only_runs_of_the_folder_are_touched(act, name):
    for what in ("stop", "resume", "chat"):
        assert "no such run" in act(what, name=name, prompt="x")["error"]


def test_other_sites_cannot_act(act, asked, control):
    for key in ("", "wrong", control.key[:-1]):
        assert act("start", key=key, **asked, name="x") == {"error": "this page is not one of this server's"}
    assert act.client.post("/api/plan", content=b"{", headers={KEY: control.key}).status_code == 400
    assert act.client.post("/api/plan", json=[1], headers={KEY: control.key}).status_code == 400
    assert act.client.get("/api/plan").status_code == 405 and not list(control.folder.iterdir())


def test_without_leave_nothing_can_be_done(control):
    looking = TestClient(app(control.folder, LOCAL, None), base_url="http://127.0.0.1")
    assert looking.get("/start").status_code == 404
    assert looking.post("/api/start", json={}, headers={KEY: control.key}).status_code in (404, 405)
    assert "start" not in looking.get("/").text.split("<main>")[0].rsplit("</style>", 1)[1]


def test_what_is_wrong_is_said_before_anything_starts(act, asked, control):
    assert "learning_rate" in act("start", **asked, sets={"learning_rate": "fast"}, name="x")["error"]
    assert "names with values" in act("start", **asked, sets=["r=1"], name="x")["error"]
    assert not list(control.folder.iterdir())
    (control.folder / "x").mkdir()
    assert "there is a run of that name" in act("start", **asked, name="x")["error"]
    assert json.dumps(act("job", name="x")).count("was not started here") == 1

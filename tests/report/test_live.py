"""Runs served: what is listed, what a page hears while a run trains, and who may look."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette", reason="welltuned[serve] is not installed")
from starlette.testclient import TestClient

from welltuned.cli.main import main
from welltuned.report.live import Shelf, app
from welltuned.report.log import Log
from welltuned.training.lock import LOCK, at_work

LOCAL = frozenset(("127.0.0.1", "localhost", "[::1]"))


@pytest.fixture
def folder(run, tmp_path):
    """Three runs: one finished, one half-way, one damaged; and what is none."""
    shutil.copytree(run, tmp_path / "a" / "done")
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half" / "run.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half" / "metrics.jsonl").write_text("".join(lines[:6]) + '{"step": 7, "lo')
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "plan.yaml").write_text("<b>no</b>: plan")
    (tmp_path / "notes").mkdir()
    return tmp_path


def client(folder, hosts=LOCAL, token=None, base="http://127.0.0.1:8321"):
    return TestClient(app(folder, hosts, token), base_url=base, follow_redirects=False)


def messages(text):
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_the_list(folder):
    text = client(folder).get("/").text
    assert re.findall(r'href="(/run/[^"]+)"', text) == ["/run/a/done", "/run/half"]
    assert "healthy" in text and "interrupted" in text and "not a plan that can be read" in text
    assert "<b>no</b>" not in text and "notes" not in text.replace(str(folder), "")


def test_a_page_and_what_it_hears(folder):
    served = client(folder)
    text = served.get("/run/a/done").text
    assert 'data-events="/events/a/done"' in text and "connect-src" in text
    [said] = messages(served.get("/events/a/done").text)
    assert said["finished"] and said["curves"]["updates"]["step"][-1] == len(said["curves"]["updates"]["step"])
    assert said["state"].startswith("healthy: update")


def test_a_run_that_grows_is_followed(folder, run):
    """The page hears of new lines, and of the end, without reading the old ones again."""
    half, lines = folder / "half", (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    heard = []

    def listen():
        heard.extend(messages(client(folder).get("/events/half").text))

    listener = threading.Thread(target=listen)
    listener.start()
    time.sleep(0.7)
    (half / "metrics.jsonl").write_text("".join(lines[:8]))
    time.sleep(1.5)
    (half / "metrics.jsonl").write_text("".join(lines))
    shutil.copy(run / "run.json", half / "run.json")
    listener.join(timeout=20)
    counts = [len(one["curves"]["updates"]["step"]) for one in heard]
    assert len(counts) >= 2 and counts == sorted(counts) and counts[0] < counts[-1] and heard[-1]["finished"]


def test_a_log_is_read_once_and_anew_where_it_became_shorter(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    assert not log.follow()
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1')
    assert log.follow() and len(log.updates) == 1 and not log.follow()
    with path.open("a") as file:
        file.write('.5}\n{"event": "note", "text": "x"}\n')
    assert log.follow() and log.updates.column("loss").tolist() == [2.0, 1.5] and log.notes == ["x"]
    path.write_text('{"step": 1, "loss": 7.0}\n')
    assert log.follow() and log.updates.column("loss").tolist() == [7.0] and not log.notes
    path.write_text('{"step": 1, "loss": 6.5}\n{"step": 2, "loss": 3.0}\n')  # cut, and longer than before again
    assert log.follow() and log.updates.column("loss").tolist() == [6.5, 3.0]


def test_runs_laid_over_each_other(folder):
    text = client(folder).get("/compare?run=a%2Fdone&run=half").text
    names = [one["name"] for one in json.loads(re.search(r'id="runs">(.*?)</script>', text, re.S)[1])]
    assert names == ["done", "half"]
    assert client(folder).get("/compare?run=a%2Fdone&run=none").status_code == 404


@pytest.mark.parametrize("name", ["../half", "..%2f..%2fetc", "%2fetc", "none", "a/done/../../half", "bad%00", "notes"])
def test_only_runs_beneath_the_folder(folder, name):
    (folder / "out").symlink_to(folder / "half")
    served = client(folder / "a")
    assert served.get(f"/run/{name}").status_code == 404 and served.get(f"/events/{name}").status_code == 404


def test_a_damaged_run_is_a_sentence(folder):
    answer = client(folder).get("/run/bad")
    assert answer.status_code == 500 and "not a plan that can be read" in answer.text and "Traceback" not in answer.text


def test_other_sites_cannot_reach_it(folder):
    for host, code in (("127.0.0.1:8321", 200), ("localhost", 200), ("[::1]:8321", 200), ("evil.example:8321", 403)):
        assert client(folder).get("/", headers={"host": host}).status_code == code
    assert client(folder).post("/").status_code == 405


def test_a_token_where_others_can_reach_it(folder):
    served = client(folder, frozenset(), "secret", "http://10.0.0.7:8321")
    assert served.get("/").status_code == served.get("/?token=wrong").status_code == 401
    assert served.get("/events/half", cookies={"welltuned": "secre"}).status_code == 401
    answer = served.get("/?token=secret")
    assert (
        answer.status_code == 303 and answer.headers["location"] == "/" and "HttpOnly" in answer.headers["set-cookie"]
    )
    assert served.get("/").status_code == 200


def test_whether_a_run_is_at_work(folder):
    half = folder / "half"
    assert not at_work(half) and Shelf(folder).news(half)["state"].startswith("interrupted")
    host = os.uname().nodename
    (half / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": host}))
    told = Shelf(folder).news(half)
    assert at_work(half) and re.fullmatch(r"running: update \d+ of \d+, about .+ left", told["state"])
    assert told["health"] == ["healthy", "running"]
    made = len(told["curves"]["updates"]["step"])
    assert next(tile for tile in told["tiles"] if tile[0] == "updates")[1] == str(made)
    (half / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere"}))
    assert not at_work(half)
    (half / LOCK).write_text("{")
    assert not at_work(half)


def test_a_million_lines_stay_small(tmp_path):
    """A tenth of them here: what is sent does not grow."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}, "loss": {2 + i % 9}, "grad_norm": 1.0}}\n' for i in range(1, 100_001)))
    log = Log(path)
    log.follow()
    assert len(log.updates) == 100_000 and len(log.updates.names) == 3


def test_two_browsers_read_a_log_once(folder):
    """Readers at the same time, while it grows: no line counts twice, and none is lost."""
    shelf, half = Shelf(folder), folder / "half"
    (half / "metrics.jsonl").write_text("")

    def look():
        return [shelf.news(half) for _ in range(12)]

    pool = ThreadPoolExecutor(4)
    readers = [pool.submit(look) for _ in range(4)]
    with (half / "metrics.jsonl").open("a") as file:
        for first in range(0, 8_000, 500):
            file.write("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(first, first + 500)))
            file.flush()
            time.sleep(0.02)
    heard = [told for reader in readers for told in reader.result(timeout=90)]
    shelf.news(half)
    with shelf.reading(half) as (run,):
        assert run.log.updates.column("step").tolist() == list(range(8_000)) and not run.log.damaged
    assert all(one["curves"]["updates"]["step"] == sorted(set(one["curves"]["updates"]["step"])) for one in heard)


def test_what_runs_differ_in_is_listed(folder):
    other = folder / "half" / "plan.yaml"
    text = other.read_text()
    other.write_text(re.sub(r"(learning_rate:\n +value: )0.01", r"\g<1>0.02", text, count=1))
    assert other.read_text() != text
    text = client(folder).get("/compare?run=a%2Fdone&run=half").text
    table = re.search(r'<section id="compared".*?</section>', text, re.S)[0]
    assert re.findall(r"<code>([^<]+)</code>", table) == ["learning_rate"] and "<td>0.01</td>" in table
    assert "<td>0.02</td>" in table and "differ in no choice" not in table
    assert "differ in no choice" in client(folder).get("/compare?run=a%2Fdone&run=a%2Fdone").text


@pytest.mark.slow
def test_a_run_that_was_killed_is_interrupted(folder, tiny_model_dir, data_file):
    """SIGKILL in the middle of a run: whoever looks is told so, and how to go on."""
    out = folder / "killed"
    sets = ("learning_rate=1e-2", "num_train_epochs=300", "eval_steps=500", "early_stopping_patience=0")
    command = ["train", "--model", str(tiny_model_dir), "--data", data_file, "--out", str(out)]
    command += [word for text in sets for word in ("--set", text)]
    training = subprocess.Popen([sys.executable, "-m", "welltuned", *command], stderr=subprocess.DEVNULL)
    metrics = out / "metrics.jsonl"
    until = time.monotonic() + 90
    while not (metrics.is_file() and metrics.read_text().count('"loss"') > 3) and time.monotonic() < until:
        time.sleep(0.05)
    shelf = Shelf(folder)
    assert shelf.news(out)["running"]
    training.kill()
    training.wait(timeout=20)
    with metrics.open("a") as file:
        file.write('{"step": 9999, "lo')
    told = shelf.news(out)
    assert not told["running"] and told["state"].startswith("interrupted: update") and not told["finished"]
    assert "welltuned resume" in shelf.page(out) and 9999 not in told["curves"]["updates"]["step"]


def test_as_a_process(folder):
    command = [sys.executable, "-m", "welltuned", "serve", str(folder), "--port", "0"]
    served = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = next(match[0] for line in served.stderr if (match := re.search(r"http://[^ ]+/", line)))
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert b"/run/a/done" in answer.read()
    finally:
        served.send_signal(signal.SIGINT)
        assert served.wait(timeout=20) in (0, 130)


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--host", "203.0.113.7"]) == 2
    assert "cannot be listened on" in capsys.readouterr().err

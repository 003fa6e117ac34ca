"""Pages in a real browser, driven: what the eye, the keyboard and a screen reader get, and a run followed live."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from welltuned.cli.main import main
from welltuned.report.page import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromedriver") is None, reason="chromedriver is not installed"),
]
SERIOUS = ("serious", "critical")
BEYOND = """
    const far = (one) => one.getBoundingClientRect().right > arguments[0] + 0.5 && !one.closest(".scroll, nav");
    const page = document.documentElement;
    const found = [...document.querySelectorAll("body *")].filter(far).map((one) => one.outerHTML.slice(0, 200));
    return page.scrollWidth > arguments[0] ? [page.scrollWidth, ...found] : [];"""


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--force-prefers-reduced-motion",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver):
    """An empty page that complained of nothing yet."""
    driver.get("about:blank")
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.set_window_size(1200, 900)
    driver.get_log("browser")
    return driver


@pytest.fixture
def served():
    """A function that serves a folder and gives the address."""
    processes = []

    def serve(folder, *options, cwd=None):
        command = [sys.executable, "-m", "welltuned", "serve", str(folder), "--port", "0", *options]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=cwd))
        return next(match[0] for line in processes[-1].stderr if (match := re.search(r"http://[^ ]+/", line)))

    yield serve
    for process in processes:
        process.terminate()
        process.wait(timeout=20)


def complaints(browser):
    return [
        entry
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "status of 400" not in entry["message"]  # what was asked was wrong
    ]


def require_readable(browser, address):
    """No serious finding of axe, nothing wider than the screen, no complaint of the browser: in both themes and widths.

    The narrow width is a telephone's, which a window cannot be made so narrow for.
    """
    axe = pytest.importorskip("axe_core_python.selenium", reason="axe-core-python is not installed")
    for width in (1200, 390):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        if address is not None:
            browser.get(address)
        for theme in ("light", "dark"):
            browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
            browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            found = axe.Axe().run(browser)
            assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"] if v["impact"] in SERIOUS] == []
            assert browser.execute_script(BEYOND, width) == [], (width, theme)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not complaints(browser)


@pytest.mark.parametrize("kind", ["run", "swept", "preferred", "rewarded", "half a search", "evaluations", "compared"])
def test_every_report_can_be_read_by_everybody(browser, request, kind, tmp_path):
    match kind:
        case "half a search":
            place = tmp_path / "half"
            shutil.copytree(request.getfixturevalue("swept"), place)
            (place / "run.json").unlink()
            asked = json.loads((place / "sweep.json").read_text())["asked"]
            (place / "sweep.json").write_text(json.dumps({"format": 1, "asked": asked}))
            page = write_report(place)
        case "evaluations":
            place = shutil.copytree(request.getfixturevalue("run"), tmp_path / "run")
            assert main(["eval", str(place), "--rows", "6", "--metrics", "exact", "--max-new-tokens", "4"]) == 0
            require_readable(browser, (place / "report.html").as_uri())
            shutil.copytree(place / "evaluations", tmp_path / "alone" / "evaluations")
            page = write_report(tmp_path / "alone")
        case "compared":
            run = request.getfixturevalue("run")
            other = shutil.copytree(run, tmp_path / "other")
            page = write_report(run, [other], tmp_path / "both.html")
        case _:
            page = request.getfixturevalue(kind) / "report.html"
    require_readable(browser, page.as_uri())


def drawn(browser, title):
    """The columns of a chart as they are drawn."""
    script = "return charts.plots.find((one) => one.title.startsWith(arguments[0]))?.plot.data ?? [[0]]"
    return browser.execute_script(script, title)


def test_charts_hold_the_runs_numbers(browser, run, preferred, rewarded, swept, tmp_path):
    """What uPlot was given, by the run's own files: also of runs laid over each other, and of a search."""

    def lines(run, key="loss"):
        found = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
        return [line for line in found if key in line]

    def known(column):
        return [value for value in column if value is not None]

    browser.get((run / "report.html").as_uri())
    assert known(drawn(browser, "loss")[1]) == pytest.approx([line["loss"] for line in lines(run)], rel=1e-5)
    assert known(drawn(browser, "loss")[3]) == pytest.approx(
        [line["eval_loss"] for line in lines(run, "eval_loss")], rel=1e-5
    )
    browser.get((preferred / "report.html").as_uri())
    margins = known(drawn(browser, "margin")[1])
    assert margins == pytest.approx([line["rewards/margins"] for line in lines(preferred)], rel=1e-5, abs=1e-9)
    browser.get((rewarded / "report.html").as_uri())
    assert known(drawn(browser, "reward")[1]) == pytest.approx([line["reward"] for line in lines(rewarded)], rel=1e-5)
    held_out = [-line["eval_loss"] for line in lines(rewarded, "eval_loss")]
    assert known(drawn(browser, "reward")[3]) == pytest.approx(held_out, rel=1e-5)
    other = shutil.copytree(run, tmp_path / "other")
    text = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(re.sub(r'"grad_norm": [\d.e-]+', '"grad_norm": 7.5', text))
    browser.get(write_report(run, [other], tmp_path / "both.html").as_uri())
    ours, theirs = drawn(browser, "gradient norm")[1:]
    assert ours == pytest.approx([line["grad_norm"] for line in lines(run)], rel=1e-5) and set(theirs) == {7.5}
    browser.get((swept / "report.html").as_uri())
    found = json.loads((swept / "sweep.json").read_text())
    columns = drawn(browser, "held-out loss over")
    at = dict(zip(columns[0], zip(*columns[1:4], strict=True), strict=True))
    assert all(at[p["rate"]] == (p["low"], p["high"], p["loss"]) for p in found["fitted"])
    looks = [look["loss"] for arm in found["arms"] for look in arm["looks"]]
    assert sorted(value for column in columns[4:] for value in known(column)) == sorted(looks)
    assert not complaints(browser)


def test_the_keyboard_is_enough(browser, run):
    browser.set_window_size(1200, 900)
    browser.get((run / "report.html").as_uri())
    body = browser.find_element(By.TAG_NAME, "body")
    reached = []
    for _ in range(14):
        body.send_keys(Keys.TAB)
        active = browser.switch_to.active_element
        reached.append(active.get_attribute("id") or active.text)
        body = active
    assert reached[0] == "theme" and "Examples" in reached and "Provenance" in reached and "scale" in reached
    before = browser.find_element(By.ID, "scale").is_selected()
    browser.find_element(By.ID, "scale").send_keys(Keys.SPACE)
    assert browser.find_element(By.ID, "scale").is_selected() != before and not complaints(browser)


def test_a_run_is_followed_while_it_trains(browser, served, tiny_model_dir, data_file, tmp_path):
    """A real run in a process of its own: its page shows more and more updates, and in the end that it is done."""
    (tmp_path / "runs").mkdir()
    address = served(tmp_path / "runs")
    command = ["train", "--model", tiny_model_dir, "--data", data_file, "--out", tmp_path / "runs" / "one"]
    sets = ("learning_rate=1e-2", "num_train_epochs=30", "eval_steps=20", "early_stopping_patience=0")
    options = [word for text in sets for word in ("--set", text)]
    training = subprocess.Popen(
        [sys.executable, "-m", "welltuned", *map(str, command), *options], stderr=subprocess.DEVNULL
    )
    try:
        wait = WebDriverWait(browser, 300, poll_frequency=0.2)
        while training.poll() is None and not (tmp_path / "runs" / "one" / "plan.yaml").is_file():
            time.sleep(0.1)
        browser.get(address)
        browser.find_element(By.LINK_TEXT, "one").click()

        def done(driver):
            found = re.search(r"update ([\d,]+) of", driver.find_element(By.ID, "state").text)
            return int(found[1].replace(",", "")) if found else 0

        first = wait.until(lambda driver: done(driver) or None)
        assert wait.until(lambda driver: done(driver) > first)
        assert len(browser.find_elements(By.TAG_NAME, "canvas")) >= 4
        wait.until(lambda driver: "What to do next" in driver.page_source and "welltuned chat" in driver.page_source)
        assert training.wait(timeout=60) == 0
        steps = json.loads(browser.find_element(By.ID, "runs").get_attribute("textContent"))[0]["updates"]["step"]
        lines = (tmp_path / "runs" / "one" / "metrics.jsonl").read_text().splitlines()
        assert steps == [line["step"] for line in map(json.loads, lines) if "loss" in line and "event" not in line]
        assert not complaints(browser)
    finally:
        training.kill()


def test_a_run_is_planned_started_stopped_and_gone_on_with(browser, served, tiny_model_dir, data_file, tmp_path):
    """All of it with the mouse: the plan follows an edit, outlives a reload, and the run can be asked in the end."""
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.copy(data_file, tmp_path / "rows.jsonl")
    address = served(runs, "--allow-start", cwd=tmp_path)
    wait = WebDriverWait(browser, 120, poll_frequency=0.2)

    def at(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def edit(value):  # as people do; clear() by itself is a change already
        at("#choice-learning_rate").send_keys(Keys.CONTROL + "a", Keys.NULL, value, Keys.TAB)

    browser.get(address)
    browser.find_element(By.LINK_TEXT, "Plan and start a run").click()
    offered = [one.get_attribute("value") for one in browser.find_elements(By.CSS_SELECTOR, "#files option")]
    assert offered == ["rows.jsonl"]
    at("[name=model]").send_keys(str(tiny_model_dir))
    at("[name=data]").send_keys("none.jsonl")
    at("#form button").click()
    wait.until(lambda _: "none.jsonl" in at("#state").text)
    at("[name=data]").clear()
    at("[name=data]").send_keys("rows.jsonl")
    at("[name=more]").send_keys("num_train_epochs: 400\nearly_stopping_patience: 0\neval_steps: 500")
    at("#form button").click()
    wait.until(lambda _: browser.find_elements(By.ID, "choice-learning_rate"))
    edit("0.5")
    wait.until(lambda _: "learning_rate 0.5 (yours) is above" in at("#warnings").text)
    assert "GB" in at("#bytes").text or "MB" in at("#bytes").text
    browser.refresh()
    wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#choice-learning_rate.mine"))
    edit("0.01")
    wait.until(
        lambda _: (
            "learning_rate 0.5 " not in at("#warnings").text
            and at("#choice-learning_rate").get_attribute("value") == "0.01"
        )
    )
    require_readable(browser, None)
    at("[name=name]").send_keys("one", Keys.ENTER)
    wait.until(lambda _: browser.current_url.endswith("/run/one"))
    wait.until(lambda _: re.search(r"running: update [1-9]", at("#state").text))
    at("#stop").click()
    wait.until(lambda _: at("#resume").is_displayed() and "interrupted" in at("#state").text)
    assert "at work" not in at("#answer").text and not at("#stop").is_displayed()
    stopped = len((runs / "one" / "metrics.jsonl").read_text().splitlines())
    at("#resume").click()
    wait.until(lambda _: "running" in at("#state").text and at("#stop").is_displayed())
    wait.until(lambda _: len((runs / "one" / "metrics.jsonl").read_text().splitlines()) > stopped)
    at("#stop").click()
    wait.until(lambda _: at("#resume").is_displayed())
    assert not complaints(browser)


def test_a_finished_run_is_asked_beside_its_base(browser, served, run, tmp_path):
    shutil.copytree(run, tmp_path / "one")
    browser.get(served(tmp_path, "--allow-start") + "run/one")
    wait = WebDriverWait(browser, 120, poll_frequency=0.2)
    browser.find_element(By.CSS_SELECTOR, "#ask [name=prompt]").send_keys("<b>2 times the red hat")
    browser.find_element(By.CSS_SELECTOR, "#ask button").click()
    both = [browser.find_element(By.ID, name) for name in ("base", "tuned")]
    wait.until(lambda _: all(one.text not in ("", "thinking …") for one in both))
    assert both[0].text != both[1].text and "chat" not in both[0].text
    require_readable(browser, None)


def test_the_list_is_sorted_and_compares(browser, served, run, tmp_path):
    for name in ("b", "a"):
        shutil.copytree(run, tmp_path / name)
    text = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(text[: len(text) // 2]))
    (tmp_path / "a" / "run.json").unlink()
    address = served(tmp_path)
    require_readable(browser, address)
    browser.get(address)

    def column(number):
        return [
            row.find_elements(By.CSS_SELECTOR, "td, th")[number].text
            for row in browser.find_elements(By.CSS_SELECTOR, "tbody tr")
        ]

    assert column(1) == ["a", "b"] and column(2) == ["interrupted", "healthy"]
    head = next(b for b in browser.find_elements(By.CSS_SELECTOR, "th button") if b.text == "updates")
    head.click()
    assert column(1) == ["a", "b"]
    head.click()
    assert column(1) == ["b", "a"]
    assert not browser.find_element(By.ID, "compare").is_enabled()
    for box in browser.find_elements(By.CSS_SELECTOR, "input[type=checkbox]"):
        box.click()
    browser.find_element(By.ID, "compare").click()
    WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#compared td"))
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script("return document.readyState") == "complete")
    assert len(drawn(browser, "gradient norm")) == 3
    assert not complaints(browser)


def test_two_browsers_and_a_reload(browser, served, run, tmp_path):
    """Both see what is new, and one that reloads sees all of it."""
    half = shutil.copytree(run, tmp_path / "half")
    (half / "run.json").unlink()
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(lines[:9]))
    address = served(tmp_path) + "run/half"
    wait = WebDriverWait(browser, 60, poll_frequency=0.2)
    browser.get(address)
    first = browser.current_window_handle
    browser.switch_to.new_window("window")
    second = browser.current_window_handle
    browser.get(address)
    with (half / "metrics.jsonl").open("a") as file:
        file.write("".join(lines[9:14]))
    seen = []
    for window in (first, second):
        browser.switch_to.window(window)
        wait.until(lambda _: drawn(browser, "gradient norm")[0][-1] == json.loads(lines[13])["step"])
        seen.append(drawn(browser, "loss"))
    assert seen[0] == seen[1]
    browser.refresh()
    wait.until(lambda _: "interrupted" in browser.find_element(By.ID, "state").text)
    assert drawn(browser, "loss") == seen[1]
    browser.close()
    browser.switch_to.window(first)
    assert not complaints(browser)

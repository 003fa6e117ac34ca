"""Pages in a real browser, driven: what the eye, the keyboard and a screen reader get, and a run followed live."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromedriver") is None, reason="chromedriver is not installed"),
]
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def served():
    """A function that serves a folder and gives the address."""
    processes = []

    def serve(folder):
        command = [sys.executable, "-m", "welltuned", "serve", str(folder), "--port", "0"]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return next(match[0] for line in processes[-1].stderr if (match := re.search(r"http://[^ ]+/", line)))

    yield serve
    for process in processes:
        process.terminate()
        process.wait(timeout=20)


def complaints(browser):
    return [
        entry
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "favicon" not in entry["message"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_report_can_be_read_by_everybody(browser, run, theme, width):
    """No serious finding of axe, nothing wider than the screen, and no complaint of the browser."""
    axe = pytest.importorskip("axe_core_python.selenium", reason="axe-core-python is not installed")
    browser.set_window_size(width, 900)
    browser.get((run / "report.html").as_uri())
    browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    found = axe.Axe().run(browser)
    assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"] if v["impact"] in SERIOUS] == []
    wide = browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0 and not complaints(browser)


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
    sets = ("learning_rate=1e-2", "num_train_epochs=60", "eval_steps=20", "early_stopping_patience=0")
    options = [word for text in sets for word in ("--set", text)]
    training = subprocess.Popen(
        [sys.executable, "-m", "welltuned", *map(str, command), *options], stderr=subprocess.DEVNULL
    )
    try:
        wait = WebDriverWait(browser, 120, poll_frequency=0.2)
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

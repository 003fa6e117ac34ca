"""tools/site.py: pages are laid out with what they link to; one that leads nowhere or loads something is found."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_tool", ROOT / "tools" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, **pages):
    for name, text in pages.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


# ── laying out ──


def test_everything_that_the_pages_link_to_is_there(site, tmp_path):
    assert site.lay_out(ROOT, tmp_path) == []
    assert (tmp_path / "benchmarks" / "results" / "sft_cpu.json").is_file()
    assert (tmp_path / "docs" / "tutorial.md").is_file() and (tmp_path / "notebooks" / "first_run.md").is_file()


@pytest.mark.parametrize("link", ["nowhere.md", "../outside.md", "folder"])
def test_a_link_to_nothing_is_named(site, tmp_path, link):
    (tmp_path / "root" / "folder").mkdir(parents=True)
    write(tmp_path / "root", README_md=f"[a]({link})")
    (wrong,) = site.lay_out(tmp_path / "root", tmp_path / "out")
    assert wrong.startswith("README.md: ")


def test_links_in_code_are_no_links(site, tmp_path):
    write(tmp_path / "root", README_md="```\n[a](nowhere.md)\n```\n[b](https://example.org/x)\n[c](#here)\n")
    assert site.lay_out(tmp_path / "root", tmp_path / "out") == []


def test_a_notebook_becomes_a_page(site):
    stream = {"output_type": "stream", "name": "stdout", "text": ["4\n"]}
    value = {"output_type": "execute_result", "data": {"text/plain": ["5"]}}
    code = {"cell_type": "code", "source": ["2 + 2"], "outputs": [stream, value]}
    cells = [{"cell_type": "markdown", "source": ["# T\n", "x"]}, code]
    assert site.as_markdown({"cells": cells}) == "# T\nx\n\n```python\n2 + 2\n```\n\n```text\n4\n5\n```\n"


# ── the finished pages ──

SOUND = '<h1 id="top">A</h1><a href="b.html#x">b</a><a href="https://example.org">there</a><img src="data:image/png;,">'


def test_sound_pages_have_no_faults(site, tmp_path):
    write(tmp_path, a_html=SOUND, b_html='<p id="x"></p><link rel="canonical" href="https://example.org/">')
    assert site.faults(tmp_path) == []


@pytest.mark.parametrize(
    "planted",
    [
        '<a href="c.html">',
        '<a href="a.html#nothing">',
        '<a href="#nothing">',
        '<img src="a.png">',
        '<img src="https://example.org/a.png">',
        '<script src="//example.org/a.js"></script>',
        '<link rel="stylesheet" href="https://example.org/a.css">',
        '<link rel="preconnect" href="https://example.org">',
        "<style>@font-face { src: url(https://example.org/a.woff2) }</style>",
        '<p style="background: url(https://example.org/a.png)">',
    ],
)
def test_a_planted_fault_is_found(site, tmp_path, planted):
    write(tmp_path, a_html=SOUND + planted, b_html='<p id="x"></p>')
    assert len(site.faults(tmp_path)) == 1


@pytest.mark.parametrize(
    "rule", ['@import "https://example.org/a.css";', "p { background: url('//example.org/a.png') }"]
)
def test_what_a_style_sheet_loads_is_found(site, tmp_path, rule):
    write(tmp_path, a_css=rule)
    assert len(site.faults(tmp_path)) == 1


# ── in a browser ──


@pytest.mark.slow
def test_the_pages_open_from_disk_and_ask_no_network(site, tmp_path):
    """Start and tutorial in Chromium: no complaint, no request but for files, and the search finds a page."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if shutil.which("chromedriver") is None:
        pytest.skip("chromedriver is not installed")
    if not (ROOT / "build" / "site" / "index.html").is_file():
        pytest.skip("the documentation is not built: make docs")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        for name in ("index.html", "docs/tutorial.html", "docs/hyperparameters.html"):
            browser.get((ROOT / "build" / "site" / name).as_uri())
            assert browser.find_element("tag name", "h1").text
        asked = [
            entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]
        ]
        assert len(asked) > 3 and not [message for message in asked if '"url":"http' in message]
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        assert browser.execute_script("return typeof window.IFrameWorker") == "function"
    finally:
        browser.quit()

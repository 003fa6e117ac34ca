"""The pictures of docs/, made again: the report and the live page in both themes, and the report of a search.

    python tools/screenshots.py DEMO_RUN [SWEEP_RUN]

DEMO_RUN is what `welltuned demo` wrote, SWEEP_RUN what `welltuned sweep` wrote. Both are copied to a folder of their
own first, and paths of this machine are taken out of the copies. The live page is the demo's run as it stood after half
of its updates. Needs chromedriver, selenium and pillow.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver

from welltuned.report.page import write_report
from welltuned.training.lock import LOCK

WIDTH, MOST_BYTES = 1120, 250_000
TEXTS = ("plan.yaml", "recipe.yaml", "run.json", "shown.json", "started.json", "sweep.json")


def copied(run: Path, name: str) -> Path:
    """A copy in the present folder, where files and models go by their last name alone."""
    to = Path(name)
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "adapter", "report.html", LOCK))
    for path in (to / text for text in TEXTS):
        if path.is_file():
            path.write_text(re.sub(r"(?<![\w.~])/(?:[^\s\"':,/]+/)+(?=[^\s\"':,/])", "", path.read_text()))
    return to


def half_way(run: Path) -> Path:
    """The same run as it stood after half of its updates, at work: this process stands for the one that trained it."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    made = [i for i, line in enumerate(lines) if '"loss"' in line]
    (run / "metrics.jsonl").write_text("".join(lines[: made[len(made) // 2] + 1]))
    (run / "run.json").unlink()
    shown = json.loads((run / "shown.json").read_text())
    shown.pop("scores", None)
    shown["replies"] = [{k: v for k, v in reply.items() if k != "after"} for reply in shown.get("replies") or []]
    (run / "shown.json").write_text(json.dumps(shown))
    (run / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
    return run


@contextmanager
def served(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "welltuned", "serve", str(folder), "--allow-start", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        yield next(match[0] for line in server.stderr if (match := re.search(r"http://[^ ]+/", line)))
    finally:
        server.terminate()
        server.wait(timeout=20)


@contextmanager
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def take(driver: Any, address: str, path: Path, height: int, *, dark: bool = False) -> None:
    """The top of a page as a PNG of few colours."""
    theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
    size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(address)
    time.sleep(2.5)  # a served page hears of the run first
    data = b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])
    Image.open(io.BytesIO(data)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")
    assert path.stat().st_size < MOST_BYTES, "too large for a page"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("sweep", type=Path, nargs="?", help="where it is left out, its picture stays as it is")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    given = parser.parse_args()
    demo, out = given.demo.resolve(), given.out.resolve()
    sweep = None if given.sweep is None else given.sweep.resolve()
    with tempfile.TemporaryDirectory() as place, chdir(place), browser() as driver:
        address = write_report(copied(demo, "demo-run")).resolve().as_uri()
        take(driver, address, out / "report.png", 1800)
        take(driver, address, out / "report_dark.png", 1800, dark=True)
        if sweep is not None:
            take(driver, write_report(copied(sweep, "tickets-sweep")).resolve().as_uri(), out / "sweep.png", 1500)
        Path("runs").mkdir()
        half_way(copied(demo, "runs/demo-run"))
        with served(Path("runs")) as address:
            take(driver, f"{address}run/demo-run", out / "live.png", 1200)
            take(driver, f"{address}run/demo-run", out / "live_dark.png", 1200, dark=True)


if __name__ == "__main__":
    main()

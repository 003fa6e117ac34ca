"""A page of a million updates: how long its log takes to read, what a browser is sent, and how long it draws.

    python benchmarks/report_scale.py RUN

RUN is any finished run: its metrics are replaced, in a copy, by a million lines with as many numbers each. The browser
part needs chromedriver and selenium and is left out without them.
"""

import argparse
import json
import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, describe_machine, write_result

from welltuned.report.live import Shelf
from welltuned.report.page import embedded

LINES, MORE = 1_000_000, 100


def lines(first: int, last: int) -> str:
    """Updates as a run tells them: a loss that falls and is noisy, and a held-out loss every ten thousandth."""
    draw = np.random.default_rng(first)
    out = []
    for step, noise in zip(range(first, last + 1), draw.standard_normal(last - first + 1).tolist(), strict=True):
        line = {"step": step, "loss": 1 + 2 * step**-0.2 + 0.1 * noise, "learning_rate": 1e-4, "grad_norm": noise**2}
        line |= {"tokens": 4096, "supervised_tokens": 1024, "tokens_per_second": 9e3, "epoch": step / 1e5}
        line |= {"memory_bytes": 8_000_000_000, "weight_change": step / 1e8}
        if step % 10_000 == 0:
            line |= {"eval_loss": 1 + 2 * step**-0.2, "eval_loss_se": 0.01}
        out.append(json.dumps(line))
    return "\n".join(out) + "\n"


def timed(what: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    made = what()
    return time.perf_counter() - started, made


def in_a_browser(page: Path, news: dict[str, Any]) -> dict[str, float]:
    """Milliseconds until all is drawn, of an update with what is new, and of a zoom."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(page.as_uri())
        drawn = driver.execute_script("return performance.timing.loadEventEnd - performance.timing.navigationStart")
        script = "const t = performance.now(); run.update(arguments[0]); return performance.now() - t"
        updates = [driver.execute_script(script, news["curves"]) for _ in range(5)]
        script = """
            const plot = charts.plots[0].plot, times = [];
            for (let i = 0; i < 20; i++) {
              const t = performance.now();
              plot.setScale("x", { min: i * 1e4, max: i * 1e4 + 2e5 });
              await new Promise((done) => requestAnimationFrame(done));
              times.push(performance.now() - t);
            }
            return times;"""
        zooms = driver.execute_script(script)
    finally:
        driver.quit()
    return {"drawn_ms": drawn, "update_ms": float(np.median(updates)), "zoom_ms": float(np.median(zooms))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        shutil.copytree(arguments.run, run, ignore=shutil.ignore_patterns("checkpoints", "adapter", "run.json"))
        metrics = run / "metrics.jsonl"
        metrics.write_text(lines(1, arguments.lines))
        shelf = Shelf(Path(place))
        first, text = timed(lambda: shelf.page(run))
        again, _ = timed(lambda: shelf.page(run))
        with metrics.open("a") as file:
            file.write(lines(arguments.lines + 1, arguments.lines + MORE))
        following, news = timed(lambda: shelf.news(run))
        page = Path(place) / "page.html"
        page.write_text(text)
        found = {
            "machine": describe_machine(),
            "lines": arguments.lines,
            "metrics_bytes": metrics.stat().st_size,
            "first_page_seconds": first,
            "second_page_seconds": again,
            "following_seconds": following,
            "page_bytes": len(text.encode()),
            "event_bytes": len(embedded(news)),
            "browser": in_a_browser(page, news) if find_spec("selenium") and shutil.which("chromedriver") else None,
        }
    write_result("report_scale", found, arguments.out)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

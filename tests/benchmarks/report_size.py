"""Size of the report of a 70B-sized scan and run (80 blocks of 7 matrices), and when a browser has drawn it, as JSON.

    python tests/benchmarks/report_size.py [--blocks 80] [--opens 5]

Needs an installed Chromium. Each opening is in a window of its own; the time is from the start of loading to the
last chart, the middle one of all openings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[2]))

from splaser_plugin.artifacts.report import write_report
from splaser_plugin.artifacts.results import Results
from tests.artifacts.browser import CHROMIUM_FLAGS, CHROMIUM_NAMES, DRAWN, wait_for
from tests.report_data import LARGE, made_up_results, made_up_scan


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--blocks", type=int, default=80)
    options.add_argument("--opens", type=int, default=5)
    given = options.parse_args()
    scan = made_up_scan(given.blocks, LARGE)
    run = Results.from_dict(made_up_results(scan, pairs=128, held_out=64))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "report.html"
        started = time.perf_counter()
        write_report(page, scan, run)
        written_s = time.perf_counter() - started
        chromium = next(filter(None, map(shutil.which, CHROMIUM_NAMES)))
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        drawn = []
        for _ in range(given.opens):
            window = browser.new_page(viewport={"width": 1200, "height": 900})
            window.goto(page.as_uri())
            wait_for(window, DRAWN)
            drawn.append(window.evaluate("performance.getEntriesByName('drawn')[0].startTime"))
            window.close()
        result = {
            "matrices": len(scan.matrices),
            "bytes": page.stat().st_size,
            "written_s": round(written_s, 2),
            "drawn_ms": round(statistics.median(drawn)),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Fixtures of the tests that open a report in a real Chromium."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from splaser_plugin.artifacts.report import report
from splaser_plugin.files.json import write_json
from tests.artifacts.browser import CHROMIUM_FLAGS, CHROMIUM_NAMES, DRAWN, SCAN, Opened, wait_for
from tests.report_data import made_up_results


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    assert path, "the browser tests need Chromium: apt-get install chromium, or leave them out with -m 'not browser'"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Open a report's file; at the end of the test it must have asked for nothing, and not complained."""
    opened = []

    def start(path: Path, *, width: int = 1200, **options: Any) -> Opened:
        context = chromium.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        it = Opened(context.new_page())
        opened.append((context, it))
        it.page.set_default_timeout(20_000)
        it.page.on("console", lambda message: it.complaints.append(message.text))
        it.page.on("pageerror", lambda error: it.complaints.append(str(error)))
        it.page.on("request", lambda request: it.requests.append(request.url))
        it.page.goto(path.as_uri())
        wait_for(it.page, DRAWN)
        return it

    yield start
    for context, it in opened:
        assert it.complaints == []
        assert [url for url in it.requests if not url.startswith(("file:", "data:"))] == []
        assert sum(url.startswith("file:") for url in it.requests) == 1
        context.close()


@pytest.fixture(scope="module")
def run_page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    SCAN.save(folder / "scan.json")
    write_json(folder / "results.json", made_up_results(SCAN))
    return report(folder, folder / "report.html").resolve()

"""How tests and benchmarks open a report in an installed Chromium."""

from __future__ import annotations

from typing import Any

import pytest

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    "--disable-gpu",
]
DRAWN = "document.querySelectorAll('#heat-map .hm image, #heat-map .hm path').length > 0"


def wait_for(page: Any, expression: str, arg: Any = None) -> None:
    """Playwright's own waiting evaluates text inside the page, which the report's policy forbids."""
    for _ in range(1000):
        if page.evaluate(expression, arg):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"never came true: {expression}")

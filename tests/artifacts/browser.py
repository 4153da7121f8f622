"""How tests and benchmarks open a report in an installed Chromium."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.report_data import made_up_scan

SCAN = made_up_scan(6)
"""What the report in the browser is about."""
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


@dataclass
class Opened:
    """A report that is open in a browser, and what it did that no report may."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return " ".join(self.page.locator(selector).first.text_content().split())

    @property
    def matrix(self) -> str:
        """The one whose spectrum is shown, by the picker."""
        return self.page.eval_on_selector("#matrix", "picker => picker.selectedOptions[0].textContent")

    def wait_for_matrix(self, name: str) -> None:
        """Until its spectrum is shown."""
        wait_for(self.page, "name => document.getElementById('matrix').selectedOptions[0].textContent === name", name)

    def scroll_to_cell(self, x: int, y: int) -> tuple[float, float]:
        """Where it is in the window then, in pixels."""
        found = self.page.evaluate(
            """async ([x, y]) => {
                const drawn = document.getElementById("heat-map");
                drawn.scrollIntoView({block: "center"});
                await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
                const box = drawn.getBoundingClientRect();
                const { xaxis, yaxis } = drawn._fullLayout;
                return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)];
            }""",
            [x, y],
        )
        return found[0], found[1]

    def hover_heat_map(self, x: int, y: int, hovered: str) -> None:
        """Point at a cell, and wait until the text that appears begins with `hovered`."""
        place = self.scroll_to_cell(x, y)
        self.page.mouse.move(place[0] - 2, place[1])
        self.page.mouse.move(*place)
        wait_for(
            self.page,
            "hovered => document.querySelector('#heat-map .hoverlayer').textContent.startsWith(hovered)",
            hovered,
        )

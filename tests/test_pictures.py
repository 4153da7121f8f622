"""The pictures of README: small, complete in themselves, of the run that README shows, and drawn anew by a command."""

from __future__ import annotations

import importlib.util
import re
from html import unescape

import pytest
from PIL import Image

from splaser_plugin.artifacts.report import write_report
from splaser_plugin.artifacts.results import Results
from tests.builders import ROOT
from tests.report_data import made_up_results, made_up_scan

PICTURES = sorted((ROOT / "docs" / "pictures").iterdir())
README = (ROOT / "README.md").read_text(encoding="utf-8")


def drawing():
    """docs/draw_pictures.py as a module."""
    found = importlib.util.spec_from_file_location("draw_pictures", ROOT / "docs" / "draw_pictures.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_pictures_are_small_and_all_in_readme():
    assert {picture.name for picture in PICTURES} == {"report_dark.png", "report_light.png", "terminal.svg"}
    assert max(picture.stat().st_size for picture in PICTURES) < 120_000
    assert sum(picture.stat().st_size for picture in PICTURES) < 250_000
    assert all(f"](docs/pictures/{picture.name})" in README for picture in PICTURES)


def shown_in(svg):
    return unescape(" ".join(re.findall(r">([^<>]+)</text>", svg))).replace("\xa0", " ")


def test_the_terminal_is_the_run_that_readme_shows_and_loads_nothing():
    svg = (ROOT / "docs" / "pictures" / "terminal.svg").read_text(encoding="utf-8")
    assert not re.search(
        r"@font-face|url\((?!#)|https?://(?!www\.w3\.org/)", svg.replace("https://www.textualize.io", "")
    )
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|usr)/", shown_in(svg))
    printed = README.split("```text\n")[1].split("```")[0]
    numbers = re.findall(r"[+-]\d\.\d{4}", printed)
    assert len(numbers) > 10
    assert set(numbers) <= set(re.findall(r"[+-]\d\.\d{4}", shown_in(svg)))


def test_a_terminal_is_drawn_as_it_is_at_the_end():
    output = b"gone\r\x1b[2Kfirst\r\n\x1b[1;32mkept\x1b[0m <b>"
    svg = drawing().draw_terminal(output, "a title")
    assert shown_in(svg).split() == ["a", "title", "first", "kept", "<b>"]
    assert len(set(re.findall(r"\.terminal-r\d+ \{ fill: (#\w+)", svg))) == 2


@pytest.mark.browser
def test_a_report_is_drawn_in_light_and_in_dark(tmp_path):
    scan = made_up_scan(6)
    write_report(tmp_path / "report.html", scan, Results.from_dict(made_up_results(scan)))
    drawing().draw_report(tmp_path / "report.html", tmp_path)
    corners = {}
    for scheme in ("light", "dark"):
        with Image.open(tmp_path / f"report_{scheme}.png") as image:
            assert image.width == 1000 and image.height > 400
            corners[scheme] = sum(image.convert("RGB").getpixel((3, 3)))
    assert corners["light"] > 600 > 150 > corners["dark"]

"""The pictures of README, from a run of the demo: `python docs/draw_pictures.py` (some minutes; needs Chromium).

The terminal is what `splaser demo` prints in a pseudo-terminal, as rich draws it; the report is what Chromium shows.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pyte
from PIL import Image
from rich.console import Console
from rich.text import Text

from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.artifacts.report import render
from splaser_plugin.artifacts.results import Results
from splaser_plugin.scanning.records import Scan

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
COLUMNS, LINES = 104, 60
COLORS = 64
"""Of a picture of the report: enough for text and maps, and small."""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SHOTS = {"light": ("body > header", "#happened"), "dark": ("#noise", "#train")}
"""Colour scheme to what the picture begins with, and what it ends before."""


def printed(command: list[str]) -> bytes:
    """All that a command prints to a pseudo-terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment["TERM"] = "xterm-256color"
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        parts = []
        with suppress(OSError):  # how Linux says that nobody writes any more
            while part := os.read(ours, 65536):
                parts.append(part)
    os.close(ours)
    if running.returncode:
        sys.exit(f"{command[0]} failed: {b''.join(parts)[-2000:].decode(errors='replace')}")
    return b"".join(parts)


def draw_terminal(output: bytes, title: str) -> str:
    """The screen as it is at the end, as SVG that loads nothing."""
    screen = pyte.Screen(COLUMNS, LINES)
    pyte.ByteStream(screen).feed(output)
    lines = [_line(screen.buffer[row]) for row in range(LINES)]
    while lines and not lines[-1].plain.strip():
        lines.pop()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(line, overflow="crop", no_wrap=True)
    svg = console.export_svg(title=title, unique_id="terminal")
    return re.sub(r"@font-face \{.*?\}\n?", "", svg, flags=re.DOTALL)


def _line(row: Any) -> Text:
    text = Text()
    for style, chars in groupby((row[column] for column in range(COLUMNS)), key=_style):
        text.append("".join(char.data for char in chars), style)
    text.rstrip()
    return text


def _style(char: Any) -> str:
    """pyte's colour of a character as rich calls it, and whether it is bold."""
    color = "" if char.fg == "default" else char.fg.replace("brown", "yellow")
    color = f"#{color}" if re.fullmatch(r"[0-9a-f]{6}", color) else re.sub("^bright", "bright_", color)
    return f"{'bold ' if char.bold else ''}{color}".strip()


def draw_report(page: Path, folder: Path) -> None:
    """Pictures of a report in light and in dark."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        sys.exit("the pictures need Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for scheme, (first, end) in SHOTS.items():
            shown: Any = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme=scheme)
            shown.goto(page.as_uri())
            shown.wait_for_selector("#heat-map .hm image, #heat-map .hm path", state="attached")
            top, bottom = (shown.locator(place).bounding_box()["y"] for place in (first, end))
            clip = {"x": 0, "y": top, "width": 1000, "height": bottom - top}
            image = Image.open(io.BytesIO(shown.screenshot(full_page=True, clip=clip)))
            image.convert("RGB").quantize(COLORS).save(folder / f"report_{scheme}.png", optimize=True)
            shown.close()
        browser.close()


def public_report(folder: Path) -> str:
    """The report of the demo with public names instead of this machine's paths, and without its duration here."""
    scan, run = Scan.load(folder / "scan.json"), Results.load(folder / "results.json")
    settings = Recipe.load(folder / "recipe.json").settings
    scan = replace(scan, model="HuggingFaceTB/SmolLM2-135M-Instruct")
    held_out = replace(run.held_out, split=run.held_out.split.replace(f"{ROOT}/", ""))
    pairs = replace(run.pairs, source="examples/data/pairs.jsonl")
    run = replace(run, model=scan.model, pairs=pairs, held_out=held_out, elapsed_s=None)
    return render(scan, run, settings={**settings, "embedder": "sentence-transformers/all-MiniLM-L6-v2"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=ROOT / "splaser-demo", help="where the demo's run is written")
    folder = parser.parse_args().demo
    PICTURES.mkdir(exist_ok=True)
    cache = ROOT / ".cache"
    words = ["demo", "-o", str(folder), "--cache", str(cache), "--overwrite"]
    output = printed([sys.executable, "-m", "splaser_plugin", *words])
    for parent in (folder.resolve().parent, cache.resolve().parent, ROOT):
        output = output.replace(f"{parent}/".encode(), b"")
    svg = draw_terminal(output, "splaser demo")
    (PICTURES / "terminal.svg").write_text(svg, encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary) / "report.html"
        page.write_text(public_report(folder), encoding="utf-8")
        draw_report(page, PICTURES)


if __name__ == "__main__":
    main()

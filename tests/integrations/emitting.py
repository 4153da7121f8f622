"""Running `splaser emit` on the stored scan of SmolLM2."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from splaser_plugin.cli.emit import app
from splaser_plugin.scanning.selection import choose
from splaser_plugin.scanning.spectrum_format import load_scan

DATA = Path(__file__).parents[1] / "data"
SCAN = DATA / "smollm2_scan.json"
PAIR = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "No."}
MESSAGES = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "An apple."}]
TURNS = [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "An apple."}]


def emit(command: str, *more: str, scan: str = "scan.json") -> str:
    """What the command prints; its errors are raised."""
    tool, *options = command.split()
    result = CliRunner().invoke(app, [tool, scan, *options, *more])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def chosen(**options) -> list[str]:
    """The names chosen by these options, by default a tenth of each type."""
    return choose(load_scan(SCAN), **({"fraction": 0.1} | options)).names

"""The working folder of a user who emits configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from splaser_plugin.errors import on_command_line
from tests.integrations.emitting import DATA, PAIR, SCAN


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The working folder, with a scan, data and files of a user's own. Errors name options as flags."""
    (tmp_path / "scan.json").write_bytes(SCAN.read_bytes())
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    for base in DATA.glob("emit/base_*.yml"):
        (tmp_path / base.name).write_bytes(base.read_bytes())
    monkeypatch.chdir(tmp_path)
    with on_command_line():
        yield tmp_path

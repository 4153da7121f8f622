"""The table of tests/benchmarks/lasering.py: its rows are those of the searches, and none is searched again."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import lasering
from tests.builders import EXAMPLE_PAIRS, save_rows

pytestmark = pytest.mark.slow


def test_a_row_is_searched_once_and_says_what_the_run_says(tiny_folder, tmp_path, capsys, monkeypatch):
    sizes = ["--searched", "12", "--held-out", "8", "--candidates", "2"]
    rows = [json.loads(line) for line in EXAMPLE_PAIRS.read_text(encoding="utf-8").splitlines()]
    files = [str(save_rows(tmp_path / name, part)) for name, part in (("a.jsonl", rows[:14]), ("b.jsonl", rows[14:]))]
    words = ["--model", str(tiny_folder), "--pairs", *files, "--output", str(tmp_path), *sizes]
    lasering.main([*words, "--rows", "margin improve", "margin confident"])
    printed = capsys.readouterr().out
    (improve,) = [line for line in printed.splitlines() if line.startswith("| margin improve ")]
    verdict = json.loads((tmp_path / "margin-improve" / "results.json").read_text())["held_out"]
    low, high = verdict["interval"]
    assert "| 12 | " in improve and f"| 8 | {verdict['difference']:+.4f} ({low:+.4f} to {high:+.4f}) |" in improve
    monkeypatch.setattr(lasering, "laser", lambda *args, **options: pytest.fail("searched again"))
    lasering.main([*words, "--rows", "margin improve", "margin confident"])
    assert capsys.readouterr().out == printed
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["settings"].startswith(
        f"--pairs {files[0]} {files[1]}, "
    )
    with pytest.raises(SystemExit, match=r"measured with .*--searched 12, .*Give these options, or another folder"):
        lasering.main([*words, "--searched", "10"])

"""tests/benchmarks/reduction.py: what its file of measurements may hold."""

from __future__ import annotations

import pytest

from tests.benchmarks.reduction import main


def run(measured, *options):
    main(["--text", "notes.txt", "--measured", str(measured), "--methods", *options])


def test_measurements_of_other_options_are_refused(tmp_path):
    measured = tmp_path / "measured.jsonl"
    run(measured)
    run(measured, "--threads", "1")
    with pytest.raises(SystemExit, match=r"--calibration-tokens 12288.* Give these options, or another file"):
        run(measured, "--calibration-tokens", "4096")


def test_measurements_whose_options_are_unknown_are_refused(tmp_path):
    measured = tmp_path / "measured.jsonl"
    measured.touch()
    with pytest.raises(SystemExit, match="measured with options that nobody noted"):
        run(measured)

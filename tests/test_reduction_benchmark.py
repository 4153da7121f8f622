"""tests/benchmarks/reduction.py: what its file of measurements may hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tests.benchmarks.reduction import main
from tests.benchmarks.reduction_rows import Row, compared


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


def test_measurements_with_other_options_are_compared_window_by_window():
    random = np.random.default_rng(0)
    hard, gain = random.exponential(1, 20), random.normal(0.1, 0.01, 20)

    def rows(losses):
        settled = {"removed": 0.1, "standard_error": 0.0, "predicted": None, "bytes": 1, "seconds": {}, "peak_bytes": 1}
        return {("fisher", 0.1): Row("fisher", 0.1, loss=float(losses.mean()), windows=losses.tolist(), **settled)}

    low, high = stats.ttest_rel(hard - gain, hard).confidence_interval()
    assert f"fisher, 10%: {-gain.mean():+.4f} ({low:+.4f} to {high:+.4f})" in compared(rows(hard - gain), rows(hard))
    assert "fisher" not in compared(rows(hard), rows(hard[:10]))

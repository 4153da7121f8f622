"""docs/reliability.md names tests that exist, for each of its rows."""

from __future__ import annotations

import re

from tests.builders import ROOT

TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_the_table_of_faults_names_exists():
    named = re.findall(r"`(\w+\.py)::(\w+)`", TEXT)
    assert len(named) > 30
    for file, test in named:
        found = next((ROOT / "tests").rglob(file))
        assert f"\ndef {test}(" in found.read_text(encoding="utf-8"), f"{file}::{test}"


def test_every_row_of_faults_names_its_test():
    faults = TEXT.partition("## Load")[0]
    rows = [line for line in faults.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| Fault"))]
    without = [row for row in rows if "::test_" not in row and not row.startswith("| Claim")]
    assert without == []

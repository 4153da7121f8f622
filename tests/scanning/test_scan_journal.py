"""The journal of an unfinished scan: what was written comes back, what is damaged or of another scan doesn't."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splaser_plugin.errors import OutputError
from splaser_plugin.scanning.journal import ScanJournal
from tests.builders import files_of_at_most

SETTINGS = {"weights": "abc", "precision": "auto", "version": "1"}
RECORDS = [{"name": f"layers.{number}.w", "spectrum": [1.5, number / 7]} for number in range(5)]


def left_by_an_earlier_scan(output, records=RECORDS, **changes):
    """A journal as a killed scan leaves it."""
    journal = ScanJournal(output, {**SETTINGS, **changes})
    journal.resume(dict)
    journal.append(records[:2])
    journal.append(records[2:])
    journal.close()
    return journal.path


def resumed(output):
    journal = ScanJournal(output, SETTINGS)
    try:
        return journal.resume(dict)
    finally:
        journal.close()


def test_records_come_back_in_their_order(tmp_path):
    path = left_by_an_earlier_scan(tmp_path / "scan.json")
    assert path == tmp_path / "scan.json.journal.jsonl"
    assert resumed(tmp_path / "scan.json") == RECORDS
    assert resumed(tmp_path / "scan.json") == RECORDS


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_a_journal_cut_anywhere_gives_its_whole_lines_and_goes_on_after_them(tmp_path, share):
    output = tmp_path / "scan.json"
    path = left_by_an_earlier_scan(output)
    content = path.read_bytes()
    cut = content[: round(share * len(content))]
    path.write_bytes(cut)
    whole = RECORDS[: cut.count(b"\n")]
    journal = ScanJournal(output, SETTINGS)
    found = journal.resume(dict)
    if content.startswith(cut + b"\n"):  # all but the line's end was written
        whole = RECORDS[: len(whole) + 1]
    assert found == whole
    journal.append(RECORDS[len(whole) :])
    journal.close()
    assert resumed(output) == RECORDS
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [b"\x00" * 100, b"\xff\xfe", b"[" * 100_000, b"7", b'{"record": {}}', b"\n\n"],
    ids=["zeros", "no UTF-8", "nested", "no object", "no schema", "empty"],
)
def test_a_damaged_line_among_good_ones_is_passed_over(tmp_path, damage):
    path = left_by_an_earlier_scan(tmp_path / "scan.json")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage + b"\n", *lines[2:]]))
    assert resumed(tmp_path / "scan.json") == RECORDS


@pytest.mark.parametrize("changes", [{"weights": "def"}, {"precision": "float32"}, {"version": "2"}])
def test_records_of_other_weights_or_settings_are_not_used_and_the_difference_is_known(tmp_path, changes):
    output = tmp_path / "scan.json"
    path = left_by_an_earlier_scan(output, **changes)
    journal = ScanJournal(output, SETTINGS)
    assert journal.resume(dict) == []
    assert journal.other_settings == tuple(changes)
    assert path.stat().st_size == 0
    journal.append(RECORDS)
    journal.close()
    assert resumed(output) == RECORDS


def test_a_second_scan_on_the_same_output_is_refused_and_harms_nothing(tmp_path):
    output = tmp_path / "scan.json"
    first = ScanJournal(output, SETTINGS)
    first.resume(dict)
    first.append(RECORDS[:1])
    with pytest.raises(OutputError, match=r"scan\.json\.journal\.jsonl: another run is at work there\. Wait"):
        resumed(output)
    first.append(RECORDS[1:])
    first.close()
    assert resumed(output) == RECORDS


def test_the_lock_ends_with_the_process_that_held_it(tmp_path):
    code = """
        import os, sys
        from pathlib import Path
        from splaser_plugin.scanning.journal import ScanJournal
        journal = ScanJournal(Path(sys.argv[1]), {})
        journal.resume(dict)
        journal.append([{}])
        os.kill(os.getpid(), 9)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "scan.json"])
    assert run.returncode == (9 if sys.platform == "win32" else -9)
    journal = ScanJournal(tmp_path / "scan.json", {})
    assert journal.resume(dict) == [{}]
    journal.close()


def test_several_writers_share_one_file(tmp_path):
    output = tmp_path / "scan.json"
    main, other = ScanJournal(output, SETTINGS), ScanJournal(output, SETTINGS)
    main.resume(dict)
    for number, record in enumerate(RECORDS):
        (main, other)[number % 2].append([record])
    main.close()
    other.close()
    assert resumed(output) == RECORDS


def test_a_process_that_does_not_see_the_main_ones_file_writes_none(tmp_path):
    other = ScanJournal(tmp_path / "scan.json", SETTINGS)
    other.append(RECORDS)
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_journal_is_removed_and_an_empty_one_is_not_left(tmp_path):
    journal = ScanJournal(tmp_path / "scan.json", SETTINGS)
    journal.resume(dict)
    journal.append(RECORDS)
    journal.remove()
    journal.close()
    resumed(tmp_path / "scan.json")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path):
    path = tmp_path / "scan.json.journal.jsonl"
    path.write_text("my notes")
    with pytest.raises(OutputError, match=r"scan\.json\.journal\.jsonl: is in the journal's place, but none\. Move"):
        resumed(tmp_path / "scan.json")
    assert path.read_text() == "my notes"


def test_what_can_not_be_opened_or_written_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"can't be opened \(No such file or directory\)\. Make room there"):
        resumed(tmp_path / "absent" / "scan.json")
    journal = ScanJournal(tmp_path / "scan.json", SETTINGS)
    journal.resume(dict)
    message = rf"can't be written \({os.strerror(errno.EFBIG)}\)\. Make room there"
    with files_of_at_most(100), pytest.raises(OutputError, match=message):
        journal.append(RECORDS)
    journal.append(RECORDS)
    journal.close()
    assert resumed(tmp_path / "scan.json") == RECORDS[1:]  # the first one's line was half written


def test_nothing_that_is_not_json_is_written(tmp_path):
    journal = ScanJournal(tmp_path / "scan.json", SETTINGS)
    journal.resume(dict)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append([{"snr": float("nan")}])
    journal.append([{"name": "a\nb\u2028<script>"}])
    journal.close()
    assert len(journal.path.read_text().splitlines()) == 1
    assert json.loads(journal.path.read_text())["record"] == {"name": "a\nb\u2028<script>"}

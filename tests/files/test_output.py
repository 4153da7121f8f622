"""Output folders: whole or not at all, one writer at a time, nobody's files lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from splaser_plugin.errors import OutputError
from splaser_plugin.files import output
from splaser_plugin.files.output import cached_folder, check_output, held, hold, let_go, whole_folder

JOURNAL = '{"schema": "splaser.laser-journal/1", "run": {}}\n{"subject": "a"}\n'


def write(out, text):
    with held(out), whole_folder(out) as folder:
        (folder / "recipe.json").write_text(text)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_journal_that_would_be_lost_is_refused_and_kept(overwrite, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "journal.jsonl").write_text(JOURNAL)
    with pytest.raises(OutputError, match=r"has the journal\.jsonl of an unfinished laser run, which would be lost"):
        check_output(out, overwrite=overwrite)
    assert check_output(out, overwrite=overwrite, goes_on=True) == out
    assert (out / "journal.jsonl").read_text() == JOURNAL


def test_a_folder_of_the_users_own_is_never_taken_for_what_a_run_left(tmp_path):
    mine = tmp_path / "out" / "statistics" / "mine.csv"
    mine.parent.mkdir(parents=True)
    mine.write_text("1, 2")
    with pytest.raises(OutputError, match="exists and isn't empty"):
        check_output(tmp_path / "out", overwrite=False)
    with pytest.raises(ValueError, match="at once"), held(tmp_path / "out"):
        raise ValueError("at once")
    assert mine.read_text() == "1, 2"


def test_two_writers_of_one_folder_refuse_each_other(tmp_path):
    with held(tmp_path / "out"), pytest.raises(OutputError, match="another run is at work there"):
        write(tmp_path / "out", "second")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out", "first")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recipe.json"]


def test_another_folders_unfinished_output_is_not_touched(tmp_path):
    for name, other in (("run[1]", "run1"), ("*", "anything"), ("a?", "ab")):
        working = tmp_path / f".{other}.unfinished-abc"
        working.mkdir()
        write(tmp_path / name, "mine")
        assert working.is_dir()


@pytest.mark.parametrize("journal", ["", JOURNAL])
def test_what_was_being_replaced_when_its_writer_was_killed_is_put_back(journal, tmp_path):
    out, replaced = tmp_path / "out", tmp_path / ".out.unfinished-abc.replaced"
    write(out, "old")
    (out / "journal.jsonl").write_text(journal)
    out.rename(replaced)
    (tmp_path / ".out.unfinished-abc").mkdir()
    let_go(out, hold(out))
    assert (out / "recipe.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_writer_that_lives_is_replacing_stays_where_it_is(tmp_path):
    out, replaced = tmp_path / "out", tmp_path / ".out.unfinished-abc.replaced"
    write(out, "old")
    descriptor = hold(out)
    out.rename(replaced)
    with pytest.raises(OutputError, match="another run is at work there"):
        hold(out)
    assert (replaced / "recipe.json").read_text() == "old"
    replaced.rename(out)
    let_go(out, descriptor)


def test_an_error_leaves_the_old_output_and_no_rest(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    message = r"can't be written \(.*full\): it needs 3\.0 MB, and .*B are free there"
    with pytest.raises(OutputError, match=message), held(out), whole_folder(out, needed=3_000_000):
        raise OSError("the disk is full")
    assert (out / "recipe.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("is_windows", [False, True])
def test_what_a_virus_scanner_has_open_for_a_while_is_renamed_when_it_lets_go(is_windows, tmp_path, monkeypatch):
    rename, tries = Path.rename, []

    def scanned(source, target):
        tries.append(source)
        if len(tries) < 3:
            raise PermissionError(13, "Permission denied")
        return rename(source, target)

    monkeypatch.setattr(output, "WINDOWS", is_windows)
    monkeypatch.setattr(Path, "rename", scanned)
    if not is_windows:
        with pytest.raises(OutputError, match="Permission denied"):
            cached_folder(tmp_path / "out", lambda folder: None)
        assert len(tries) == 1
        return
    assert list(cached_folder(tmp_path / "out", lambda folder: (folder / "a").touch()).iterdir())
    assert len(tries) == 3

"""Two real processes at once on the same place."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from splaser_plugin.errors import OutputError
from splaser_plugin.files.output import cached_folder

# Both fill the cache, wait until the other has filled its copy too, and only then put it in its place.
FILL = """
    import sys, time
    from pathlib import Path
    from splaser_plugin.files.output import cached_folder

    cache, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

    def fill(folder):
        (folder / "weights").write_bytes(me.encode() * 1000)
        (cache / f"{me}.ready").touch()
        while not (cache / f"{other}.ready").exists():
            time.sleep(0.01)

    found = cached_folder(cache / "model", fill)
    opened = (found / "weights").open("rb")
    time.sleep(0.2)
    print(opened.read().decode() == (found / "weights").read_text(), (found / "weights").read_text()[0])
"""


def test_the_model_cache_is_whole_when_two_processes_fill_it_at_once(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(FILL), str(tmp_path)]
    runs = [
        subprocess.Popen([*command, *names], stdout=subprocess.PIPE, text=True) for names in (("a", "b"), ("b", "a"))
    ]
    stdout = [run.communicate(timeout=60)[0].split() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert stdout[0] == stdout[1]
    assert stdout[0][0] == "True"
    assert (tmp_path / "model" / "weights").read_text() == stdout[0][1] * 1000
    assert {file.name for file in tmp_path.iterdir()} == {"model", "a.ready", "b.ready"}


def test_a_cache_that_could_not_be_filled_is_not_there(tmp_path):
    def fill(folder):
        (folder / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_folder(tmp_path / "cache" / "model", fill)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        cached_folder(tmp_path / "file" / "model", fill)


def test_a_cache_that_is_there_is_not_filled_again(tmp_path):
    (tmp_path / "model").mkdir()
    assert cached_folder(tmp_path / "model", lambda folder: pytest.fail("filled")) == tmp_path / "model"

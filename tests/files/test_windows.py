"""What Windows does in another way, tried under its rules where there is no Windows."""

from __future__ import annotations

import ast
import json
import mmap
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from splaser_plugin import LaserConfig, laser, scan
from splaser_plugin.checkpoints.checkpoint import OWN_PAGES_BYTES, open_checkpoint, read_groups
from tests.builders import ROOT, TO_COMPRESS, TO_RESUME

RULES = [sys.executable, "-X", "warn_default_encoding", "-m", "tests.files.windows_rules"]
PACKAGES = ("splaser_plugin", "integrations")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="its rules are made up of Linux's")
def test_a_scan_and_two_runs_end_under_windows_rules_as_they_do_here(whole_folder, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Name {what}.", "chosen": f"{what} it is.", "rejected": "No."} for what in "abcdefghijklmn"]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir(), ours.mkdir()
    command = [*RULES, str(whole_folder), str(pairs), str(theirs)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, in_use, unchanged, files, stopped = done.stdout.splitlines()
    assert "another run is at work there. Wait for its end" in refused
    assert "out: can't be written ([Errno 13] Permission denied" in in_use
    assert unchanged == "True"
    assert files == "[1, 2, 2, 2]", "the one of before is read while the matrix is reduced, and goes with the next"
    assert stopped == "['.splaser-statistics', 'journal.jsonl']"
    scan(whole_folder, output=ours / "scan.json")
    laser(str(whole_folder), str(pairs), config=LaserConfig(**TO_RESUME), output=ours / "out")
    laser(str(whole_folder), str(pairs), config=LaserConfig(**TO_COMPRESS), output=ours / "reduced")
    assert sorted(path.name for path in theirs.iterdir()) == sorted(path.name for path in ours.iterdir())
    for out in ("out", "reduced"):
        names = sorted(path.name for path in (ours / out).iterdir())
        assert sorted(path.name for path in (theirs / out).iterdir()) == names
        for name in ("recipe.json", "model.safetensors"):
            assert (theirs / out / name).read_bytes() == (ours / out / name).read_bytes()


def test_large_tensors_are_read_without_private_pages_of_no_file(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(87, "The parameter is incorrect")

    monkeypatch.setattr("splaser_plugin.checkpoints.checkpoint.WINDOWS", True)
    monkeypatch.setattr(mmap, "mmap", refuse)
    stored = torch.arange(OWN_PAGES_BYTES).float()
    save_file({"large": stored}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    [[read]] = read_groups(checkpoint, [list(checkpoint.tensors.values())])
    assert torch.equal(read, stored)


def test_no_test_needs_a_module_of_other_systems_before_it_runs():
    names = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "windows_rules.py"]
    imported = [
        f"{path}: {alias.name}"
        for path in paths
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if {alias.name, getattr(node, "module", None)} & names
    ]
    assert paths and not imported


def names_no_encoding(call: ast.Call) -> bool:
    """Whether the call reads or writes text in the system's encoding, which on Windows isn't UTF-8."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    modes = {argument.value for argument in call.args if isinstance(argument, ast.Constant)}
    is_text = name in ("read_text", "write_text") or (name in ("open", "fdopen") and bool(modes & {"r", "w", "a", "x"}))
    return is_text and "encoding" not in {keyword.arg for keyword in call.keywords}


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("self.path.read_text()", True),
        ("(path / name).open('w')", True),
        ("os.fdopen(descriptor, 'w')", True),
        ("self.path.open('rb')", False),
        ("self.path.read_text(encoding='utf-8')", False),
    ],
)
def test_text_in_the_systems_encoding_is_found(code, is_found):
    assert names_no_encoding(ast.parse(code, mode="eval").body) is is_found


def test_no_text_is_read_or_written_in_the_systems_encoding():
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    calls = ((path, node) for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = [f"{path}:{call.lineno}" for path, call in calls if isinstance(call, ast.Call) and names_no_encoding(call)]
    assert paths and not found

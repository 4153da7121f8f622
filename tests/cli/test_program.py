"""The program as a whole: how it is started, its version, and what a shell completes."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys

import pytest

import splaser_plugin
from tests.builders import ROOT

SPLASER = [sys.executable, "-m", "splaser_plugin"]


def output(*arguments, **environment):
    run = subprocess.run(
        [*SPLASER, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return run.stdout


def test_python_m_is_the_command_and_both_say_their_version(splaser):
    said = f"splaser {splaser_plugin.__version__}\n"
    assert output("--version") == said
    assert splaser("--version") == (0, said, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("splaser la", ["laser"]),
        ("splaser emit ", ["axolotl", "llamafactory", "peft", "spectrum"]),
        ("splaser laser --held", ["--held-out", "--held-out-fraction"]),
        ("splaser laser --objective ", ["compress", "quality"]),
        ("splaser emit spectrum --edge ", ["gavish-donoho", "iqr", "mp"]),
    ],
)
def test_a_shell_completes_commands_options_and_choices(words, expected):
    position = str(len(words.split(" ")) - 1)
    completed = output(_SPLASER_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=position)
    assert sorted(completed.split()) == expected


def on_terminal(columns, *arguments):
    """What a command prints to stderr, which is a terminal of that width, and its exit code."""
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    run = subprocess.run([*SPLASER, *arguments], stdout=subprocess.PIPE, stderr=terminal, check=False)
    os.close(terminal)
    printed = b""
    with contextlib.suppress(OSError):  # Linux's end of file
        while part := os.read(main, 65536):
            printed += part
    os.close(main)
    return run.returncode, printed.decode()


@pytest.mark.parametrize("columns", [0, 40, 80, 120])
def test_no_error_is_wrapped_inside_a_word(columns):
    path = "/a/rather-long/path" * 6
    given = f"some words-with-hyphens and {path} and then a few more of them, and a few more again"
    code, printed = on_terminal(columns, "emit", "axolotl", "scan.json", "-o", "c.yml", "--rl", given)
    assert code == 2
    lines = printed.splitlines()
    assert len(lines) > 2
    assert all(len(line) <= (columns or 80) for line in lines if path not in line)
    assert " ".join(lines) == f"ConfigError: --rl: got '{given}', expected dpo."


LONG = "--a-" + "very-" * 20 + "long-option"


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scan", "my-model", LONG], f"ConfigError: No such option: {LONG}. See splaser scan --help."),
        (["scan"], "ConfigError: Missing argument 'model'. See splaser scan --help."),
        (["scna"], "ConfigError: No such command 'scna'."),
        (["emit", "axolotl", "scan.json", "-o"], "requires an argument. See splaser emit axolotl --help."),
        (["scan", "my-model", "--json=3"], "does not take a value. See splaser scan --help."),
        (["scan", "my-model", "/long/path" * 12], f"({'/long/path' * 12}). See splaser scan --help."),
    ],
)
def test_wrong_usage_is_one_sentence_that_is_not_wrapped_inside_a_word_either(columns, arguments, said):
    code, printed = on_terminal(columns, *arguments)
    assert code == 2
    lines = printed.splitlines()
    without_marks = str.maketrans("", "", "':")
    plain, expected = (text.casefold().translate(without_marks) for text in (" ".join(lines), said))
    assert expected in plain  # typer's and click's versions differ in letters and in these marks
    assert all(len(line) <= columns for line in lines if " " in line)


@pytest.mark.parametrize(("system", "is_told"), [("win32", True), ("linux", False)])
def test_on_a_system_where_nobody_has_run_it_a_command_says_so_before_its_work(
    system, is_told, splaser, monkeypatch, tmp_path
):
    monkeypatch.setattr("splaser_plugin.cli.systems.SYSTEM", system)
    code, _, stderr = splaser("scan", tmp_path / "none", "-o", tmp_path / "scan.json")
    assert code == 1
    assert ("splaser was never run on Windows" in " ".join(stderr.split())) is is_told
    assert stderr.find("never run") < stderr.index("CheckpointError")


def test_without_a_command_the_help_is_shown(splaser):
    for arguments in ((), ("emit",)):
        code, printed, stderr = splaser(*arguments)
        assert code in (0, 2)  # by the version of click
        assert "Usage:" in printed + stderr and "Error" not in printed + stderr


@pytest.mark.slow
def test_what_emit_tells_is_not_wrapped_inside_a_word(tmp_path):
    scan = str(ROOT / "tests" / "data" / "smollm2_scan.json")
    target = str(tmp_path / "adapter_config.json")
    code, printed = on_terminal(60, "emit", "peft", scan, "--fraction", "0.5", "--model", "nobody/here", "-o", target)
    assert code == 0
    said = [line for line in printed.splitlines() if not line.startswith(("written: ", "next: "))]  # to be copied
    assert max(map(len, said)) <= 60
    told = " ".join(said)
    assert "more is shared than by chance" in told and "not checked on the model's class" in told

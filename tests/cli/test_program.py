"""The program as a whole: how it is started, its version, and what a shell completes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import splaser_plugin

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
    ],
)
def test_a_shell_completes_commands_and_options(words, expected):
    position = str(len(words.split(" ")) - 1)
    completed = output(_SPLASER_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=position)
    assert sorted(completed.split()) == expected

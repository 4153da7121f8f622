"""Ctrl-C and SIGTERM: one line with the command that goes on, and nothing lost."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import typer

from splaser_plugin.cli.app import Commands, _stopped
from tests.builders import FLAGS, SPLASER

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments, cwd):
    command = [*SPLASER, *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_laser_says_how_to_go_on_and_ends_as_an_unbroken_one(tiny_folder, pairs_file, tmp_path, how):
    arguments = ["laser", str(tiny_folder), "--pairs", pairs_file, "-o", "out", *FLAGS, "--max-new-tokens", "48"]
    process = start(*arguments, cwd=tmp_path)
    for line in process.stderr:
        if "baseline score" in line:
            process.send_signal(how)
            break
    stderr = process.stderr.read()
    assert process.wait(timeout=60) == 130
    again = shlex.join(["splaser", *arguments])
    assert stderr.endswith(f"stopped. What is finished is kept; go on with: {again}\n")
    assert "Traceback" not in stderr
    assert (tmp_path / "out" / "journal.jsonl").read_text().count("\n") >= 2
    assert {file.name for file in tmp_path.iterdir()} <= {"out", "pairs.jsonl"}
    for where in ("out", "unbroken"):
        rest = start(*[where if argument == "out" else argument for argument in arguments], cwd=tmp_path)
        stderr = rest.communicate(timeout=120)[1]
        assert rest.returncode == 0, stderr
    found, unbroken = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "unbroken"))
    for results in (found, unbroken):
        del results["elapsed_s"]
        for trial in results["candidates"]:
            del trial["elapsed_s"]
    assert found == unbroken
    recipes = [(tmp_path / name / "recipe.json").read_bytes() for name in ("out", "unbroken")]
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize(
    ("rank", "processes", "said"),
    [
        ("0", "1", "stopped. Start again with: splaser wait 'a\\x1b[31m b'\n"),
        ("0", "2", "stopped. Start again with, under the launcher of this run: splaser wait 'a\\x1b[31m b'\n"),
        ("1", "2", ""),
    ],
)
def test_a_stopped_command_without_a_journal_says_to_start_again(rank, processes, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", processes)
    app = typer.Typer(cls=Commands)

    @app.command()
    def wait(text: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    @app.command()
    def other() -> None: ...

    monkeypatch.setattr(sys, "argv", ["splaser", "wait", "a\x1b[31m b"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            app()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 130
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("columns", [40, 80])
def test_on_a_terminal_the_command_that_goes_on_can_be_copied(columns, monkeypatch):
    command = ["splaser", "laser", "my model/" * 3, *["--pairs", "a-file.jsonl"] * 6, "-o", "it's"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((columns, 24)))
    sentence, _, copied = _stopped("stopped. Go on with:", command).partition("\n")
    assert sentence == "stopped. Go on with:"
    assert shlex.split(copied.replace("\\\n", "")) == command
    assert max(map(len, copied.splitlines())) <= columns

"""Every command on local files, with the network watched and a token planted: neither is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.builders import FLAGS

TOKEN = "hf_planted0123456789abcdefghijklmnopqr"

# What each command would tell the network is noted and refused, on sockets of every kind but those of the machine.
WATCHED = """
    import json, sys

    attempts = []

    def watch(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            attempts.append(f"{event} {arguments[1:]}")
            raise OSError("no network here")

    sys.addaudithook(watch)
    from splaser_plugin.cli.app import main

    for arguments in json.loads(sys.stdin.read()):
        sys.argv = ["splaser", *arguments]
        print("$", *sys.argv, file=sys.stderr)
        try:
            main()
        except SystemExit as end:
            print("exit", end.code, file=sys.stderr)
    open("attempts.json", "w").write(json.dumps(attempts))
"""


@pytest.mark.real
def test_no_command_on_local_files_uses_the_network_or_tells_the_token(tiny_folder, minilm, pairs_file, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes(Path(pairs_file).read_bytes())
    model, fast = str(tiny_folder), [flag for flag in FLAGS if flag not in ("--embedder", "self")]
    with_minilm = ["--embedder", str(minilm), *fast]
    commands = [
        ["scan", model, "-o", "scan.json", "--top-json", "top.json"],
        ["laser", model, "--pairs", pairs_file, "-o", "out", *FLAGS],
        ["laser", model, "--pairs", str(data), "-o", "minilm", "--save", "factored", *with_minilm],
        ["laser", model, "--pairs", pairs_file, "-o", "out", *FLAGS],  # refused: it is there
        ["apply", "out/recipe.json", model, "-o", "again", "--device", "cpu"],
        ["expand", "minilm", "-o", "expanded"],
        ["compare", model, "again", "--pairs", pairs_file, "-o", "compared.json", "--device", "cpu",
         "--embedder", str(minilm), "--max-new-tokens", "6"],
        ["report", "out", "-o", "report.html"],
        ["emit", "axolotl", "scan.json", "-o", "axolotl.yml", "--dataset", pairs_file],
        ["emit", "llamafactory", "scan.json", "-o", "llamafactory.yml", "--dataset", pairs_file, "--stage", "dpo"],
        ["emit", "peft", "scan.json", "-o", "adapter_config.json"],
        ["emit", "spectrum", "scan.json", "-o", "spectrum.json"],
        ["scan", "./absent"],
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCHED)],
        input=json.dumps(commands),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads((tmp_path / "attempts.json").read_text()) == []
    ended = [line for line in run.stderr.splitlines() if line.startswith("exit ")]
    assert ended == ["exit 0"] * 3 + ["exit 1"] + ["exit 0"] * 8 + ["exit 1"], run.stderr
    assert TOKEN not in run.stdout + run.stderr
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 30
    assert [file for file in written if TOKEN.encode() in file.read_bytes()] == []


@pytest.mark.slow
def test_a_laser_that_fails_with_a_token_in_the_environment_does_not_tell_it(splaser, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for arguments in (["scan", "org/absent"], ["laser", "org/absent", "--pairs", "org/absent", "-o", tmp_path / "out"]):
        code, printed, stderr = splaser(*arguments)
        assert code == 1
        assert TOKEN not in printed + stderr

"""The same command twice, in processes of their own: the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.builders import FLAGS

RUN = """
    import json, sys
    from splaser_plugin.cli.app import main

    for arguments in json.loads(sys.stdin.read()):
        sys.argv = ["splaser", *arguments]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
"""


def without_times(results):
    return [{**trial, "elapsed_s": None} for trial in results["candidates"]], {
        **results,
        "candidates": None,
        "elapsed_s": None,
    }


@pytest.mark.slow
def test_the_same_commands_twice_give_the_same_bytes(tiny_folder, pairs_file, tmp_path):
    model = str(tiny_folder)
    commands = [
        ["scan", model, "-o", "scan.json", "--top-json", "top.json"],
        ["laser", model, "--pairs", pairs_file, "-o", "out", *FLAGS],
        ["apply", "out/recipe.json", model, "-o", "again", "--device", "cpu"],
        ["emit", "axolotl", "scan.json", "-o", "axolotl.yml", "--dataset", pairs_file],
    ]
    runs = []
    for seed in ("0", "1"):  # of Python's own hashes, which order its sets of texts
        folder = tmp_path / seed
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(RUN)],
            input=json.dumps(commands),
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            text=True,
            check=True,
            stderr=subprocess.DEVNULL,
        )
        runs.append({str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()})
    first, second = runs
    assert first.keys() == second.keys()
    timed = {name for name in first if name.endswith(("results.json", "report.html", "README.md", "journal.jsonl"))}
    differing = {name for name in first if first[name].read_bytes() != second[name].read_bytes()}
    assert differing <= timed
    exact = {"scan.json", "top.json", "axolotl.yml", "out/scan.json", "out/recipe.json", "out/model.safetensors"}
    assert exact | {"again/model.safetensors"} <= first.keys() - timed
    name = "out/results.json"
    found, again = (json.loads(run[name].read_text()) for run in runs)
    assert without_times(found) == without_times(again)

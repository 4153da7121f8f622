"""Every block of README.md that can be run, in the order in which it stands there."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess

import pytest
import yaml

from splaser_plugin.cli import main
from tests.conftest import ROOT

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
SMALL = "--embedder self --max-new-tokens 6 --candidates 3 --edge mp --device cpu"


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """What the README's reader has: a model, and some pairs."""
    path = tmp_path_factory.mktemp("readme")
    (path / "my-model").symlink_to(tiny_folder)
    rows = (ROOT / "examples" / "data" / "pairs.jsonl").read_text().splitlines()[:6]
    (path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=[f"{i}-{block[0]}" for i, block in enumerate(BLOCKS)])
def test_block(language, code, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    if language == "sh":
        for line in code.strip().splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                planned = subprocess.run(["make", "-n", words[1]], cwd=ROOT, capture_output=True, text=True)
                assert planned.returncode == 0
                continue
            small = shlex.split(SMALL) if words[1] == "laser" else []
            monkeypatch.setattr("sys.argv", [*words, *small])
            main_or_exit()
    elif language == "python":
        script = tmp_path / "block.py"
        script.write_text(code)
        runpy.run_path(str(script), run_name="__main__")
    elif language == "yaml":
        section = yaml.safe_load(code)
        assert section["splaser"].keys() <= {"mode", "top", "laser"}
    else:
        assert language == "text"


def main_or_exit():
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, "the command failed"


def test_what_the_blocks_wrote_is_there(folder):
    for name in ("scan.json", "top.json", "lasered/recipe.json", "rebuilt/recipe.json", "from-python/recipe.json"):
        json.loads((folder / name).read_text())
    for name in ("dpo-run/lasered/model.safetensors", "axolotl.yml", "llamafactory.yml"):
        assert (folder / name).is_file()

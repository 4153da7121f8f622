"""Runs in the real tools: `make test-integrations` builds their environments and says where they are."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.scanning.scan import Scan, scan_source
from splaser_plugin.scanning.selection import choose
from splaser_plugin.weights.stored import StoredWeights
from tests.tools.runs import ENVIRONMENTS, HERE, Run

collect_ignore_glob = [] if ENVIRONMENTS else ["test_*.py"]

PAIRS = HERE.parents[1] / "examples" / "data" / "pairs.jsonl"
BLOCKS = 3
QUIET = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def small_smollm2(smollm2, tmp_path_factory) -> Path:
    """SmolLM2's first blocks with its tokenizer: real weights, trained in seconds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "small"
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.config.layer_types = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_scan(small_smollm2) -> Scan:
    return scan_source(StoredWeights(open_checkpoint(small_smollm2)), name=str(small_smollm2))


@pytest.fixture
def folder(tmp_path, monkeypatch, small_scan) -> Path:
    """The working folder, with a scan and a few preference pairs."""
    small_scan.save(tmp_path / "scan.json")
    lines = PAIRS.read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines[:12]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def chosen(small_scan) -> list[str]:
    """What `--top 1` chooses."""
    return choose(small_scan, top=1).names


@pytest.fixture
def run_in(folder) -> Callable[..., Run]:
    """Run a command of a tool's environment in the working folder."""

    def run(tool: str, *command: str) -> Run:
        program = Path(str(ENVIRONMENTS)) / tool / "bin" / command[0]
        result = subprocess.run(
            [program, *command[1:]],
            env={**os.environ, **QUIET},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        return Run(result.returncode, result.stdout)

    return run

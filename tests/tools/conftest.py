"""Runs in the real tools: `make test-integrations` builds their environments and says where they are."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.cli.emit import app
from splaser_plugin.scanning.scan import Scan, scan_checkpoint
from splaser_plugin.scanning.selection import choose

ENVIRONMENTS = os.environ.get("SPLASER_INTEGRATIONS")
collect_ignore_glob = [] if ENVIRONMENTS else ["test_*.py"]

HERE = Path(__file__).parent
PAIRS = HERE.parents[1] / "examples" / "data" / "pairs.jsonl"
BLOCKS = 3
# enough for one of the matrices to be kept
SHORT_LASER = {"samples": 6, "candidates": 6, "embedder": "self", "max_new_tokens": 12, "batch_size": 6}
QUIET = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Run:
    """One command of a tool."""

    code: int
    output: str


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
    return scan_checkpoint(open_checkpoint(small_smollm2), name=str(small_smollm2))


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


def emit(command: str) -> None:
    result = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def tensors(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    with safe_open(folder / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping


def trained_whole(before: Path, after: Path) -> set[str]:
    """Modules whose weights a run has changed."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {name.removesuffix(".weight") for name in old if not torch.equal(old[name], new[name].to(old[name].dtype))}


def trained_adapters(folder: Path) -> set[str]:
    """Modules that have an adapter, all of them trained: B starts at zero."""
    saved = tensors(folder, "adapter_model.safetensors")
    names = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in saved}
    for name, tensor in saved.items():
        assert ".lora_" in name
        assert tensor.abs().max() > 0, name
    return names


def check_lasered(folder: Path) -> list[str]:
    """The matrices that were reduced in the run that wrote to `folder`: each has the rank its recipe says."""
    recipe = json.loads((folder / "lasered" / "recipe.json").read_text())
    saved = tensors(folder / "lasered")
    for step in recipe["steps"]:
        assert torch.linalg.matrix_rank(saved[f"{step['name']}.weight"], rtol=1e-5) == step["rank"]
    return [step["name"] for step in recipe["steps"]]


def last_lines(run: Run) -> str:
    return "\n".join(run.output.splitlines()[-25:])


def answer(run: Run) -> object:
    """What a script of ours printed as its last line, as JSON."""
    assert run.code == 0, last_lines(run)
    return json.loads(run.output.splitlines()[-1])

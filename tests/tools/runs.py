"""Runs in the real tools: what they are started with, and what they left behind."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from typer.testing import CliRunner

from splaser_plugin.cli.emit import app

ENVIRONMENTS = os.environ.get("SPLASER_INTEGRATIONS")
HERE = Path(__file__).parent
# enough for one of the matrices to be kept
SHORT_LASER = {"samples": 6, "candidates": 6, "embedder": "self", "max_new_tokens": 12, "batch_size": 6}


@dataclass(frozen=True)
class Run:
    """One command of a tool."""

    code: int
    output: str


AXOLOTL_ON_CPU = {
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "max_steps": 3,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "output_dir": "out",
}


def axolotl_on_cpu(config: str, **changes: Any) -> str:
    """The configuration with what a CPU needs; the name of the new file."""
    values = yaml.safe_load(Path(config).read_text()) | AXOLOTL_ON_CPU | changes
    Path("cpu.yml").write_text(yaml.safe_dump(values, sort_keys=False))
    return "cpu.yml"


LLAMAFACTORY_ON_CPU = ("bf16=false", "max_steps=3", "gradient_accumulation_steps=1", "save_strategy='no'")


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

"""Each example script as its first lines say, with fewer steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points, metadata

import pytest
import torch
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from splaser_plugin import load
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.weights.factored import factored_layers
from splaser_plugin.weights.factored_folder import save_model
from splaser_plugin.weights.in_memory import Weights
from tests.builders import PROSE, ROOT, accelerate


def run(script, *arguments, launcher=(sys.executable,)):
    command = [*launcher, f"examples/{script}", *map(str, arguments)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.real
@pytest.mark.parametrize("script", ["trainer_callback.py", "post_dpo.py"])
def test_the_callback_examples_save_a_lasered_model(script, smollm2, minilm, tmp_path):
    sizes = ["--steps", 1, "--samples", 4, "--candidates", 1]
    printed = run(script, "--output", tmp_path / "run", *sizes)
    assert "of 1 candidates" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "lasered")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.real
def test_the_lora_example_trains_the_chosen_matrices_and_no_others(smollm2, tmp_path):
    printed = run("targeted_lora.py", "--output", tmp_path / "run", "--steps", 1, "--top", 1)
    assert "training 7 of 210 matrices: top 1 of each module type by snr_ratio" in printed
    adapted = {name.partition(".lora_")[0] for name in load_file(tmp_path / "run" / "adapter_model.safetensors")}
    assert len(adapted) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "launcher"),
    [
        ("accelerate_loop.py", [sys.executable]),
        ("accelerate_loop.py", accelerate()),
        ("lightning_loop.py", [sys.executable]),
    ],
    ids=["accelerate", "accelerate, two processes", "lightning"],
)
def test_the_examples_of_own_loops_save_a_lasered_model(script, launcher, tiny_folder, tmp_path):
    if script == "lightning_loop.py":
        pytest.importorskip("lightning")
    printed = run(script, "--model", tiny_folder, "--output", tmp_path / "run", "--samples", 8, launcher=launcher)
    assert printed.count("of 3 candidates") == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    steps = Recipe.load(tmp_path / "run" / "recipe.json").steps
    assert steps
    for step in steps:
        weight = model.get_parameter(f"{step.name}.weight")
        assert torch.linalg.matrix_rank(weight.double(), rtol=1e-5) == step.rank


EXAMPLES = (
    "trainer_callback.py", "post_dpo.py", "targeted_lora.py", "heal.py", "accelerate_loop.py", "lightning_loop.py",
)  # fmt: skip


@pytest.mark.parametrize("script", EXAMPLES)
def test_each_example_starts_with_the_command_that_runs_it(script):
    first = (ROOT / "examples" / script).read_text().split('"""')[1]
    assert f"    python examples/{script} --" in first and "--output" in first


@pytest.mark.slow
def test_the_healing_example_trains_a_factored_model_and_keeps_its_form(tiny_folder, tmp_path):
    weights = Weights(AutoModelForCausalLM.from_pretrained(tiny_folder))
    weights.keep_factors()
    matrices = weights.matrices()[0]
    for matrix in matrices:
        weights.reduce(matrix, min(matrix.shape) // 4)
    save_model(weights, tmp_path / "small", None)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "small")
    text = tmp_path / "notes.txt"
    text.write_text(4 * PROSE, encoding="utf-8")
    sizes = ["--steps", 20, "--window", 16, "--rows", 48, "--learning-rate", 0.01]
    printed = run("heal.py", "--model", tmp_path / "small", "--text", text, "--output", tmp_path / "healed", *sizes)
    before, after = map(float, re.findall(r"loss ([\d.]+) before, ([\d.]+) after", printed)[0])
    assert after < before
    small, healed = load(tmp_path / "small"), load(tmp_path / "healed")
    assert healed.num_parameters() == small.num_parameters()
    assert len(factored_layers(healed)) == len(matrices)
    assert torch.equal(healed.get_input_embeddings().weight, small.get_input_embeddings().weight)


def test_the_container_installs_what_is_there_and_starts_the_program():
    """No container is built here; what it copies, installs and starts has to exist."""
    lines = (ROOT / "examples" / "Dockerfile").read_text(encoding="utf-8")
    project = metadata("splaser_plugin")
    [version] = re.findall(r"^FROM python:(\S+)-slim$", lines, re.MULTILINE)
    assert SpecifierSet(project["Requires-Python"]).contains(version)
    [extras] = re.findall(r'"/src\[(.*)\]"', lines)
    assert set(extras.split(",")) <= set(project.get_all("Provides-Extra"))
    [program] = re.findall(r'^ENTRYPOINT \["(.*)"\]$', lines, re.MULTILINE)
    assert program in entry_points(group="console_scripts").names
    assert "--user" in lines and "mkdir -m 777 /work /cache" in lines and "ENV HOME=/cache" in lines
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not {"splaser_plugin", "integrations", "examples", "pyproject.toml", "README.md", "LICENSE"} & set(ignored)

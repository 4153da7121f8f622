"""Two real processes on gloo against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.builders import ROOT, THREE_PAIRS, accelerate, save_rows, torchrun

pytestmark = pytest.mark.slow

SCRIPT = str(ROOT / "tests" / "distributed_runs.py")


ONE = [sys.executable]


def run(launcher: list[str], kind: str, folder: Path, model: Path) -> dict:
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launcher, SCRIPT, kind, str(folder), str(model)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "recipe.json").read_text())


def digests(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.glob("digest-*.txt")}


def same_steps(one: dict, two: dict) -> bool:
    assert one["steps"], "this run has to keep something to show anything"
    assert one["weights"] == two["weights"]
    assert one["scores"] == pytest.approx(two["scores"], abs=1e-5)
    return one["steps"] == two["steps"]


def test_a_model_sharded_over_two_processes_gives_the_recipe_and_the_bits_of_one(tiny_folder, tmp_path):
    one = run(ONE, "engine", tmp_path / "one", tiny_folder)
    two = run(torchrun(), "engine", tmp_path / "two", tiny_folder)
    assert same_steps(one, two)
    assert len(list((tmp_path / "two").glob("digest-*.txt"))) == 2
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "saved").state_dict()
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "saved").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_stopped_in_two_processes_goes_on_and_ends_as_an_unbroken_one(tiny_folder, tmp_path):
    one = run(ONE, "engine", tmp_path / "one", tiny_folder)
    two = run(torchrun(), "resumed", tmp_path / "two", tiny_folder)
    assert (tmp_path / "two" / "left.txt").read_text() == "7"  # what it depends on, the scan, five measurements
    assert same_steps(one, two)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert (tmp_path / "two" / "out" / "results.json").is_file()


def test_the_callback_on_a_sharded_model_gives_the_recipe_of_one_process(tiny_folder, tmp_path):
    one = run(ONE, "sharded-trainer", tmp_path / "one", tiny_folder)
    two = run(torchrun(), "sharded-trainer", tmp_path / "two", tiny_folder)
    assert same_steps(one, two)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert (tmp_path / "two" / "run" / "lasered" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["ddp-before"])
def test_ddp_under_accelerate_launch_gives_the_recipe_of_one_process(kind, tiny_folder, tmp_path):
    one = run(ONE, kind, tmp_path / "one", tiny_folder)
    two = run(accelerate(), kind, tmp_path / "two", tiny_folder)
    assert same_steps(one, two)
    assert len(list((tmp_path / "two").glob("digest-*.txt"))) == 2
    assert len(digests(tmp_path / "two")) == 1


def test_two_processes_order_by_the_same_gradient_as_one_and_refuse_it_on_a_sharded_model(tiny_folder, tmp_path):
    one = run(ONE, "gradient", tmp_path / "one", tiny_folder)
    two = run(torchrun(), "gradient", tmp_path / "two", tiny_folder)
    assert same_steps(one, two)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    orders = [json.loads((tmp_path / run / "results.json").read_text())["candidates"] for run in ("one", "two")]
    assert [(candidate["name"], candidate["rank"]) for candidate in orders[0]] == [
        (candidate["name"], candidate["rank"]) for candidate in orders[1]
    ]
    predicted = [[candidate["predicted"] for candidate in order] for order in orders]
    assert predicted[0] == pytest.approx(predicted[1], abs=1e-4)
    refused = [path.read_text() for path in (tmp_path / "two").glob("refused-*.txt")]
    assert len(refused) == 2
    assert all("rank_by gradient needs whole gradients, and this model is sharded" in message for message in refused)


SHORT = ["--embedder", "self", "--max-new-tokens", "6", "--candidates", "5", "--edge", "mp", "--batch-size", "2"]
SPREAD = {"fsdp": ["--use_fsdp", "--fsdp_version", "2"], "tp": ["--multi_gpu"]}
"""What `accelerate launch` is told for each way to spread a model over the processes."""


def test_processes_end_that_let_go_of_their_model_right_after_the_last_work_together(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [*torchrun(), SCRIPT, "parting", str(tmp_path), "no model"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("parted-*")} == {"parted-0.txt", "parted-1.txt"}


def command(launcher: list[str], model: Path, pairs: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    arguments = ["-m", "splaser_plugin", "laser", model, "--pairs", pairs, "-o", out, *SHORT, *more]
    return subprocess.run([*launcher, *map(str, arguments)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("way", SPREAD)
def test_the_command_spreads_a_model_over_processes_and_finds_what_one_finds(way, tiny_folder, tmp_path):
    pairs = save_rows(tmp_path / "pairs.jsonl", THREE_PAIRS)
    alone = command(ONE, tiny_folder, pairs, tmp_path / "one")
    launcher = [SPREAD[way][0] if word == "--multi_gpu" else word for word in accelerate()] + SPREAD[way][1:]
    asked = [] if way == "fsdp" else ["--device-map", way]  # FSDP is asked of the launcher
    together = command(launcher, tiny_folder, pairs, tmp_path / "two", *asked)
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert together.returncode == 0, together.stderr[-3000:]
    assert "a part in each of 2 processes" in together.stderr
    one, two = (json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("one", "two"))
    assert same_steps(one, two)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_the_command_refuses_all_devices_for_each_of_several_processes(tiny_folder, tmp_path):
    pairs = save_rows(tmp_path / "pairs.jsonl", THREE_PAIRS)
    done = command(accelerate(), tiny_folder, pairs, tmp_path / "out", "--device-map", "auto")
    assert done.returncode != 0
    assert "--device-map auto gives one process all devices, and there are 2" in " ".join(done.stderr.split())

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from splaser_plugin.published import load_scan
from tests.integrations.conftest import (
    HERE,
    SHORT_LASER,
    answer,
    check_lasered,
    emit,
    last_lines,
    tensors,
    trained_adapters,
    trained_whole,
)

CPU = {
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "max_steps": 3,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "output_dir": "out",
}


def on_cpu(config: str, **changes: Any) -> str:
    """The configuration with what a CPU needs; the name of the new file."""
    values = yaml.safe_load(Path(config).read_text()) | CPU | changes
    Path("cpu.yml").write_text(yaml.safe_dump(values, sort_keys=False))
    return "cpu.yml"


def train(run_in, config: str):
    return run_in("axolotl", "axolotl", "train", config, "--launcher", "python")


def check_valid(run_in, config: str) -> None:
    assert answer(run_in("axolotl", "python", str(HERE / "strict_axolotl.py"), config)) == []


@pytest.mark.parametrize("rl", ["", "--rl dpo"])
@pytest.mark.parametrize("mode", ["lora", "qlora", "unfrozen"])
def test_an_emitted_configuration_is_valid_whole_and_trains_the_chosen_matrices(
    mode, rl, folder, chosen, run_in, small_smollm2
):
    emit(f"axolotl scan.json --mode {mode} {rl} --top 1 --dataset pairs.jsonl -o c.yml")
    check_valid(run_in, "c.yml")
    run = train(run_in, on_cpu("c.yml"))
    assert run.code == 0, last_lines(run)
    if mode == "unfrozen":
        assert trained_whole(small_smollm2, folder / "out") == set(chosen)
    else:
        assert trained_adapters(folder / "out") == set(chosen)


@pytest.mark.parametrize("rl", ["", "--rl dpo"])
@pytest.mark.parametrize("mode", ["lora", "unfrozen"])
def test_the_plugin_scans_by_itself_and_trains_the_same(mode, rl, folder, chosen, run_in, small_smollm2):
    emit(f"axolotl scan.json --plugin --mode {mode} {rl} --top 1 --dataset pairs.jsonl -o c.yml")
    check_valid(run_in, "c.yml")
    run = train(run_in, on_cpu("c.yml"))
    assert run.code == 0, last_lines(run)
    assert "splaser: training 7 of 21 matrices: top 1 of each module type by snr_ratio (edge iqr)" in run.output
    assert "splaser: exactly these 7 matrices are trained" in run.output
    if mode == "unfrozen":
        assert trained_whole(small_smollm2, folder / "out") == set(chosen)
    else:
        assert trained_adapters(folder / "out") == set(chosen)


@pytest.mark.parametrize(("mode", "rl"), [("unfrozen", ""), ("lora", "--rl dpo")])
def test_the_plugin_lasers_the_model_after_training(mode, rl, folder, run_in, small_smollm2):
    emit(f"axolotl scan.json --plugin --mode {mode} {rl} --laser after --top 1 --dataset pairs.jsonl -o c.yml")
    check_valid(run_in, "c.yml")
    section = yaml.safe_load(Path("c.yml").read_text())["splaser"]
    section["laser"] |= SHORT_LASER
    run = train(run_in, on_cpu("c.yml", splaser=section))
    assert run.code == 0, last_lines(run)
    reduced = check_lasered(folder / "out")
    assert reduced
    if mode == "unfrozen":
        saved, lasered = tensors(folder / "out"), tensors(folder / "out" / "lasered")
        assert all(torch.equal(saved[f"{name}.weight"], lasered[f"{name}.weight"]) for name in reduced)


def plugin_config(**section: Any) -> str:
    emit("axolotl scan.json --plugin --mode unfrozen --top 1 --dataset pairs.jsonl -o c.yml")
    values = yaml.safe_load(Path("c.yml").read_text())
    return on_cpu("c.yml", splaser=values["splaser"] | section)


def test_the_plugin_stops_the_run_on_a_key_it_does_not_know(folder, run_in):
    run = train(run_in, plugin_config(tpo=3))
    assert run.code != 0
    assert "splaser.tpo: Extra inputs are not permitted (nearest: top" in run.output
    assert not Path("out/model.safetensors").exists()


def test_the_plugin_stops_the_run_when_the_scan_is_of_another_model(folder, run_in, small_scan):
    stored = small_scan.to_dict()
    renamed = json.dumps(stored).replace("model.layers.2.", "model.layers.7.")
    Path("other.json").write_text(renamed)
    run = train(run_in, plugin_config(scan="other.json"))
    assert run.code != 0
    assert "chosen matrices" in run.output
    assert not Path("out/model.safetensors").exists()


def test_axolotls_own_spectrum_plugin_reads_what_is_emitted(folder, run_in, small_smollm2):
    emit("spectrum scan.json --model small_model")
    emit("axolotl scan.json --mode unfrozen --top 1 --dataset pairs.jsonl -o c.yml")
    values = yaml.safe_load(Path("c.yml").read_text())
    del values["unfrozen_parameters"]
    spectrum = {
        "plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"],
        "spectrum_top_fraction": 0.4,
        "spectrum_model_name": "small_model",
    }
    Path("c.yml").write_text(yaml.safe_dump(values | spectrum))
    run = train(run_in, on_cpu("c.yml"))
    assert run.code == 0, last_lines(run)
    published = load_scan("model_snr_results/snr_results_small-model.json")
    highest = {each.type: each.name for each in published.ranked()}
    # it always trains head and embeddings, which are one weight here
    assert trained_whole(small_smollm2, folder / "out") == {*highest.values(), "model.embed_tokens"}

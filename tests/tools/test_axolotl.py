from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from splaser_plugin.scanning.spectrum_format import load_scan
from tests.tools.runs import (
    HERE,
    SHORT_LASER,
    answer,
    axolotl_on_cpu,
    check_lasered,
    emit,
    last_lines,
    tensors,
    trained_adapters,
    trained_whole,
)


def train(run_in, config: str):
    return run_in("axolotl", "axolotl", "train", config, "--launcher", "python")


def check_valid(run_in, *configs: str) -> None:
    differences = answer(run_in("axolotl", "python", str(HERE / "strict_axolotl.py"), *configs))
    assert differences == {config: [] for config in configs}


@pytest.mark.parametrize("rl", ["", "--rl dpo"])
@pytest.mark.parametrize("mode", ["lora", "qlora", "unfrozen"])
def test_an_emitted_configuration_is_valid_whole_and_trains_the_chosen_matrices(
    mode, rl, folder, chosen, run_in, small_smollm2
):
    emit(f"axolotl scan.json --mode {mode} {rl} --top 1 --dataset pairs.jsonl -o c.yml")
    check_valid(run_in, "c.yml")
    run = train(run_in, axolotl_on_cpu("c.yml"))
    assert run.code == 0, last_lines(run)
    if mode == "unfrozen":
        assert trained_whole(small_smollm2, folder / "out") == set(chosen)
    else:
        assert trained_adapters(folder / "out") == set(chosen)


def test_the_examples_and_a_merged_file_are_valid_whole(folder, run_in):
    own = yaml.safe_load((HERE.parent / "data" / "emit" / "base_axolotl.yml").read_text())
    del own["notes"]
    own["learning_rate"] = 0.0001  # 1e-4 is a text to YAML 1.1
    Path("own.yml").write_text(yaml.safe_dump(own))
    emit("axolotl scan.json --base own.yml --top 1 -o merged.yml")
    examples = sorted(str(path) for path in (HERE.parents[1] / "examples").glob("axolotl_*.yml"))
    assert len(examples) == 3
    check_valid(run_in, "merged.yml", *examples)


@pytest.mark.parametrize("rl", ["", "--rl dpo"])
@pytest.mark.parametrize("mode", ["lora", "unfrozen"])
def test_the_plugin_scans_by_itself_and_trains_the_same(mode, rl, folder, chosen, run_in, small_smollm2):
    emit(f"axolotl scan.json --plugin --mode {mode} {rl} --top 1 --dataset pairs.jsonl -o c.yml")
    check_valid(run_in, "c.yml")
    run = train(run_in, axolotl_on_cpu("c.yml"))
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
    run = train(run_in, axolotl_on_cpu("c.yml", splaser=section))
    assert run.code == 0, last_lines(run)
    shown = [line for line in run.output.replace("\r", "\n").splitlines() if "laser: " in line]
    assert any("laser: search:" in line and "%|" in line for line in shown), "a bar"
    assert sum("  rank " in line for line in shown) == SHORT_LASER["candidates"]
    assert any("laser: lasered model: " in line for line in shown)
    reduced = check_lasered(folder / "out")
    assert reduced
    if mode == "unfrozen":
        saved, lasered = tensors(folder / "out"), tensors(folder / "out" / "lasered")
        assert all(torch.equal(saved[f"{name}.weight"], lasered[f"{name}.weight"]) for name in reduced)


def plugin_config(**section: Any) -> str:
    emit("axolotl scan.json --plugin --mode unfrozen --top 1 --dataset pairs.jsonl -o c.yml")
    values = yaml.safe_load(Path("c.yml").read_text())
    return axolotl_on_cpu("c.yml", splaser=values["splaser"] | section)


def test_the_plugin_stops_the_run_on_a_key_it_does_not_know(folder, run_in):
    run = train(run_in, plugin_config(tpo=3))
    assert run.code != 0
    assert "splaser: Value error, option 'tpo' is not known; nearest: top" in run.output
    assert not Path("out/model.safetensors").exists()


LORA = {"adapter": "lora", "lora_r": 8}
REFUSED = [
    ({}, "ConfigError: splaser: the section is missing"),
    ({"splaser": [1]}, "ConfigError: splaser: the section is missing"),
    ({"splaser": {"top": 1}}, "ConfigError: splaser.mode: Field required"),
    ({"splaser": {"mode": "all", "top": 1}}, "ConfigError: splaser.mode: Input should be 'unfrozen' or 'lora'"),
    ({"splaser": {"mode": "unfrozen"}}, "ConfigError: splaser: Value error, give one of top and fraction"),
    ({"splaser": {"mode": "unfrozen", "top": 0}}, "ConfigError: splaser: Value error, top: got 0, expected at least 1"),
    (
        {"splaser": {"mode": "unfrozen", "fraction": 1.5}},
        "ConfigError: splaser: Value error, fraction: got 1.5",
    ),
    (
        {"splaser": {"mode": "unfrozen", "top": 1, "edge": "none"}},
        "ConfigError: splaser: Value error, edge: got",
    ),
    ({"splaser": {"mode": "unfrozen", "top": 1, "by": "sigma"}}, "ConfigError: splaser: Value error, by: got 'sigma'"),
    (
        {"splaser": {"mode": "unfrozen", "top": 1, "laser": {"when": "now", "pairs": "a"}}},
        "ConfigError: splaser.laser.when: Input should be 'before' or 'after'",
    ),
    (
        {"splaser": {"mode": "unfrozen", "top": 1, "laser": {"when": "after"}}},
        "ConfigError: splaser.laser.pairs: Field required",
    ),
    (
        {"splaser": {"mode": "unfrozen", "top": 1, "laser": {"pairs": "a", "sample": 3}}},
        "ConfigError: splaser.laser: Value error, option 'sample' is not known; nearest: samples",
    ),
    ({"splaser": {"mode": "lora", "top": 1}}, "ConfigError: splaser.mode is lora, but adapter is None"),
    (
        {"splaser": {"mode": "unfrozen", "top": 1}, **LORA},
        "ConfigError: splaser.mode is unfrozen, which doesn't go with adapter",
    ),
    (
        {"splaser": {"mode": "lora", "top": 1}, **LORA, "lora_target_linear": True},
        "ConfigError: splaser.mode is lora, which doesn't go with lora_target_linear: True",
    ),
    (
        {"splaser": {"mode": "unfrozen", "top": 1}, "unfrozen_parameters": ["^lm_head"]},
        "ConfigError: splaser.mode is unfrozen, which doesn't go with unfrozen_parameters",
    ),
    (
        {"splaser": {"mode": "unfrozen", "top": 1}, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "ConfigError: splaser.mode is unfrozen: set use_reentrant",
    ),
    (
        {"splaser": {"mode": "unfrozen", "top": 1}, "plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]},
        "ConfigError: plugins: plugin axolotl.integrations.spectrum.SpectrumPlugin chooses what is trained, too",
    ),
    ({"splaser": {"mode": "unfrozen", "top": 1}}, "accepted"),
    ({"splaser": {"mode": "lora", "fraction": 0.5, "types": ["mlp"]}, **LORA}, "accepted"),
]


def test_the_plugin_says_what_it_cannot_do(folder, run_in):
    Path("configs.json").write_text(json.dumps([config for config, _ in REFUSED]))
    answers = answer(run_in("axolotl", "python", str(HERE / "plugin_refusals.py"), "configs.json"))
    assert isinstance(answers, list)
    for said, (_, expected) in zip(answers, REFUSED, strict=True):
        assert said.startswith(expected)


def test_the_plugin_stops_the_run_when_the_scan_is_of_another_model(folder, run_in, small_scan):
    stored = small_scan.to_dict()
    renamed = json.dumps(stored).replace("model.layers.2.", "model.layers.7.")
    Path("other.json").write_text(renamed)
    run = train(run_in, plugin_config(scan="other.json"))
    assert run.code != 0
    assert "its names there are others" in " ".join(run.output.split())
    assert "Loading weights" not in run.output, "the plugin checks before the model is loaded"
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
    run = train(run_in, axolotl_on_cpu("c.yml"))
    assert run.code == 0, last_lines(run)
    published = load_scan("model_snr_results/snr_results_small-model.json")
    highest = {matrix.type: matrix.name for matrix in published.ranked()}
    # it always trains head and embeddings, which are one weight here
    assert trained_whole(small_smollm2, folder / "out") == {*highest.values(), "model.embed_tokens"}

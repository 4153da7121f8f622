"""What is emitted trains exactly what was chosen, by PEFT's own matching and Axolotl's own rule, or is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from splaser_plugin import ScanConfig, scan
from splaser_plugin.checkpoints import skeleton
from splaser_plugin.config.stages import SelectConfig
from splaser_plugin.errors import MatrixError
from splaser_plugin.integrations.check import check_adapters, check_unfrozen, empty_model_of
from splaser_plugin.integrations.configs.axolotl import unfrozen_patterns
from splaser_plugin.integrations.peft import adapted_modules, lora_config
from splaser_plugin.scanning.selection import choose, lora_targets
from tests.tiny_models import CAUSAL, TEXT, build, llava, saved


def chosen(folder, *types):
    return choose(scan(folder), SelectConfig(top=1, types=types))


def check(selection, folder):
    model = str(folder)
    check_unfrozen(selection, model, empty_model_of(model), unfrozen_patterns(selection))
    check_adapters(selection, model, empty_model_of(model), target_modules=lora_targets(selection)[0])


@pytest.mark.parametrize("kind", ["llama", "llava", "qwen3_moe", "deepseek_v3", "gpt2", "exaone"])
def test_the_chosen_matrices_of_a_scan_from_disk_are_those_that_are_adapted(kind, tmp_path):
    folder = saved(llava() if kind == "llava" else build(kind, CAUSAL.get(kind, TEXT)), tmp_path)
    selection = chosen(folder, "attn" if kind == "gpt2" else "self_attn")
    check(selection, folder)
    auto = AutoModelForImageTextToText if kind == "llava" else AutoModelForCausalLM
    model = get_peft_model(auto.from_pretrained(folder), lora_config(selection, rank=2))
    assert set(adapted_modules(model)) == set(selection.names)


def test_a_tower_is_chosen_from_only_where_the_scan_was_asked_for_it(tmp_path):
    folder = saved(llava(), tmp_path)
    assert all("language_model" in name for name in choose(scan(folder), SelectConfig(top=1)).names)
    everything = scan(folder, config=ScanConfig(towers=True))
    kinds = sorted({matrix.type for matrix in everything.matrices if matrix.type.startswith("vision_tower")})
    selection = choose(everything, SelectConfig(top=1, types=tuple(kinds)))
    assert len(selection.names) == len(kinds) > 0
    check(selection, folder)
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(folder), lora_config(selection, rank=2))
    assert set(adapted_modules(model)) == set(selection.names)
    assert all("vision_tower" in name for name in selection.names)


@pytest.mark.slow
def test_targets_that_peft_turns_into_all_experts_are_refused(splaser, tmp_path):
    folder = saved(build("deepseek_v3", CAUSAL["deepseek_v3"]), tmp_path / "model")
    with pytest.raises(MatrixError, match=r"PEFT would train model\.layers\.1\.mlp\.experts\.down_proj, as 1 in all"):
        check(chosen(folder, "mlp.shared_experts.down_proj"), folder)
    with pytest.raises(MatrixError, match=r"PEFT can't adapt .*up_proj without also targeting gate_proj"):
        check(chosen(folder, "mlp.shared_experts.up_proj"), folder)
    assert splaser("scan", folder, "-o", tmp_path / "scan.json")[0] == 0
    emit = ("emit", "llamafactory", tmp_path / "scan.json", "-o", tmp_path / "train.yml", "--types")
    code, _, stderr = splaser(*emit, "mlp.shared_experts.down_proj")
    assert (code, (tmp_path / "train.yml").exists()) == (1, False)
    assert "mlp.shared_experts.down_proj.weight: PEFT has to be told it as a parameter" in stderr
    assert splaser(*emit, "self_attn")[0] == 0


def test_what_peft_has_no_layer_for_and_names_of_another_model_are_refused(tmp_path):
    folder = saved(build("mamba", CAUSAL["mamba"]), tmp_path / "mamba")
    with pytest.raises(MatrixError, match=r"PEFT can't adapt the chosen matrices .*incompatible with Mamba"):
        check(chosen(folder, "mixer.out_proj"), folder)
    advised = r"Choose other types, as mixer\.dt_proj or mixer\.in_proj or mixer\.x_proj, or train in mode"
    with pytest.raises(MatrixError, match=advised):
        check(chosen(folder, "mixer"), folder)
    check(chosen(folder, "mixer.dt_proj", "mixer.in_proj", "mixer.x_proj"), folder)
    other = saved(llava(), tmp_path / "llava")
    selection = chosen(other, "self_attn")
    on_disk = [matrix.name.replace("model.language_model.", "language_model.model.") for matrix in selection.matrices]
    old = tuple(replace(matrix, name=name) for matrix, name in zip(selection.matrices, on_disk, strict=True))
    with pytest.raises(MatrixError, match=r"language_model\.model\.layers.* is not in the model that is loaded from"):
        check(replace(selection, matrices=old), other)


def test_a_model_that_is_not_here_is_not_checked(tmp_path):
    selection = chosen(saved(build("llama", TEXT), tmp_path / "model"), "self_attn")
    check(selection, "somebody/else")
    check(selection, tmp_path / "gone")


def test_a_command_makes_the_empty_model_once(splaser, tiny_folder, tmp_path, monkeypatch):
    scan(tiny_folder).save(tmp_path / "scan.json")
    made, make = [], skeleton.empty_model
    monkeypatch.setattr(skeleton, "empty_model", lambda *given: made.append(given) or make(*given))
    for tool, name in (("peft", "adapter_config.json"), ("axolotl", "train.yml"), ("llamafactory", "train.yaml")):
        code, _, stderr = splaser("emit", tool, tmp_path / "scan.json", "--top", 2, "-o", tmp_path / name)
        assert (code, "not checked" in stderr) == (0, False)
    lora_config(choose(scan(tiny_folder), SelectConfig(top=2)), rank=2)
    assert len(made) == 4 + 1  # the scan from disk makes one, too

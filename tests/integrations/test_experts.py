"""Experts are trained a block's whole stack at a time: by PEFT's target_parameters, or unfrozen."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from splaser_plugin import scan
from splaser_plugin.config.stages import ScanConfig
from splaser_plugin.errors import ConfigError, MatrixError, ModelError
from splaser_plugin.integrations.check import check_plan, check_unfrozen, empty_model_of, named_for_peft
from splaser_plugin.integrations.configs.adapter import rank_patterns
from splaser_plugin.integrations.configs.axolotl import axolotl_yaml, unfrozen_patterns
from splaser_plugin.integrations.configs.llamafactory import llamafactory_yaml
from splaser_plugin.integrations.configs.plan import Plan, choose_rank
from splaser_plugin.integrations.freeze import check_trained, freeze_all_but
from splaser_plugin.integrations.peft import adapted_modules, lora_config
from splaser_plugin.scanning.selection import choose, lora_targets, matched_rank, trained_parameters
from tests.tiny_models import CAUSAL, build, saved

TOKENS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("experts")
    return {kind: saved(build(kind, CAUSAL[kind]), where / kind) for kind in ("mixtral", "qwen3_moe", "granitemoe")}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def delta_rank(before, after):
    """The largest rank of what was added to one expert's matrix."""
    return max(int(torch.linalg.matrix_rank(delta.double(), rtol=1e-5)) for delta in after - before)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoe"])
def test_exactly_the_chosen_stacks_and_modules_learn_and_come_back(kind, folders, tmp_path):
    selection = choose(scan(folders[kind]), top=1)
    modules, parameters = lora_targets(selection)
    assert len(parameters) == 2
    assert len(modules) == 4
    model = get_peft_model(load(folders[kind]), lora_config(selection, rank=2, task_type="CAUSAL_LM"))
    assert set(adapted_modules(model)) == set(selection.names)
    check_trained(model, selection.names)
    with pytest.raises(ModelError, match="is trained, too, as 1 in all"):
        check_trained(model, selection.names[1:])
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(2):  # B is zero at first, so that A learns from the second step on
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folders[kind]), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)

    before, after = load(folders[kind]).state_dict(), model.merge_and_unload().state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(trained_parameters(selection))
    for parameter in parameters:
        assert 0 < delta_rank(before[parameter], after[parameter]) <= 2


def test_a_stack_stands_for_the_mean_of_its_experts(folders):
    found = scan(folders["mixtral"])
    stack = "model.layers.1.mlp.experts.down_proj"
    inside = [matrix for matrix in found.matrices if matrix.stack == stack]
    assert [matrix.name for matrix in inside] == [f"{stack}[{index}]" for index in range(4)]
    selection = choose(found, fraction=1.0, by="rank", edge="mp", types=["mlp.experts"])
    chosen = {matrix.name: matrix for matrix in selection.matrices}
    assert len(chosen) == selection.considered == 4
    ranks = [matrix.edges["mp"].rank for matrix in inside]
    assert chosen[stack].value == sum(ranks) / 4
    assert (chosen[stack].parameter, chosen[stack].experts, chosen[stack].shape) == (stack, 4, inside[0].shape)
    for kind in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        values = [matrix.value for matrix in selection.matrices if matrix.type == kind]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("by", ["snr", "kappa", "random", "uniform"])
def test_every_measure_orders_stacks(by, folders):
    found = scan(folders["qwen3_moe"], config=ScanConfig(precision="svd"))
    every = choose(found, fraction=1.0, by=by, types=["mlp.experts"])
    assert {matrix.experts for matrix in every.matrices} == {4}
    values = [matrix.value for matrix in every.matrices if matrix.type == "mlp.experts.down_proj"]
    known = [value for value in values if value is not None]
    assert known == sorted(known, reverse=by != "kappa")


def test_an_expert_that_no_token_reached_counts_as_nothing(folders):
    found = scan(folders["mixtral"])
    values = {matrix.name: 0.5 for matrix in found.matrices if "layers.0.mlp.experts" not in matrix.name}
    values |= {
        matrix.name: 0.6 for matrix in found.matrices if matrix.name.endswith("layers.0.mlp.experts.down_proj[2]")
    }
    every = choose(found, fraction=1.0, by="fisher", text="x", types=["mlp.experts.down_proj"], importances=values)
    first, second = (f"model.layers.{block}.mlp.experts.down_proj" for block in (1, 0))
    assert [(matrix.name, matrix.value) for matrix in every.matrices] == [(first, 0.5), (second, 0.6 / 4)]


def test_a_stack_with_a_singular_expert_is_the_last_by_kappa(folders, tmp_path):
    model = load(folders["mixtral"])
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1, 0] = model.model.layers[0].mlp.experts.down_proj[1, 1]
        for expert in model.model.layers[1].mlp.experts.down_proj:  # ill-conditioned, all of them
            expert[0] = expert[1] + 1e-4 * expert[0]
    found = scan(saved(model, tmp_path), config=ScanConfig(precision="svd"))
    every = choose(found, fraction=1.0, by="kappa", types=["mlp.experts.down_proj"]).matrices
    assert [matrix.name.split(".")[2] for matrix in every] == ["1", "0"]
    assert every[0].value > 1000
    assert every[1].value is None


def test_an_expert_of_zeros_counts_as_nothing(folders, tmp_path):
    model = load(folders["mixtral"])
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1] = 0
    found = scan(saved(model, tmp_path))
    values = [matrix.edges["mp"].snr for matrix in found.matrices if matrix.stack.endswith("0.mlp.experts.down_proj")]
    assert values[1] is None
    every = choose(found, fraction=1.0, by="snr", edge="mp", types=["mlp.experts.down_proj"]).matrices
    of_block = {matrix.name.split(".")[2]: matrix.value for matrix in every}
    assert of_block["0"] == pytest.approx(sum(value or 0.0 for value in values) / 4)


def test_each_matrix_of_a_stack_counts_as_parameters(folders):
    selection = choose(scan(folders["mixtral"]), fraction=1.0)
    assert matched_rank(selection, 3) == 3  # as all is chosen
    model = get_peft_model(load(folders["mixtral"]), lora_config(selection, rank=3))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained == 3 * selection.block_sides


def test_the_reason_for_a_matched_rank_is_right_where_stacks_are_chosen(folders):
    rank, reason = choose_rank(choose(scan(folders["mixtral"]), top=1), "auto", 4)
    match_rank, every, chosen = map(int, re.search(r"(\d+) x (\d+) / (\d+) \(sums of rows", reason).groups())
    assert match_rank == 4
    assert round(match_rank * every / chosen) == rank


def test_the_rank_pattern_reaches_stacks(folders):
    selection = choose(scan(folders["mixtral"], config=ScanConfig(edge="mp")), fraction=1.0)
    ranks = rank_patterns(selection, 4)
    model = get_peft_model(load(folders["mixtral"]), lora_config(selection, rank=4, rank_pattern=True))
    parameters = {matrix.parameter: matrix.name for matrix in selection.matrices if matrix.parameter}
    wrappers = {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "parameter_name")
    }
    assert wrappers.keys() == parameters.keys()
    assert {name: module.r["default"] for name, module in wrappers.items()} == {name: ranks[name] for name in wrappers}
    assert {round(module.scaling["default"], 9) for module in wrappers.values()} == {2.0}


@pytest.mark.skipif(
    find_spec("peft.utils.transformers_weight_conversion") is None, reason="this PEFT takes names as they are"
)
def test_what_peft_takes_for_experts_is_named_as_a_parameter(tmp_path):
    folder = saved(build("deepseek_v3", CAUSAL["deepseek_v3"]), tmp_path)
    found = scan(folder)
    for kind in ("mlp.shared_experts.down_proj", "mlp.shared_experts.up_proj", "mlp.gate_proj"):
        selection = named_for_peft(choose(found, top=1, types=[kind]), empty_model_of(str(folder)))
        assert lora_targets(selection) == ([], [f"{name}.weight" for name in selection.names])
    model = get_peft_model(load(folder), lora_config(choose(found, top=1), rank=2))
    assert set(adapted_modules(model)) == set(choose(found, top=1).names)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    with pytest.raises(MatrixError, match="only where its weight isn't packed into 4 bits"):
        check_plan(Plan(selection=selection, mode="qlora", model=str(folder)), None)


def test_names_that_peft_may_take_for_experts_are_refused_where_the_model_is_not(splaser, tmp_path):
    folder = saved(build("deepseek_v3", CAUSAL["deepseek_v3"]), tmp_path / "model")
    replace(scan(folder), model="somebody/deepseek").save(tmp_path / "scan.json")
    for tool, name in (("peft", "adapter_config.json"), ("axolotl", "train.yml")):
        code, _, stderr = splaser("emit", tool, tmp_path / "scan.json", "--top", 1, "-o", tmp_path / name)
        assert (code, (tmp_path / name).exists()) == (1, False)
        assert "6 of 13 targets can only be checked where the model somebody/deepseek and PEFT are: run emit" in stderr
        emit = ("emit", tool, tmp_path / "scan.json", "--top", 1, "-o", tmp_path / name)
        code, _, stderr = splaser(*emit, "--types", "self_attn", "--types", "mlp.experts")
        assert code == 0
        assert "targets: not checked on the model's class" in stderr
        code, _, stderr = splaser(*emit, "--model", folder, "--overwrite")
        assert (code, "not checked" in stderr) == (0, False)


def test_without_peft_names_are_given_back_as_they_are(tmp_path, monkeypatch):
    folder = saved(build("deepseek_v3", CAUSAL["deepseek_v3"]), tmp_path)
    selection = choose(scan(folder), top=1)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert named_for_peft(selection, empty_model_of(str(folder))) == selection


def test_unfrozen_experts_are_whole_stacks(folders):
    selection = choose(scan(folders["mixtral"]), top=1)
    folder = str(folders["mixtral"])
    check_unfrozen(selection, folder, empty_model_of(folder), unfrozen_patterns(selection))
    model = load(folders["mixtral"])
    freeze_all_but(model, selection.names)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(trained_parameters(selection))
    check_trained(model, selection.names)


def test_axolotl_gets_them_as_parameters_and_llamafactory_has_no_key_for_them(folders, tmp_path):
    selection = choose(scan(folders["mixtral"]), top=1)
    modules, parameters = lora_targets(selection)
    plan = Plan(selection=selection, mode="lora")
    check_plan(plan, empty_model_of(selection.model))
    values = yaml.safe_load(axolotl_yaml(plan))
    assert (values["lora_target_modules"], values["lora_target_parameters"]) == (modules, parameters)
    base = tmp_path / "base.yml"
    base.write_text("lora_dropout: 0.05\nlora_target_parameters: [other]\n")
    with pytest.raises(ConfigError, match=r"lora_dropout 0\.05: PEFT has no dropout for experts"):
        axolotl_yaml(plan, base=base)
    base.write_text("lora_target_parameters: [other]\n")
    assert yaml.safe_load(axolotl_yaml(plan, base=base))["lora_target_parameters"] == parameters
    attention = choose(scan(folders["mixtral"]), top=1, types=["self_attn"])
    assert "lora_target_parameters" not in yaml.safe_load(
        axolotl_yaml(Plan(selection=attention, mode="lora"), base=base)
    )
    with pytest.raises(MatrixError, match=r"experts\..*LLaMA-Factory has no key for that"):
        llamafactory_yaml(plan)
    with pytest.raises(ConfigError, match=r"dropout 0.1: PEFT has none for model\.layers"):
        lora_config(selection, dropout=0.1)


def test_experts_that_peft_would_adapt_as_one_matrix_are_refused(tmp_path):
    folder = saved(build("dbrx", CAUSAL["dbrx"]), tmp_path)
    selection = choose(scan(folder), top=1, types=["ffn"])
    with pytest.raises(MatrixError, match=r"PEFT would adapt .* as 1 matrices, and it holds 4 experts"):
        lora_config(selection)


def test_emit_writes_what_peft_reads(splaser, folders, tmp_path):
    assert splaser("scan", folders["qwen3_moe"], "-o", tmp_path / "scan.json")[0] == 0
    assert splaser("emit", "peft", tmp_path / "scan.json", "-o", tmp_path / "adapter_config.json")[0] == 0
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    model: nn.Module = get_peft_model(load(folders["qwen3_moe"]), LoraConfig.from_pretrained(tmp_path))
    assert {name for name in adapted_modules(model) if "experts" in name} == set(stored["target_parameters"])
    assert len(stored["target_parameters"]) == 4

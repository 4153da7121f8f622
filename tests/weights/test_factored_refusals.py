"""Damaged folders of factored models, and configurations that lie."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import splaser_plugin  # noqa: F401, transformers' own loader knows the format from here on
from splaser_plugin import load
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.factored_folder import save_model
from tests.weights.factored_models import QUERY, lasered, small_llama

LOADERS = [load, AutoModelForCausalLM.from_pretrained]
EXPECTED = r"expected module names, each with a form \(rows, columns, two factors\) and a rank of at least 1"


def edit_config(folder, layers):
    """layers: what to put there, or a function of what is there."""
    config = json.loads((folder / "config.json").read_text())
    listed = config["quantization_config"]
    listed["layers"] = layers(listed["layers"]) if callable(layers) else layers
    (folder / "config.json").write_text(json.dumps(config))


def with_layer(name, **stored):
    return lambda old: {**old, name: {**old.get(name, {"form": "rows"}), **stored}}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["a"], rf"config\.json: quantization_config: layers is \['a'\], {EXPECTED}"),
        (None, EXPECTED),
        ({QUERY: 5}, EXPECTED),
        ({QUERY: {"rank": 5}}, EXPECTED),
        ({QUERY: {"form": "diagonal", "rank": 5}}, EXPECTED),
        ({QUERY: {"form": ["rows"], "rank": 5}}, EXPECTED),
        ({QUERY: {"form": "rows", "rank": 5, "more": 1}}, EXPECTED),
        (with_layer(QUERY, rank=0), EXPECTED),
        (with_layer(QUERY, rank=True), EXPECTED),
        (with_layer(QUERY, rank="5"), EXPECTED),
        (with_layer(QUERY, rank=32), rf"{QUERY}: rank 32, but its shape \(32, 32\) allows at most 31"),
        (with_layer(QUERY, rank=10**30), f"{QUERY}: rank 1{'0' * 30}, but its shape"),
        (with_layer(QUERY, rank=4), rf"tensor '{QUERY}.\w+' has shape .*, expected .* by config\.json"),
        (
            with_layer(QUERY, form="two factors"),
            rf"tensor '{QUERY}.\w+' (has shape .*, expected .* by config\.json|is missing)",
        ),
        (with_layer("model.layers.9.mlp", rank=4), "'model.layers.9.mlp' is no linear layer of this model; nearest"),
        (with_layer("model.embed_tokens", rank=4), "'model.embed_tokens' is no linear layer of this model"),
        (with_layer("", rank=4), "'' is no linear layer of this model"),
        (
            with_layer("model.layers.1.mlp.up_proj", rank=4),
            r"model\.safetensors: tensor 'model.layers.1.mlp.up_proj.weight' has shape \(64, 32\), expected \(4, 32\)",
        ),
    ],
)
def test_a_configuration_that_lies_is_refused(saved, layers, message, loader):
    edit_config(saved[1], layers)
    with pytest.raises(CheckpointError, match=message):
        loader(saved[1])


@pytest.mark.parametrize("loader", LOADERS)
def test_a_layer_that_is_not_listed_is_refused(saved, loader):
    edit_config(saved[1], lambda old: {name: stored for name, stored in old.items() if name != QUERY})
    with pytest.raises(CheckpointError, match=rf"tensor '{QUERY}.weight' has shape .*, expected \(32, 32\)"):
        loader(saved[1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", "abc", r"config\.json: makes no causal language model \(StrictDataclass"),
        ("num_attention_heads", 0, r"config\.json: makes no causal language model \(ZeroDivisionError"),
        ("hidden_act", "zzz", r"config\.json: makes no causal language model \(KeyError: 'zzz'\)"),
        ("model_type", "t5", r"config\.json: makes no causal language model"),
        ("vocab_size", 10**15, r"tensor '\w+\.\S+' has shape \(64, 32\), expected \(1000000000000000, 32\)"),
        ("num_hidden_layers", 3, "tensor 'model.layers.2.input_layernorm.weight' is missing"),
    ],
)
def test_a_configuration_of_another_model_is_refused(saved, key, value, message):
    file = saved[1] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=message):
        load(saved[1])


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def with_changed(name, change):
    return lambda state: {**state, name: change(state[name]).contiguous()}


def change_file(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{QUERY}.interpolation"), f"tensor '{QUERY}.interpolation' is missing"),
        (without(f"{QUERY}.weight"), f"tensor '{QUERY}.weight' is missing"),
        (without(f"{QUERY}.order"), f"tensor '{QUERY}.order' is missing"),
        (
            with_changed(f"{QUERY}.weight", lambda t: t[:4, :3]),
            rf"safetensors: tensor '{QUERY}.weight' has shape \(4, 3\)",
        ),
        (
            with_changed(f"{QUERY}.interpolation", lambda t: t.T),
            rf"'{QUERY}.interpolation' has shape \(\d+, \d+\), expected \(",
        ),
        (
            with_changed(f"{QUERY}.weight", torch.Tensor.long),
            rf"tensor '{QUERY}.weight' is torch.int64, expected float",
        ),
        (
            with_changed(f"{QUERY}.order", torch.Tensor.float),
            rf"tensor '{QUERY}.order' is torch.float32, expected torch.int32",
        ),
        (with_changed(f"{QUERY}.order", lambda t: t + 1), rf"tensor '{QUERY}.order' holds not each place once"),
        (with_changed(f"{QUERY}.order", lambda t: t * 0), rf"tensor '{QUERY}.order' holds not each place once"),
    ],
)
def test_a_factored_layer_whose_tensors_are_missing_or_at_odds_is_refused(saved, change, message, loader):
    change_file(saved[1], change)
    with pytest.raises(CheckpointError, match=message):
        loader(saved[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm.weight"), "tensor 'model.norm.weight' is missing"),
        (lambda state: {**state, "model.extra": torch.zeros(3)}, "tensor 'model.extra' belongs to no layer"),
    ],
)
def test_tensors_elsewhere_that_are_missing_or_left_over_are_refused(saved, change, message):
    change_file(saved[1], change)
    with pytest.raises(CheckpointError, match=message):
        load(saved[1])


def test_a_file_that_was_cut_off_is_refused(saved):
    file = saved[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* cut off"):
        load(saved[1])


@pytest.mark.parametrize("loader", LOADERS)
def test_a_factored_head_that_is_tied_is_refused(tmp_path, loader):
    save_model(lasered(small_llama(tie_word_embeddings=True)), tmp_path, None)
    edit_config(tmp_path, with_layer("lm_head", rank=4))
    with pytest.raises(CheckpointError, match="lm_head shares its weight with another layer"):
        loader(tmp_path)

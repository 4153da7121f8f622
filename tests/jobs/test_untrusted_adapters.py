"""Untrusted adapters and embedders, through the command line: refused in one line, or harmless."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model

from splaser_plugin.checkpoints.trust import check_adapter_folder
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.loading import load_model
from tests.builders import FLAGS, tiny_llama
from tests.jobs.damage import Bomb, config_text, refused, rewrite_header, truncate


@pytest.fixture
def adapter(tmp_path):
    """A PEFT adapter of the tiny model, as PEFT saves it."""
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapter_bomb(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({LORA: Bomb(folder.parent / "exploded")}))


def adapter_tensors(change):
    def damage(folder):
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        safetensors.torch.save_file(change(tensors), folder / "adapter_model.safetensors")

    return damage


def adapter_config(**values):
    def damage(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return damage


ADAPTERS = {
    "pickled code": (adapter_bomb, r"adapter_model\.bin: pickled weights can run code.*--allow-pickle"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "there is no adapter_model.safeten"),
    "reversed offsets": (
        lambda folder: rewrite_header(
            folder / "adapter_model.safetensors", lambda header: header[LORA].update(data_offsets=[8, 0])
        ),
        rf"adapter_model\.safetensors: tensor '{LORA}': data_offsets",
    ),
    "truncated": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-8]
        ),
        r"adapter_model\.safetensors: tensor '.*' ends at byte",
    ),
    "missing tensor": (
        adapter_tensors(lambda tensors: {name: tensor for name, tensor in tensors.items() if name != LORA}),
        rf"adapter_model\.safetensors: tensor '{LORA}' is missing",
    ),
    "tensor of another model": (
        adapter_tensors(lambda tensors: {**tensors, LORA.replace("layers.0", "layers.9"): torch.ones(4, 32)}),
        r"layers\.9\.self_attn\.q_proj\.lora_A\.weight' has no place in this model",
    ),
    "other shape": (
        adapter_tensors(lambda tensors: {**tensors, LORA: torch.ones(4, 31)}),
        "can't be merged into this model",
    ),
    "import of a module": (adapter_config(megatron_config={}, megatron_core="theirs"), "megatron_config can't be used"),
    "unknown kind": (adapter_config(peft_type="NONSENSE"), "can't be merged into this model"),
    "config nested deeply": (
        lambda folder: (folder / "adapter_config.json").write_text("[" * 200_000),
        r"adapter_config\.json: its JSON is nested too deeply",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "message"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_a_damaged_adapter_is_refused_in_one_line(splaser, tiny_folder, adapter, pairs_file, tmp_path, damage, message):
    damage(adapter)
    arguments = ["laser", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "out", "--adapter", adapter]
    refused(splaser(*arguments, *FLAGS), message, tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


def test_a_pickled_adapter_is_merged_where_pickles_are_allowed(tiny_folder, adapter):
    merged, _ = load_model(tiny_folder, device="cpu", adapter=adapter)
    file = adapter / "adapter_model.safetensors"
    torch.save(safetensors.torch.load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    again, _ = load_model(tiny_folder, device="cpu", adapter=adapter, allow_pickle=True)
    assert all(map(torch.equal, merged.state_dict().values(), again.state_dict().values()))
    with pytest.raises(CheckpointError, match="pickled"):
        check_adapter_folder(adapter)


def embedder_bomb(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Bomb(folder.parent / "exploded")}))


def embedder_code(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "theirs.Module"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "theirs.py").write_text(f"open({str(folder.parent / 'exploded')!r}, 'w')\nclass Module: pass\n")


EMBEDDERS = {
    "pickled code": (embedder_bomb, r"pytorch_model\.bin: pickled weights can run code"),
    "code of its own": (embedder_code, "embedder '.*' can't be loaded"),
    "truncated": (truncate, r"model\.safetensors: tensor '.*' ends at byte"),
    "config nested deeply": (config_text("[" * 200_000), "embedder '.*' can't be loaded"),
}


@pytest.mark.real
@pytest.mark.parametrize(("damage", "message"), EMBEDDERS.values(), ids=EMBEDDERS.keys())
def test_a_damaged_embedder_is_refused_in_one_line(
    splaser, tiny_folder, minilm, pairs_file, tmp_path, monkeypatch, damage, message
):
    embedder = Path(shutil.copytree(minilm, tmp_path / "embedder"))
    damage(embedder)
    monkeypatch.syspath_prepend(str(embedder))
    arguments = ["laser", tiny_folder, "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS, "--embedder", embedder]
    refused(splaser(*arguments), message, tmp_path / "out")
    assert not (tmp_path / "exploded").exists()

"""Checkpoints of compressed-tensors are read as the weights that they stand for, decoded here bit by bit."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from splaser_plugin import scan
from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.loading import load_model
from splaser_plugin.weights.stored import BESIDE_WEIGHTS, StoredWeights
from tests.builders import VOCABULARY
from tests.tiny_models import CAUSAL, TEXT, build, change, configure, saved

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 8
WIDE = TEXT | {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}


def packed_bits(codes, bits):
    """Codes (rows, columns) of 0 to 2 ** bits - 1, in 32-bit words along the rows, lowest bits first."""
    rows, columns = codes.shape
    words = torch.zeros(rows, -(-columns * bits // 32), dtype=torch.int64)
    for row in range(rows):
        for column in range(columns):
            word, place = divmod(column * bits, 32)
            words[row, word] |= int(codes[row, column]) << place
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


def four_bits(weight, *, symmetric=True):
    rows, columns = weight.shape
    scales = (torch.rand(rows, columns // GROUP) + 0.5).bfloat16()
    zeros = torch.zeros_like(scales) if symmetric else torch.randint(-8, 8, scales.shape).float()
    codes = torch.randint(-8, 8, (rows, columns))
    meant = (codes - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)
    parts = {"packed": packed_bits(codes + 8, 4), "scale": scales, "shape": torch.tensor([rows, columns])}
    if not symmetric:
        parts["zero_point"] = packed_bits((zeros + 8).long().T, 4).T.contiguous()
    return parts, meant


def eight_bits(weight):
    codes, scales = torch.randint(-128, 128, weight.shape, dtype=torch.int8), torch.rand(len(weight), 1) + 0.5
    return {"": codes, "scale": scales.bfloat16()}, codes * scales.bfloat16().float()


def floats(weight):
    codes, scale = weight.to(torch.float8_e4m3fn), torch.tensor([0.3])
    return {"": codes, "scale": scale}, codes.float() * scale


def nvfp4(weight):
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns))
    scales = (torch.rand(rows, columns // 16) * 100 + 1).to(torch.float8_e4m3fn)
    overall = torch.tensor([37.0])
    values = torch.tensor([[E2M1[code & 7] * (-1 if code & 8 else 1) for code in row] for row in codes.tolist()])
    meant = values * (scales.float() / overall).repeat_interleave(16, 1)
    return {"packed": (codes[:, ::2] | codes[:, 1::2] << 4).byte(), "scale": scales, "global_scale": overall}, meant


def group(bits, kind, strategy, size=None, symmetric=True):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": size, "symmetric": symmetric}
    return {"targets": ["Linear"], "weights": weights}


LAYOUTS = {
    "pack-quantized": (four_bits, group(4, "int", "group", GROUP)),
    "pack-quantized, asymmetric": (
        lambda weight: four_bits(weight, symmetric=False),
        group(4, "int", "group", GROUP, symmetric=False),
    ),
    "int-quantized": (eight_bits, group(8, "int", "channel")),
    "float-quantized": (floats, group(8, "float", "tensor")),
    "naive-quantized": (floats, group(8, "float", "tensor")),
    "nvfp4-pack-quantized": (nvfp4, group(4, "float", "tensor_group", 16)),
}


def compressed(folder, layout, model, **settings):
    """The folder in that layout, and the weights that it stands for by their names on disk."""
    coded, of_group = LAYOUTS[layout]
    meant = {}

    def compress(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight") or ".experts." in name]:
            layer = name.removesuffix(".weight")
            parts, meant[name] = coded(tensors.pop(name))
            tensors |= {f"{layer}.weight_{last}".removesuffix("_"): part for last, part in parts.items()}
            tensors[f"{layer}.input_scale"] = torch.ones(1)
            tensors[f"{layer.rpartition('.')[0]}.k_scale"] = torch.ones(1)
        return tensors

    saved(model, folder)
    change(folder, compress)
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": layout.partition(",")[0],
        "config_groups": {"group_0": of_group},
        "ignore": ["lm_head"],
        **settings,
    }
    configure(folder, quantization_config=quantisation)
    return meant


needs_the_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="the extra compressed-tensors isn't installed"
)


@needs_the_library
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_as_the_weights_it_stands_for(layout, tmp_path):
    meant = compressed(tmp_path, layout, build("llama", WIDE))
    stored = StoredWeights(open_checkpoint(tmp_path))
    assert stored.note == ""
    assert f"14 tensors in {layout.partition(',')[0]} (" in stored.stored_as
    matrices, skipped = stored.matrices()
    assert {matrix.parameter for matrix in matrices} == set(meant)
    assert {left.name.rpartition(".")[2] for left in skipped if "scale" in left.name} == {"input_scale", "k_scale"}
    assert {left.reason for left in skipped if "scale" in left.name} == {BESIDE_WEIGHTS}
    for matrix, weight in stored.stream(matrices, matrices):
        torch.testing.assert_close(weight, meant[matrix.parameter], rtol=1e-6, atol=0)


@needs_the_library
def test_the_experts_of_a_mixture_are_put_together_and_loaded(tokenizer, tmp_path):
    model = build("mixtral", CAUSAL["mixtral"] | {"vocab_size": VOCABULARY})
    meant = compressed(tmp_path, "pack-quantized", model)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu")
    disk = "model.layers.1.block_sparse_moe.experts.3"
    gate_up = torch.cat([meant[f"{disk}.w1.weight"], meant[f"{disk}.w3.weight"]])
    torch.testing.assert_close(loaded.model.layers[1].mlp.experts.gate_up_proj[3], gate_up, rtol=1e-6, atol=0)


def without(last):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(last)}


@needs_the_library
@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        (without("0.mlp.up_proj.weight_shape"), {}, "of a layer without weight_shape, expected weight_packed"),
        (without("nothing"), {"format": "marlin-24"}, "of a layer in 'marlin-24', expected one of pack-quantized"),
        (without("nothing"), {"config_groups": {}}, "a layer that 0 groups of config.json quantise, expected one"),
        (without("nothing"), {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse formats"),
        (without("nothing"), {"config_groups": {"group_0": {"targets": 3}}}, "doesn't know its quantization_config"),
        (
            lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight_g_idx": torch.arange(32)},
            {},
            "with weight_g_idx beside it",
        ),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line_with_the_next_step(changed, settings, message, tmp_path):
    compressed(tmp_path, "pack-quantized", build("llama", WIDE), **settings)
    change(tmp_path, changed)
    with pytest.raises(CheckpointError, match=message + ".*Give the model in bfloat16 or float32") as refusal:
        scan(tmp_path)
    assert "\n" not in str(refusal.value)


def test_without_the_library_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    compressed(tmp_path, "pack-quantized", build("llama", WIDE))
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors.quantization", None)
    with pytest.raises(CheckpointError, match=r"pip install 'splaser_plugin\[compressed-tensors\]'"):
        scan(tmp_path)

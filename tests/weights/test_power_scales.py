"""Scales that are powers of two, 4-bit experts, and stacks of experts with scales of their own."""

from __future__ import annotations

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from splaser_plugin import scan
from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.checkpoints.header import EXPONENTS
from splaser_plugin.checkpoints.quantised import quantised_weights, read_weights
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.stored import NOT_IN_MODEL, StoredWeights
from tests.architectures.tiny import tiny_config
from tests.builders import save_single
from tests.reference import as_transformers
from tests.tiny_models import CAUSAL, TEXT, build, change, configure, saved

HAS_EXPONENTS = pytest.mark.skipif(torch.uint8 == EXPONENTS, reason="torch 2.7 has this dtype first")
UE8M0 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0"}
E4M3 = [
    (-1) ** (code >> 7) * (2 ** ((code >> 3 & 15) - 7) * (1 + (code & 7) / 8) if code >> 3 & 15 else (code & 7) * 2**-9)
    for code in range(256)
]
"""The value of each 8-bit code, by the format's definition; of 127 and 255, which are no numbers, not looked at."""
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]


def bytes_of(shape, seed, low=0, high=256):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def codes_of(shape, seed):
    found = bytes_of(shape, seed)
    return found.masked_fill((found & 127) == 127, 0)


def slowly(codes, exponents, block, *, packed=False):
    """Entry by entry, in Python's floats."""
    rows, columns = codes.shape[0], codes.shape[1] * (2 if packed else 1)
    meant = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            value = E2M1[int(codes[i, j // 2]) >> 4 * (j % 2) & 15] if packed else E4M3[int(codes[i, j])]
            meant[i, j] = value * 2.0 ** (int(exponents[i // block[0], j // block[1]]) - 127)
    return meant


def read(folder, tensors, settings, name):
    save_single(folder, tensors)
    (folder / "config.json").write_text("{}")
    configure(folder, quantization_config=settings)
    checkpoint = open_checkpoint(folder)
    (found,) = read_weights(checkpoint, quantised_weights(checkpoint), [name], torch.float32)
    return found[1]


@pytest.mark.parametrize("last", ["weight_scale_inv", "scale"])
@pytest.mark.parametrize("block", [(4, 8), (1, 32)])
@pytest.mark.parametrize("dtype", [torch.uint8, pytest.param(EXPONENTS, marks=HAS_EXPONENTS)])
def test_exponents_are_scales_to_the_last_bit(dtype, block, last, tmp_path):
    """Blocks as of DeepSeek-V3.1, and those of MXFP8, whose scales are stored as bytes."""
    codes, exponents = codes_of((8, 64), 0), bytes_of((8 // block[0], 64 // block[1]), 1, 100, 150)
    tensors = {"a.weight": codes.view(torch.float8_e4m3fn), f"a.{last}": exponents.view(dtype)}
    found = read(tmp_path, tensors, UE8M0 | {"weight_block_size": list(block)}, "a.weight")
    assert torch.equal(found.double(), slowly(codes, exponents, block))
    assert torch.equal(found, as_transformers(*tensors.values()))


def test_every_exponent_is_its_power_and_the_last_is_no_number(tmp_path):
    one = torch.full((256, 1), 0x38, dtype=torch.uint8)  # 1.0
    tensors = {"a.weight": one.view(torch.float8_e4m3fn), "a.weight_scale_inv": torch.arange(256).byte()[:, None]}
    found = read(tmp_path, tensors, UE8M0 | {"weight_block_size": [1, 1]}, "a.weight").flatten().tolist()
    assert found[:255] == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(found[255])


@pytest.mark.parametrize("dtype", [torch.uint8, pytest.param(EXPONENTS, marks=HAS_EXPONENTS)])
def test_four_bit_experts_are_unpacked_to_the_last_bit(dtype, tmp_path):
    codes, exponents = bytes_of((6, 48), 2), bytes_of((6, 3), 3, 100, 150)
    tensors = {"layers.0.ffn.experts.0.w1.weight": codes.view(torch.int8)}
    tensors["layers.0.ffn.experts.0.w1.scale"] = exponents.view(dtype)
    found = read(tmp_path, tensors, UE8M0 | {"weight_block_size": [128, 128]}, "layers.0.ffn.experts.0.w1.weight")
    assert torch.equal(found.double(), slowly(codes, exponents, (1, 32), packed=True))
    assert torch.equal(found, as_transformers(*tensors.values()))


def test_a_stack_of_experts_has_its_own_scales_and_is_read_an_expert_at_a_time(tmp_path):
    codes = codes_of((3, 8, 16), 4)
    scales = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(5)) + 0.5
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name: codes.view(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    whole = read(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 8]}, name)
    assert torch.equal(whole, as_transformers(*tensors.values()))
    stored = StoredWeights(open_checkpoint(tmp_path))
    matrices, _ = stored.matrices()
    assert [matrix.name for matrix in matrices] == [f"{name}[{index}]" for index in range(3)]
    for (matrix, weight), meant in zip(stored.stream(matrices, matrices), whole, strict=True):
        assert torch.equal(weight, meant), matrix.name


@pytest.mark.parametrize("block", [(4, 8), (5, 8), (96, 16), (1, 16)])
def test_experts_in_one_2d_tensor_are_read_one_by_one(block, tmp_path):
    """DBRX's, 24 rows each: whole blocks of rows, blocks across two experts, one for all, and one a row."""
    stacks = {}

    def quantise(tensors):
        for name in [name for name in tensors if ".experts.mlp." in name]:
            codes = codes_of(tuple(tensors[name].shape), len(stacks)).view(torch.float8_e4m3fn)
            grid = [-(-size // of) for size, of in zip(codes.shape, block, strict=True)]
            scales = torch.rand(grid, generator=torch.Generator().manual_seed(9)) + 0.5
            tensors |= {name: codes, f"{name}_scale_inv": scales}
            of_each = [[scales[i // block[0], j // block[1]] for j in range(16)] for i in range(len(codes))]
            stacks[name] = codes.float() * torch.tensor(of_each)
        return tensors

    change(saved(build("dbrx", CAUSAL["dbrx"]), tmp_path), quantise)
    configure(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": list(block)})
    stored = StoredWeights(open_checkpoint(tmp_path))
    assert stored.note == ""
    matrices = [matrix for matrix in stored.matrices()[0] if matrix.expert is not None]
    assert len(matrices) == 2 * 3 * 4
    for matrix, weight in stored.stream(matrices, matrices):
        rows = slice(24 * matrix.expert, 24 * (matrix.expert + 1))
        assert torch.equal(weight, stacks[matrix.parameter][rows]), matrix.name


def test_deepseek_v4_is_read_by_its_own_names(tmp_path):
    """8-bit attention in blocks, 4-bit experts in groups of 32, both with `scale` beside them."""
    if "deepseek_v4" not in CONFIG_MAPPING:
        pytest.skip("this version of transformers doesn't know it")
    config = tiny_config("deepseek_v4")
    config.moe_intermediate_size = 32
    model = AutoModelForCausalLM.from_config(config)
    meant = {}

    def quantise(tensors):
        for name in [name for name in tensors if re.search(r"\.attn\.w\w+\.weight|\.experts\.\d+\.w\d\.weight", name)]:
            rows, columns = tensors[name].shape
            if ".experts." in name:
                codes, grid = bytes_of((rows, columns // 2), 6).view(torch.int8), (rows, columns // 32)
            else:
                codes, grid = codes_of((rows, columns), 7).view(torch.float8_e4m3fn), (rows // 4, columns // 4)
            scales = bytes_of(grid, 8, 110, 120).view(EXPONENTS)
            meant[name] = as_transformers(codes, scales)
            tensors |= {name: codes, name.replace(".weight", ".scale"): scales}
        return tensors

    change(saved(model, tmp_path / "codes"), quantise)
    change(saved(model, tmp_path / "plain"), lambda tensors: tensors | meant)
    configure(tmp_path / "codes", quantization_config=UE8M0 | {"weight_block_size": [4, 4]})
    plain, found = (StoredWeights(open_checkpoint(tmp_path / which)) for which in ("plain", "codes"))
    assert found.note == ""
    weights = {matrix.name: weight for matrix, weight in found.stream(*2 * [found.matrices()[0]])}
    assert len([name for name in weights if "experts" in name]) >= 2 * 2 * 4
    for matrix, weight in plain.stream(*2 * [plain.matrices()[0]]):
        assert torch.equal(weights.pop(matrix.name), weight), matrix.name
    assert not weights
    assert "float4_e2m1 with scales" in found.stored_as


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"a.weight_scale_inv": torch.ones(2, 2).byte()}, {"scale_fmt": "float"}, r"shape \(2, 2\) in uint8, expected"),
        ({"a.weight_scale_inv": torch.ones(2, 1).byte()}, {}, r"\(2, 1\) in uint8, expected float scales .* \(2, 2\)"),
        ({"a.weight": torch.ones(8, 16).char(), "a.scale": torch.ones(8, 2)}, {}, r"\(8, 2\).*expected .*\(8, 1\)"),
        ({"a.weight": torch.ones(8, 9).char(), "a.scale": torch.ones(8, 2)}, {}, "expected whole groups of 32"),
    ],
)
def test_other_shapes_and_dtypes_of_scales_are_refused(tensors, settings, message, tmp_path):
    weight = {"a.weight": torch.ones(8, 16).to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, weight | tensors, UE8M0 | {"weight_block_size": [4, 8]} | settings, "a.weight")


@HAS_EXPONENTS
def test_powers_of_two_that_belong_to_nothing_are_left_out_with_a_reason(tmp_path):
    saved(build("llama", TEXT), tmp_path)
    extra = "model.layers.0.mlp.down_proj.extra"
    before = scan(tmp_path)
    change(tmp_path, lambda tensors: tensors | {extra: torch.ones(4, 4).to(EXPONENTS)})
    found = scan(tmp_path)
    assert found.matrices == before.matrices
    assert [left.reason for left in found.skipped if left.name == extra] == [NOT_IN_MODEL]
    (tmp_path / "config.json").unlink()
    found = scan(tmp_path)
    assert [left.reason for left in found.skipped if left.name == extra] == ["float8_e8m0fnu, so it holds no weights"]
    assert load_file(tmp_path / "model.safetensors")[extra].dtype == EXPONENTS

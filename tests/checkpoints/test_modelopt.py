"""Checkpoints of NVIDIA's ModelOpt are read as the weights that they stand for, decoded here bit by bit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from splaser_plugin import LaserConfig, laser, scan
from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.checkpoints.quantised import quantised_weights, read_weights
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.loading import load_model
from splaser_plugin.weights.stored import BESIDE_WEIGHTS, StoredWeights
from tests.builders import VOCABULARY
from tests.tiny_models import CAUSAL, TEXT, build, change, configure, saved

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]
E4M3 = torch.float8_e4m3fn
WIDE = TEXT | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
SETTINGS = {"quant_method": "modelopt", "producer": {"name": "modelopt"}}
OWN_FILE = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def float4(shape):
    """Codes (rows, columns), scales for 16 of a row, the tensor's scale; and entry by entry what they stand for."""
    codes, overall = torch.randint(0, 16, shape), torch.tensor(0.0123)
    scales = (torch.rand(shape[0], shape[1] // 16) * 100 + 1).to(E4M3)
    meant = torch.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            meant[row, column] = E2M1[codes[row, column]] * (scales[row, column // 16].float() * overall)
    return codes, scales, overall, meant


def nvfp4(weight):
    codes, scales, overall, meant = float4(weight.shape)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).byte()
    return {"": packed, "_scale": scales, "_scale_2": overall}, meant


def mxfp8(weight):
    codes, scales = weight.to(E4M3), torch.randint(110, 140, (len(weight), weight.shape[1] // 32)).byte()
    meant = torch.empty(weight.shape)
    for column in range(weight.shape[1]):
        meant[:, column] = codes[:, column].float() * 2.0 ** (scales[:, column // 32].float() - 127)
    return {"": codes, "_scale": scales}, meant


def fp8(weight):
    codes, scale = weight.to(E4M3), torch.tensor(0.37)
    return {"": codes, "_scale": scale}, codes.float() * scale


def fp8_rows(weight):
    codes, scales = weight.to(E4M3), torch.rand(len(weight)) + 0.5
    return {"": codes, "_scale": scales}, torch.stack([row.float() * s for row, s in zip(codes, scales, strict=True)])


def fp8_blocks(weight):
    """The scales as they are exported, (down, 1, across, 1)."""
    down, across = (math.ceil(size / 128) for size in weight.shape)
    codes, scales = weight.to(E4M3), torch.rand(down, 1, across, 1) + 0.5
    meant = torch.empty(weight.shape)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 128):
            part = slice(start, start + 128)
            meant[row, part] = codes[row, part].float() * scales[row // 128, 0, start // 128, 0]
    return {"": codes, "_scale": scales}, meant


LAYOUTS = {"NVFP4": nvfp4, "MXFP8": mxfp8, "FP8": fp8, "FP8_PER_CHANNEL_PER_TOKEN": fp8_rows}


def quantised(folder, layout, model, settings=SETTINGS):
    """The folder in that layout, and the weights that it stands for by their names on disk."""
    meant = {}

    def quantise(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            parts, meant[name] = LAYOUTS[layout](tensors.pop(name))
            layer = name.removesuffix("weight")
            tensors |= {f"{name}{last}": part for last, part in parts.items()}
            tensors |= {f"{layer}input_scale": torch.tensor(1.0), f"{layer}k_scale": torch.tensor(1.0)}
        return tensors

    torch.manual_seed(1)
    saved(model, folder)
    change(folder, quantise)
    if settings is None:
        (folder / "hf_quant_config.json").write_text(json.dumps(OWN_FILE))
    else:
        configure(folder, quantization_config=settings | {"quant_algo": layout})
    return meant


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_as_the_weights_it_stands_for(layout, tmp_path):
    meant = quantised(tmp_path, layout, build("llama", WIDE))
    stored = StoredWeights(open_checkpoint(tmp_path))
    assert stored.note == ""
    assert (
        stored.stored_as == f"14 tensors in {'NVFP4 (ModelOpt)' if layout == 'NVFP4' else 'float8_e4m3fn with scales'}"
    )
    matrices, skipped = stored.matrices()
    assert {matrix.parameter for matrix in matrices} == set(meant)
    beside = {name for name in load_file(tmp_path / "model.safetensors") if name.endswith(("input_scale", "k_scale"))}
    assert {left.name for left in skipped if "scale" in left.name} == beside
    assert {left.reason for left in skipped if left.name in beside} == {BESIDE_WEIGHTS}
    for matrix, weight in stored.stream(matrices, matrices):
        assert torch.equal(weight, meant[matrix.parameter]), matrix.name


@pytest.mark.parametrize("has_ones", [True, False])
def test_blocks_of_128_are_cut_off_at_the_end(has_ones, tmp_path):
    torch.manual_seed(0)
    parts, meant = fp8_blocks(torch.randn(200, 300))
    saved(build("llama", WIDE), tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    parts["_scale"] = parts["_scale"] if has_ones else parts["_scale"][:, 0, :, 0].contiguous()
    change(tmp_path, lambda _: {f"{name}{last}": part for last, part in parts.items()})
    configure(tmp_path, quantization_config=SETTINGS)
    checkpoint = open_checkpoint(tmp_path)
    ((_, found),) = read_weights(checkpoint, quantised_weights(checkpoint), [name], torch.float32)
    assert torch.equal(found, meant)


def test_nvfp4_is_dequantised_as_by_modelopt(tmp_path):
    library = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    quantised(tmp_path, "NVFP4", build("llama", WIDE))
    tensors = load_file(tmp_path / "model.safetensors")
    stored = StoredWeights(open_checkpoint(tmp_path))
    matrices, _ = stored.matrices()
    for matrix, weight in stored.stream(matrices, matrices):
        codes = library.NVFP4QTensor(weight.shape, torch.float32, tensors[matrix.parameter])
        scale, overall = (tensors[f"{matrix.parameter}_{last}"] for last in ("scale", "scale_2"))
        assert torch.equal(weight, codes.dequantize(scale=scale, double_scale=overall, block_sizes={-1: 16}))


def test_a_stack_of_experts_is_packed_along_its_inputs_and_read_an_expert_at_a_time(tmp_path):
    torch.manual_seed(0)
    three = [float4((8, 32)) for _ in range(3)]
    codes, scales, overall, meant = (torch.stack(list(part)) for part in zip(*three, strict=True))
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).byte().transpose(1, 2)
    name = "model.layers.0.mlp.experts.down_proj"
    own = {f"{name}_weight_scale": scales.transpose(1, 2), f"{name}_weight_scale_2": overall[0]}
    eight = torch.randn(3, 32, 8).to(E4M3)
    up = "model.layers.0.mlp.experts.gate_up_proj"
    saved(build("llama", WIDE), tmp_path)
    extra = {name: packed, **own, f"{name}_input_scale": torch.tensor(1.0)}
    extra |= {up: eight, f"{up}_weight_scale": torch.tensor(0.3)}
    change(tmp_path, lambda _: extra)
    (tmp_path / "config.json").write_text("{}")
    configure(tmp_path, quantization_config=SETTINGS)
    stored = StoredWeights(open_checkpoint(tmp_path))
    matrices, skipped = stored.matrices()
    assert [left.name for left in skipped] == [f"{name}_input_scale"]
    found = {matrix.name: weight for matrix, weight in stored.stream(matrices, matrices)}
    for expert in range(3):
        assert torch.equal(found.pop(f"{name}[{expert}]"), meant[expert].T)
        assert torch.equal(found.pop(f"{up}[{expert}]"), eight[expert].float() * torch.tensor(0.3))
    assert not found
    checkpoint = open_checkpoint(tmp_path)
    ((_, whole),) = read_weights(checkpoint, quantised_weights(checkpoint), [name], torch.float32)
    assert torch.equal(whole, meant.transpose(1, 2))


def test_experts_of_a_mixture_are_put_together(tmp_path):
    def quantise(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            parts, meant[name] = nvfp4(tensors.pop(name))
            tensors |= {f"{name}{last}": part for last, part in parts.items()}
        return tensors

    meant: dict[str, torch.Tensor] = {}
    saved(build("qwen3_moe", CAUSAL["qwen3_moe"] | {"hidden_size": 32, "moe_intermediate_size": 16}), tmp_path)
    change(tmp_path, quantise)
    configure(tmp_path, quantization_config=SETTINGS)
    stored = StoredWeights(open_checkpoint(tmp_path))
    matrices, _ = stored.matrices()
    found = {matrix.name: weight for matrix, weight in stored.stream(matrices, matrices)}
    on_disk, runtime = "model.layers.1.mlp.experts.3", "model.layers.1.mlp.experts"
    gate_up = torch.cat([meant[f"{on_disk}.gate_proj.weight"], meant[f"{on_disk}.up_proj.weight"]])
    assert torch.equal(found[f"{runtime}.gate_up_proj[3]"], gate_up)
    assert torch.equal(found[f"{runtime}.down_proj[3]"], meant[f"{on_disk}.down_proj.weight"])


@pytest.mark.slow
def test_a_model_that_only_modelopts_own_file_tells_of_is_lasered_as_a_plain_one(tokenizer, pairs, tmp_path):
    """As its exports before 0.37. The file isn't in what is written, which is no longer quantised."""
    meant = quantised(tmp_path / "in", "NVFP4", build("llama", WIDE | {"vocab_size": VOCABULARY}), settings=None)
    tokenizer.save_pretrained(tmp_path / "in")
    config = LaserConfig(
        embedder="self", max_new_tokens=4, candidates=1, device="cpu", ranks="0.5", accept="harmless", tolerance=5,
        dtype="float32",
    )  # fmt: skip
    result = laser(tmp_path / "in", pairs, config=config, output=tmp_path / "out")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    model, _ = load_model(tmp_path / "out", device="cpu")
    changed = [name for name, weight in meant.items() if not torch.equal(model.get_parameter(name), weight)]
    assert len(changed) == len(result.recipe.steps) > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({f"{Q_PROJ}.pre_quant_scale": torch.ones(32)}, r"scaled by its layer's inputs \(pre_quant_scale"),
        ({f"{Q_PROJ}.svdquant_lora_a": torch.ones(2, 32)}, r"a part of its layer \(beside svdquant_lora_a"),
        (
            {
                f"{Q_PROJ}.weight": torch.ones(2, 32, 32).to(E4M3),
                f"{Q_PROJ}.weight_scale_2": None,
                f"{Q_PROJ}.weight_scale": torch.ones(32, 1).byte(),
            },
            r"\(2, 32, 32\) with scales of shape \(32, 1\) in uint8",
        ),
        ({f"{Q_PROJ}.weight_scale_2": None}, r"uint8\) is of shape \(32, 16\) with scales of shape \(32, 2\)"),
        ({f"{Q_PROJ}.weight_scale": torch.ones(32, 1)}, r"scales of shape \(32, 1\) in float32"),
        ({f"{Q_PROJ}.weight_scale": torch.ones(32, 1).to(E4M3)}, r"\(32, 1\) in float8_e4m3fn, expected ModelOpt's"),
        ({f"{Q_PROJ}.weight": None}, "a scale without a weight"),
        ({f"{Q_PROJ}.weight_scale": None}, "a scale without a weight"),
        ({f"{Q_PROJ}.weight": torch.ones(32, 16, dtype=torch.int8)}, r"int8\) is of shape \(32, 16\)"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line_with_the_next_step(changed, message, tmp_path):
    quantised(tmp_path, "NVFP4", build("llama", WIDE))
    change(tmp_path, lambda t: {name: part for name, part in (t | changed).items() if part is not None})
    with pytest.raises(CheckpointError, match=message + ".*Give the model in bfloat16 or float32") as refusal:
        scan(tmp_path)
    assert "\n" not in str(refusal.value)


def test_int4_awq_is_refused_by_its_format(tmp_path):
    """As ModelOpt's W4A16_AWQ, whose weights are packed along the outputs."""
    quantised(tmp_path, "NVFP4", build("llama", WIDE))
    awq = {f"{Q_PROJ}.weight": torch.ones(16, 32).byte(), f"{Q_PROJ}.weight_scale": torch.ones(32, 1)}
    change(
        tmp_path,
        lambda t: {name: part for name, part in (t | awq).items() if not name.endswith("q_proj.weight_scale_2")},
    )
    with pytest.raises(CheckpointError, match=r"expected ModelOpt's NVFP4, MXFP8 or FP8.*Give the model in bfloat16"):
        scan(tmp_path)


@pytest.mark.parametrize("stored", [b"[" * 100_000, b'{"quantization": ', b"\xff"])
def test_a_damaged_file_of_modelopt_is_refused_in_one_line(stored, tmp_path):
    saved(build("llama", WIDE), tmp_path)
    (tmp_path / "hf_quant_config.json").write_bytes(stored)
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: not JSON .*ake it anew\.$") as refusal:
        scan(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("stored", [b"[]", b"3", b'{"quantization": []}', b'{"quantization": null}'])
def test_a_file_of_that_name_with_something_else_in_it_is_none_of_modelopts(stored, tmp_path):
    saved(build("llama", WIDE), tmp_path)
    (tmp_path / "hf_quant_config.json").write_bytes(stored)
    assert not quantised_weights(open_checkpoint(tmp_path))

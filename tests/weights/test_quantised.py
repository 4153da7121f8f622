"""Quantised checkpoints are scanned as the weights that they stand for, and refused where those aren't known."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from splaser_plugin import LaserConfig, laser, scan
from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.errors import CheckpointError
from splaser_plugin.jobs.apply import apply
from splaser_plugin.scanning.records import Scan
from splaser_plugin.weights.adapted import weights_of
from splaser_plugin.weights.loading import find_model, load_model
from splaser_plugin.weights.rest import rest_of
from splaser_plugin.weights.stored import BESIDE_WEIGHTS, StoredWeights
from tests.builders import VOCABULARY
from tests.planted import Facts
from tests.reference import as_transformers
from tests.tiny_models import CAUSAL, TEXT, build, change, configure, saved

BLOCK = (8, 16)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"


def block_scales(weight, block=BLOCK):
    rows, columns = weight.shape
    found = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            found[i, j] = part.abs().max() / 448
    return found


def spread(scales, shape, block=BLOCK):
    """The scale of each entry, one by one."""
    return torch.tensor(
        [[scales[i // block[0], j // block[1]].item() for j in range(shape[1])] for i in range(shape[0])]
    )


LAYOUTS = {
    "blocks": ("weight_scale_inv", block_scales, spread, {"weight_block_size": list(BLOCK)}),
    "rows": ("weight_scale", lambda w: w.abs().amax(1, keepdim=True) / 448, lambda s, shape: s.expand(shape), {}),
    "flat rows": ("weight_scale", lambda w: w.abs().amax(1) / 448, lambda s, shape: s[:, None].expand(shape), {}),
    "rows, fbgemm": (
        "weight_scale",
        lambda w: w.abs().amax(1, keepdim=True) / 448,
        lambda s, shape: s.expand(shape),
        {"quant_method": "fbgemm_fp8"},
    ),
    "tensors": ("weight_scale", lambda w: w.abs().max() / 448, lambda s, shape: s.expand(shape), {}),
    "tensors, inv": ("weight_scale_inv", lambda w: w.abs().max()[None] / 448, lambda s, shape: s.expand(shape), {}),
}


def is_quantised(name):
    return name.endswith("proj.weight") or (".experts." in name and name.endswith("weight"))


def quantised(folder, layout, model):
    """The folder with codes and scales; the weights that they stand for, by name on disk, computed the slow way."""
    last, scale_of, spread_of, settings = LAYOUTS[layout]
    meant = {}

    def quantise(tensors):
        for name in [name for name in tensors if is_quantised(name)]:
            scales = scale_of(tensors[name])
            of_each = spread_of(scales, tensors[name].shape)
            codes = (tensors[name] / of_each).to(torch.float8_e4m3fn)
            meant[name] = codes.float() * of_each
            tensors |= {name: codes, f"{name.removesuffix('weight')}{last}": scales}
        return tensors

    saved(model, folder)
    change(folder, quantise)
    configure(folder, quantization_config={"quant_method": "fp8", **settings})
    return meant


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_bit_floats_are_read_as_the_weights_they_stand_for(layout, tmp_path):
    """24 columns in blocks of 16: the last block is cut off."""
    meant = quantised(tmp_path, layout, build("llama", TEXT))
    stored = StoredWeights(open_checkpoint(tmp_path))
    assert stored.note == ""
    matrices, skipped = stored.matrices()
    assert {matrix.parameter for matrix in matrices} == set(meant)
    assert not any("scale" in entry.name for entry in [*matrices, *skipped])
    for matrix, weight in stored.stream(matrices, matrices):
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, meant[matrix.parameter], rtol=1e-6, atol=0)
        assert set(matrix.stored) == {
            matrix.parameter,
            f"{matrix.parameter.removesuffix('weight')}{LAYOUTS[layout][0]}",
        }


def test_blocks_are_dequantised_as_by_transformers(tmp_path):
    quantised(tmp_path, "blocks", build("llama", TEXT | {"intermediate_size": 32}))
    tensors = load_file(tmp_path / "model.safetensors")
    stored = StoredWeights(open_checkpoint(tmp_path))
    matrices, _ = stored.matrices()
    for matrix, weight in stored.stream(matrices, matrices):
        codes, scales = (tensors[name] for name in matrix.stored)
        assert torch.equal(weight, as_transformers(codes, scales))


def test_a_scan_is_that_of_the_weights_and_says_how_they_are_stored(tmp_path):
    model = build("llama", TEXT)
    meant = quantised(tmp_path / "codes", "blocks", model)
    saved(model, tmp_path / "plain")
    change(tmp_path / "plain", lambda tensors: tensors | meant)
    found, plain = scan(tmp_path / "codes"), scan(tmp_path / "plain")
    assert {matrix.name: matrix.edges for matrix in found.matrices} == {
        matrix.name: matrix.edges for matrix in plain.matrices
    }
    assert found.stored_as == "14 tensors in float8_e4m3fn with scales"
    assert plain.stored_as == ""
    found.save(tmp_path / "scan.json")
    assert Scan.load(tmp_path / "scan.json").stored_as == found.stored_as
    assert found.weights_identity != plain.weights_identity


def test_experts_in_eight_bit_floats_are_put_together_from_their_own_scales(tmp_path):
    meant = quantised(tmp_path, "blocks", build("mixtral", CAUSAL["mixtral"]))
    stored = StoredWeights(open_checkpoint(tmp_path))
    matrices, skipped = stored.matrices()
    assert not any("scale" in entry.name for entry in [*matrices, *skipped])
    weights = {matrix.name: weight for matrix, weight in stored.stream(matrices, matrices)}
    assert len(weights) == 2 * (4 + 2 * 4)
    disk = "model.layers.1.block_sparse_moe.experts.3"
    runtime = "model.layers.1.mlp.experts"
    gate_up = torch.cat([meant[f"{disk}.w1.weight"], meant[f"{disk}.w3.weight"]])
    torch.testing.assert_close(weights[f"{runtime}.gate_up_proj[3]"], gate_up, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights[f"{runtime}.down_proj[3]"], meant[f"{disk}.w2.weight"], rtol=1e-6, atol=0)


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_one(name, made):
    return lambda tensors: tensors | {name: made(tensors)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (without(f"{Q_PROJ}_scale_inv"), "with 0 scale tensors beside it, expected one"),
        (without(Q_PROJ), "a scale without a weight in 8-bit floats"),
        (with_one(Q_PROJ, lambda t: t[Q_PROJ].to(torch.bfloat16)), "a scale without a weight in 8-bit floats"),
        (with_one(f"{Q_PROJ}_scale", lambda _: torch.ones(1)), "with 2 scale tensors beside it"),
        (with_one(Q_PROJ, lambda t: t[Q_PROJ].float().to(torch.float8_e5m2)), "float8_e5m2.*with 1 scale"),
        (with_one(f"{Q_PROJ}_scale_inv", lambda _: torch.ones(1)), r"scales of shape \(1,\).*expected.*\(2, 1\)"),
        (with_one(f"{Q_PROJ}_scale_inv", lambda t: t[f"{Q_PROJ}_scale_inv"].byte()), r"\(2, 1\) in uint8"),
        (with_one(DOWN_PROJ, lambda _: torch.ones(16, 24, dtype=torch.int8)), "a scale without a weight in 8-bit"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line_with_the_next_step(changed, message, tmp_path):
    quantised(tmp_path, "blocks", build("llama", TEXT))
    change(tmp_path, changed)
    with pytest.raises(CheckpointError, match=message + ".*Give the model in bfloat16 or float32") as refusal:
        scan(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("block", [[128], [0, 16], "16", [8.0, 16.0]])
def test_a_block_size_that_is_none_is_refused(block, tmp_path):
    quantised(tmp_path, "blocks", build("llama", TEXT))
    configure(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    with pytest.raises(CheckpointError, match=r"weight_block_size is .*expected two positive integers"):
        scan(tmp_path)


LARGE = {"vocab_size": VOCABULARY}
QUICK = LaserConfig(
    embedder="self", max_new_tokens=4, candidates=2, device="cpu", ranks="0.5", accept="harmless", tolerance=5
)


def with_tokenizer(folder, tokenizer):
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "layout"),
    [("llama", TEXT, layout) for layout in LAYOUTS] + [("mixtral", CAUSAL["mixtral"], "blocks")],
)
def test_eight_bit_floats_are_loaded_as_the_weights_they_stand_for(kind, settings, layout, tokenizer, tmp_path):
    model = build(kind, settings | LARGE)
    meant = quantised(tmp_path, layout, model)
    loaded, _ = load_model(with_tokenizer(tmp_path, tokenizer), device="cpu")
    saved(model, tmp_path / "plain")
    change(tmp_path / "plain", lambda tensors: tensors | meant)
    plain, _ = load_model(with_tokenizer(tmp_path / "plain", tokenizer), device="cpu")
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=1e-6, atol=0)
    assert loaded.generation_config.to_dict() == plain.generation_config.to_dict()
    assert "quantization_config" not in loaded.config.to_dict()


@pytest.mark.slow
def test_a_quantised_model_is_lasered_and_written_in_the_dtype_that_is_said(tokenizer, pairs, tmp_path):
    """The next-token layer that transformers leaves out is written dequantised, too."""
    meant = quantised(
        tmp_path / "in",
        "blocks",
        build("deepseek_v3", CAUSAL["deepseek_v3"] | LARGE | {"moe_intermediate_size": 16}).bfloat16(),
    )
    codes = (torch.randn(16, 32) * 10).to(torch.float8_e4m3fn)
    last = "model.layers.2.eh_proj.weight"
    change(tmp_path / "in", lambda tensors: tensors | {last: codes, f"{last}_scale_inv": torch.full((2, 2), 0.5)})
    facts = Facts()
    result = laser(
        with_tokenizer(tmp_path / "in", tokenizer), pairs, config=QUICK, output=tmp_path / "out", progress=facts
    )
    assert dict(facts.facts)["weights"].endswith("loaded as the weights they stand for and written in bfloat16")
    after = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(shard)
    assert {tensor.dtype for tensor in after.values()} <= {torch.bfloat16, torch.float32}
    assert torch.equal(after[last], (codes.float() / 2).bfloat16())
    changed = [name for name, weight in meant.items() if not torch.equal(after[name], weight.bfloat16())]
    assert len(changed) == len(result.recipe.steps) > 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    load_model(tmp_path / "out", device="cpu")
    apply(result.recipe, tmp_path / "in", output=tmp_path / "applied")


def test_mxfp4_experts_are_loaded_as_the_weights_they_stand_for(tokenizer, tmp_path):
    packed(tmp_path, GPT_OSS | LARGE)
    loaded, _ = load_model(with_tokenizer(tmp_path, tokenizer), device="cpu", dtype="float32")
    stored = StoredWeights(open_checkpoint(tmp_path))
    matrices, _ = stored.matrices()
    in_memory = weights_of(loaded)
    for matrix, weight in stored.stream(matrices, matrices):
        there = next(other for other in in_memory.matrices()[0] if other.name == matrix.name)
        assert torch.equal(in_memory.read(there), weight), matrix.name


GPT_OSS = TEXT | {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention", "full_attention"],
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def packed(folder, settings=GPT_OSS):
    def pack(tensors):
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, rows, columns = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, columns, rows // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(110, 130, (experts, columns, rows // 32), dtype=torch.uint8)
        return tensors

    saved(build("gpt_oss", settings), folder)
    change(folder, pack)
    configure(folder, quantization_config={"quant_method": "mxfp4"})


def test_mxfp4_experts_are_read_as_the_weights_they_stand_for(tmp_path):
    packed(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stored = StoredWeights(open_checkpoint(tmp_path))
    assert stored.note == ""
    matrices, skipped = stored.matrices()
    assert not any("scales" in entry.name or "blocks" in entry.name for entry in [*matrices, *skipped])
    experts = [matrix for matrix in matrices if matrix.expert is not None]
    assert len(experts) == 2 * 2 * 3
    for matrix, weight in stored.stream(experts, experts):
        codes, scales = (tensors[f"{matrix.parameter}_{last}"][matrix.expert] for last in ("blocks", "scales"))
        assert weight.shape == (codes.shape[1] * 32, codes.shape[0])
        for column in range(weight.shape[1]):
            for row in range(0, weight.shape[0], 5):
                group, place = divmod(row, 32)
                byte = codes[column, group, place // 2].item()
                code = byte >> 4 if place % 2 else byte & 15
                value = E2M1[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (scales[column, group].item() - 127)
                assert weight[row, column].item() == value
    assert "uint8 with scales" in scan(tmp_path).stored_as


@pytest.mark.parametrize(("last", "message"), [("blocks", "scales without blocks"), ("scales", "with no scales")])
def test_half_of_mxfp4_is_refused(last, message, tmp_path):
    packed(tmp_path)
    change(tmp_path, without(f"model.layers.0.mlp.experts.down_proj_{last}"))
    with pytest.raises(CheckpointError, match=message):
        scan(tmp_path)


def test_scales_of_activations_are_left_out_with_a_reason_and_are_not_written(tmp_path):
    """As `activation_scheme: static` stores them."""
    quantised(tmp_path, "tensors, inv", build("llama", TEXT))
    name = Q_PROJ.replace("weight", "activation_scale")
    change(tmp_path, lambda tensors: tensors | {name: torch.ones(1)})
    stored = StoredWeights(open_checkpoint(tmp_path))
    assert {left.name: left.reason for left in stored.matrices()[1]}[name] == BESIDE_WEIGHTS
    assert rest_of(find_model(tmp_path), build("llama", TEXT)).tensors == ()

"""What a scan from disk knows of a model, against the loaded model itself."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from splaser_plugin import scan
from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import model_matrices
from splaser_plugin.weights.stored import NOT_IN_MODEL, StoredWeights
from tests.tiny_models import CAUSAL, TEXT, build, change, configure, llava, qwen2_5_vl, saved


def both(folder, auto=AutoModelForCausalLM, **options):
    """Matrices on disk and of the model loaded from there, by name."""
    stored = StoredWeights(open_checkpoint(folder))
    assert stored.note == ""
    loaded, _ = model_matrices(auto.from_pretrained(folder), **options)
    return stored.matrices(**options)[0], loaded


def check_same(folder, auto=AutoModelForCausalLM, **options):
    """On disk as loaded: the same matrices by name, type and shape, and bit for bit the same weights."""
    matrices, loaded = both(folder, auto, **options)
    assert sorted(matrices, key=lambda matrix: matrix.name) == sorted(loaded, key=lambda matrix: matrix.name)
    model = auto.from_pretrained(folder)
    parameters = dict(model.named_parameters())
    stored = StoredWeights(open_checkpoint(folder))
    if not model.config.is_encoder_decoder:
        assert stored.identity() == Weights(model).identity()
    for matrix, weight in stored.stream(matrices, matrices):
        assert torch.equal(weight, matrix.view(parameters[matrix.parameter])), matrix.name
        assert set(matrix.stored) <= set(load_file(folder / "model.safetensors"))
    return matrices


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_model_has_the_same_matrices_on_disk_as_loaded(kind, tmp_path):
    matrices = check_same(saved(build(kind, CAUSAL[kind]), tmp_path))
    assert all(matrix.type and matrix.block is not None for matrix in matrices)
    shapes = {}
    for matrix in matrices:
        assert shapes.setdefault((matrix.type, matrix.block), matrix.shape) == matrix.shape


def test_experts_are_one_matrix_each_however_they_are_stored(tmp_path):
    """Mixtral: one by one; GraniteMoE: one 3-D parameter (named as a layer before); DBRX: one under another in 2-D."""
    for kind, name in {
        "mixtral": "model.layers.1.mlp.experts.gate_up_proj[3]",
        "granitemoe": "model.layers.1.block_sparse_moe.experts.gate_up_proj[3]",
        "dbrx": "transformer.blocks.1.ffn.experts.mlp.w1[3]",
    }.items():
        model = build(kind, CAUSAL[kind])
        matrices = {matrix.name: matrix for matrix in check_same(saved(model, tmp_path / kind))}
        name = name if name in matrices else name.replace("experts.gate_up_proj", "input_linear")
        assert matrices[name].shape == ((24, 16) if kind == "dbrx" else (48, 16))
        assert sum(matrix.expert is not None for matrix in matrices.values()) == 2 * 4 * (3 if kind == "dbrx" else 2)


def test_routers_state_and_gates_are_no_matrices_and_the_reason_is_given(tmp_path):
    for kind, name, reason in (
        ("mixtral", "model.layers.0.mlp.gate", "a router"),
        ("deepseek_v3", "model.layers.1.mlp.gate", "a router"),
        ("granitemoe", "model.layers.0.block_sparse_moe.router", "a router"),
        ("dbrx", "transformer.blocks.0.ffn.router.layer", "a router"),
        ("mamba", "backbone.layers.0.mixer.A_log", "a parameter that is no linear layer's weight"),
        ("mamba", "backbone.layers.0.mixer.conv1d", "a convolution"),
        ("gemma3n_text", "model.altup_projections.0", "outside the blocks"),
    ):
        folder = tmp_path / kind
        model = build(kind, CAUSAL[kind])
        for skipped in (StoredWeights(open_checkpoint(saved(model, folder))).matrices()[1], model_matrices(model)[1]):
            (found,) = [matrix.reason for matrix in skipped if matrix.name in (name, f"{name}.layer")]
            assert found.startswith(reason)


@pytest.mark.parametrize("make", [llava, qwen2_5_vl])
def test_of_a_composite_model_the_language_model_is_scanned_and_towers_when_asked_for(make, tmp_path):
    folder = saved(make(), tmp_path)
    matrices = check_same(folder, AutoModelForImageTextToText)
    assert len(matrices) == 2 * 7
    assert all(matrix.name.startswith("model.language_model.layers.") for matrix in matrices)
    assert {matrix.type for matrix in matrices} >= {"mlp.down_proj", "self_attn.q_proj"}
    everything = check_same(folder, AutoModelForImageTextToText, towers=True)
    in_tower = {matrix.type for matrix in everything if matrix.tower}
    assert in_tower
    assert not in_tower & {matrix.type for matrix in matrices}
    (tower,) = {matrix.tower for matrix in everything} - {""}
    named = StoredWeights(open_checkpoint(folder)).matrices(include=[tower])[0]
    assert {matrix.tower for matrix in named} == {tower}
    reasons = {matrix.reason for matrix in StoredWeights(open_checkpoint(folder)).matrices()[1]}
    assert f"in {tower}, beside the language model (--towers takes it in)" in reasons


def test_an_encoder_decoder_is_scanned_with_types_of_its_own_for_either(tmp_path):
    settings = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    folder = saved(build("t5", settings, AutoModelForSeq2SeqLM), tmp_path)
    matrices, skipped = StoredWeights(open_checkpoint(folder)).matrices()
    assert {matrix.type.split(".")[0] for matrix in matrices} == {"encoder", "decoder"}
    reasons = {matrix.name: matrix.reason for matrix in skipped}
    assert reasons["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"] == "an embedding"


def test_an_encoder_keeps_the_names_of_its_own_class(tmp_path):
    settings = {k: TEXT[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    folder = saved(build("bert", {**settings, "num_attention_heads": 2}, AutoModel), tmp_path)
    matrices = check_same(folder, AutoModel)
    assert matrices[0].name.startswith("encoder.layer.0.")


@pytest.mark.parametrize(("kind", "first"), [("gpt2", "transformer.h.0."), ("bloom", "transformer.h.0.")])
def test_names_are_those_of_the_loaded_model_where_the_files_lack_the_prefix(kind, first, tmp_path):
    settings = {"gpt2": CAUSAL["gpt2"], "bloom": {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2}}[kind]
    folder = saved(build(kind, settings, AutoModel), tmp_path)
    assert all(name.startswith("h.") or not name.startswith("transformer") for name in open_checkpoint(folder).tensors)
    matrices = check_same(folder)
    assert matrices[0].name.startswith(first)
    assert not matrices[0].stored[0].startswith("transformer")


def test_layers_for_multi_token_prediction_and_surplus_ones_are_left_out_with_a_reason(tmp_path):
    folder = saved(build("deepseek_v3", CAUSAL["deepseek_v3"]), tmp_path)
    more = {
        "model.layers.2.eh_proj.weight": torch.randn(16, 32),
        "model.layers.2.shared_head.head.weight": torch.randn(64, 16),
    }
    change(folder, lambda tensors: tensors | more)
    matrices, skipped = StoredWeights(open_checkpoint(folder)).matrices()
    assert {matrix.block for matrix in matrices} == {0, 1}
    assert {matrix.name for matrix in skipped if matrix.reason == NOT_IN_MODEL} == set(more)

    folder = saved(build("llama", TEXT | {"num_hidden_layers": 3}), tmp_path / "short")
    configure(folder, num_hidden_layers=2)
    matrices, skipped = StoredWeights(open_checkpoint(folder)).matrices()
    assert {matrix.block for matrix in matrices} == {0, 1}
    assert sum(matrix.reason == NOT_IN_MODEL for matrix in skipped) == 9


def test_tied_weights_are_known_where_only_the_class_ties_them(tmp_path):
    folder = saved(build("gemma2", TEXT), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    tied = {
        matrix.name: matrix.tied_to for matrix in StoredWeights(open_checkpoint(folder)).matrices()[1] if matrix.tied_to
    }
    assert tied == {"model.embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}


@pytest.mark.parametrize("differs", [False, True])
def test_a_stored_head_is_tied_only_where_it_equals_the_embeddings(differs, tmp_path):
    folder = saved(build("llama", TEXT | {"tie_word_embeddings": True}), tmp_path)
    change(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1.0 * differs})
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) != differs
    assert any(matrix.tied_to for matrix in StoredWeights(open_checkpoint(folder)).matrices()[1]) != differs


def test_codes_with_scales_are_refused_with_and_without_a_configuration(tmp_path):
    folder = saved(build("llama", TEXT), tmp_path)

    def quantise(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            scale = tensors[name].abs().amax(1, keepdim=True) / 448
            tensors |= {name: (tensors[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
        return tensors

    change(folder, quantise)
    with pytest.raises(CheckpointError, match="float8_e4m3fn with scales beside it: quantised weights"):
        scan(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="float8_e4m3fn with scales beside it: quantised weights"):
        scan(folder)


def test_a_configuration_of_another_model_is_said_and_names_on_disk_are_taken(tmp_path):
    folder = saved(build("llama", TEXT), tmp_path)
    configure(folder, hidden_size=32)
    stored = StoredWeights(open_checkpoint(folder))
    assert "config.json is of another model than the weights" in stored.note
    assert len(stored.matrices()[0]) == 2 * 7
    configure(folder, model_type="unheard_of")
    assert "transformers knows no such model" in StoredWeights(open_checkpoint(folder)).note


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "bitsandbytes", "fp8", "hqq"])
def test_a_quantised_checkpoint_is_refused_by_its_method(method, tmp_path):
    folder = saved(build("llama", TEXT), tmp_path)
    configure(folder, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=rf"its weights are quantised.* \({method}\).*Give the model in bfloat16"):
        scan(folder)


@pytest.mark.parametrize(
    ("codes", "scales"),
    [("qweight", "scales"), ("weight_packed", "weight_scale"), ("W_q", "scale"), ("weight", "weight.absmax")],
)
def test_packed_integers_with_scales_are_refused_by_what_they_are(codes, scales, tmp_path):
    folder = saved(build("llama", TEXT), tmp_path)
    module = "model.layers.0.self_attn.q_proj"

    def pack(tensors):
        del tensors[f"{module}.weight"]
        packed = {f"{module}.{codes}": torch.ones(16, 2, dtype=torch.int32), f"{module}.{scales}": torch.ones(16, 1)}
        return tensors | packed

    change(folder, pack)
    with pytest.raises(CheckpointError, match="int32 with scales beside it: quantised weights"):
        scan(folder)

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
)

from splaser_plugin.checkpoints.checkpoint import open_checkpoint
from splaser_plugin.errors import MatrixError
from splaser_plugin.weights.matrices import compile_pattern, model_matrices
from splaser_plugin.weights.stored import StoredWeights

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
LLAMA_TYPES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
FAMILIES = {
    "llama": (LlamaConfig(**SMALL), LLAMA_TYPES),
    "mistral": (MistralConfig(**SMALL, head_dim=8), LLAMA_TYPES),
    "qwen2": (Qwen2Config(**SMALL), LLAMA_TYPES),
    "gemma2": (Gemma2Config(**SMALL, head_dim=8), LLAMA_TYPES),
    "phi3": (
        Phi3Config(**SMALL),
        {
            "self_attn.qkv_proj": (32, 16),
            "self_attn.o_proj": (16, 16),
            "mlp.gate_up_proj": (48, 16),
            "mlp.down_proj": (16, 24),
        },
    ),
    "gpt2": (
        GPT2Config(vocab_size=64, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=32),
        {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 24), "mlp.c_proj": (24, 16)},
    ),
    "gpt_neox": (
        GPTNeoXConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
        {
            "attention.query_key_value": (48, 16),
            "attention.dense": (16, 16),
            "mlp.dense_h_to_4h": (24, 16),
            "mlp.dense_4h_to_h": (16, 24),
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_exactly_the_matrices_of_each_family(family):
    config, types = FAMILIES[family]
    matrices, skipped = model_matrices(AutoModelForCausalLM.from_config(config))
    assert {matrix.type: matrix.shape for matrix in matrices} == types
    assert len(matrices) == 2 * len(types)
    assert {matrix.block for matrix in matrices} == {0, 1}
    assert all(matrix.transposed == (family == "gpt2") for matrix in matrices)
    assert any("embed" in matrix.name or "wte" in matrix.name for matrix in skipped)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_on_disk_has_the_same_matrices_as_the_loaded_model(family, tmp_path):
    model = AutoModelForCausalLM.from_config(FAMILIES[family][0])
    model.save_pretrained(tmp_path)
    live, _ = model_matrices(model)
    stored, _ = StoredWeights(open_checkpoint(tmp_path)).matrices()
    assert sorted(live, key=lambda matrix: matrix.name) == sorted(stored, key=lambda matrix: matrix.name)


def test_each_expert_of_a_fused_parameter_is_a_matrix():
    config = MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2, head_dim=8)
    model = AutoModelForCausalLM.from_config(config)
    matrices, _ = model_matrices(model, include=["experts"])
    down = [matrix for matrix in matrices if matrix.type == "mlp.experts.down_proj"]
    assert len(down) == 2 * 3
    fused = dict(model.named_parameters())[down[1].parameter]
    assert down[1].name == f"{down[1].parameter}[1]"
    assert torch.equal(down[1].view(fused), fused[1])


def test_a_view_writes_through_to_the_parameter():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"][0])
    matrix = model_matrices(model)[0][0]
    parameter = dict(model.named_parameters())[matrix.parameter]
    matrix.view(parameter.detach()).fill_(7.0)
    assert torch.all(parameter == 7.0)


def test_patterns_match_whole_segments():
    assert compile_pattern("layers.1").search("model.layers.1.mlp.up_proj")
    assert not compile_pattern("layers.1").search("model.layers.11.mlp.up_proj")
    assert not compile_pattern("up_proj").search("model.layers.1.mlp.gate_up_proj")
    assert compile_pattern("layers.*.mlp").search("model.layers.11.mlp.up_proj")
    assert not compile_pattern("layers.*.up_proj").search("model.layers.11.mlp.up_proj")
    assert compile_pattern("experts.down_proj").search("model.layers.0.mlp.experts.down_proj[4]")


def test_include_and_exclude_narrow_the_choice():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"][0])
    matrices, skipped = model_matrices(model, include=["mlp", "layers.1.self_attn"], exclude=["up_proj"])
    assert len(matrices) == 2 * 2 + 4
    reasons = {matrix.name: matrix.reason for matrix in skipped}
    assert reasons["model.layers.0.mlp.up_proj"] == "in --exclude"
    assert reasons["model.layers.0.self_attn.q_proj"] == "not in --include"


def test_head_embeddings_and_norms_come_only_by_name():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"][0])
    matrices, _ = model_matrices(model, include=["lm_head", "model.embed_tokens", "input_layernorm"])
    assert {matrix.name: matrix.shape for matrix in matrices} == {
        "lm_head": (64, 16),
        "model.embed_tokens": (64, 16),
        "model.layers.0.input_layernorm": (1, 16),
        "model.layers.1.input_layernorm": (1, 16),
    }
    assert len(model_matrices(model, include=["model.*"], exclude=["layers.0"])[0]) == 7


def test_tied_weights_are_refused_by_name_and_listed_otherwise(tmp_path):
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(MatrixError, match=r"lm_head shares its weight with model\.embed_tokens"):
        model_matrices(model, include=["lm_head"])
    reasons = {model_matrice.name: model_matrice.reason for model_matrice in model_matrices(model)[1]}
    assert reasons["lm_head"] == "shares its weight with model.embed_tokens"
    model.save_pretrained(tmp_path)
    with pytest.raises(MatrixError, match=r"model\.embed_tokens shares its weight with lm_head"):
        StoredWeights(open_checkpoint(tmp_path)).matrices(include=["embed_tokens"])


def test_a_pattern_that_matches_nothing_names_the_nearest():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"][0])
    with pytest.raises(MatrixError, match=r"'mlp\.dwn_proj' matches no parameter.*nearest: .*mlp\.down_proj"):
        model_matrices(model, include=["mlp.dwn_proj"])
    with pytest.raises(MatrixError, match="empty segment"):
        model_matrices(model, exclude=["mlp..down"])
    with pytest.raises(MatrixError, match="no weight matrix is left"):
        model_matrices(model, exclude=["layers"])


def test_a_model_without_a_matrix_says_why():
    with pytest.raises(MatrixError, match=r"left of 2 parameters \(an embedding: 1; a vector .*: 1\)"):
        model_matrices(torch.nn.Sequential(torch.nn.Embedding(4, 4), torch.nn.LayerNorm(4, bias=False)))

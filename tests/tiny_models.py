"""Tiny random models of many architectures, and their folders changed as files in the wild are."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
GEMMA3N = {
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 4,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "activation_sparsity_pattern": None,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 16,
}
CAUSAL = {
    "mixtral": TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": TEXT | EXPERTS | {"num_experts": 4},
    "qwen2_moe": TEXT | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 12},
    "deepseek_v3": TEXT | EXPERTS | DEEPSEEK,
    "granitemoe": TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "exaone": TEXT,
    "phi3": TEXT,
    "gpt2": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "ctrl": {"vocab_size": 64, "n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2},
    "mamba": {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
    "gemma3n_text": TEXT | GEMMA3N,
    "dbrx": {
        "vocab_size": 64,
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "ffn_config": {"hidden_size": 16, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4},
    },
}


def build(kind, settings, auto=AutoModelForCausalLM, seed=0):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} knows no {kind}")
    torch.manual_seed(seed)
    return auto.from_config(AutoConfig.for_model(kind, **settings)).eval()


def llava(**text):
    parts = {
        "text_config": {"model_type": "llama", **TEXT, **text},
        "vision_config": {"model_type": "clip_vision_model", **CLIP},
    }
    return build("llava", {**parts, "image_token_index": 5}, AutoModelForImageTextToText)


def qwen2_5_vl():
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    return build("qwen2_5_vl", {"text_config": text, "vision_config": vision}, AutoModelForImageTextToText)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def change(folder, changed):
    """Give the tensors of a saved model to `changed`, which returns those to be there."""
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in changed(load_file(file)).items()}, file)


def configure(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))

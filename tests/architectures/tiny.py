"""Tiny configurations of transformers' model types, made from their own defaults by rules that hold for all.

Sizes are known by their usual names. They are never larger than the default, so that what is 0 or 1 stays so; where
the default is a list, so is the size. Lists with an entry for each layer are cut to the layers that are left: two, or
as many as there are kinds of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH = 32
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "dim", "embedding_dim"), WIDTH),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "output_hidden_size", "encoder_hidden_size"), WIDTH),
    **dict.fromkeys(("hidden_size_global", "projector_hidden_size", "projection_dim", "codebook_dim"), WIDTH),
    **dict.fromkeys(("base_channels", "latent_channels", "image_token_embed_dim", "moe_hidden_size"), WIDTH),
    **dict.fromkeys(
        (
            "ple_embed_dim",
            "hc_lowrank",
            "vision_hidden_size",
            "adapter_in_dim",
            "adapter_input_size",
            "adapter_out_dim",
        ),
        WIDTH,
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "n_inner", "ffn_hidden_size", "d_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "share_expert_dim"), 24),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "index_n_heads", "indexer_n_heads", "num_sliding_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("attention_head_size", "index_head_dim", "indexer_head_dim", "indexer_budget"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "embedding_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_expert_group"), 1),
    **dict.fromkeys(("n_groups", "mamba_ngroups", "mamba_n_groups", "indexer_compress_ratio", "indexer_kv_heads"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "time_step_rank", "ssm_state_size", "laurel_rank"), 8),
    **dict.fromkeys(
        ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "n_words", "num_embeddings"), 128
    ),
    **dict.fromkeys(("encoder_hash_byte_group_vocab", "ngram_vocab_size_base"), 128),
    "codebook_size": 16,
    "vision_feature_layer": 1,
    "image_size": 28,
    "patch_size": 14,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "attn_layer_indices": [1],
    "rotary_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attn_layers")
"""Lists of the kind of each layer."""
MOST_KINDS = 4
FREE = frozenset(
    {"pad_token_id", "bos_token_id", "eos_token_id", "attn_layer_offset", "attn_layer_indices", "mamba_d_head"}
)
"""Sizes that may be larger than the default."""
UNSET = frozenset({"head_dim", "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "num_experts_per_tok"})
"""Sizes that are given where the defaults have none."""
NEEDED: dict[str, Any] = {
    **{name: size for name, size in SIZES.items() if name not in FREE},
    "attn_layer_indices": [1],
    "mlp_layer_types": ["dense", "sparse"],
    "sliding_window": 8,
    "deepstack_layer_map": [[0, 0]],
    "downsample_rate": "1/2",
    "vocabulary_map": {},
    "default_language": "en_XX",
}
"""What else is given in a second try where the defaults have none."""
OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "apertus1p5": {"image_token_offset": 64, "audio_token_offset": 80},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dory": {
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        "num_hidden_layers": 6,
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 2),
    },
    "granite4_vision": {"vision_config": {"hidden_size": 64}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
}
"""What else a type's sizes have to fit."""


def tiny_config(kind: str, filled: bool = False) -> Any:
    """The type's configuration with its sizes made small, those of its parts too.

    filled: with values for what the defaults leave open.
    """
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **_small(AutoConfig.for_model(kind), filled))


def _small(config: Any, filled: bool) -> dict[str, Any]:
    given = config.to_dict()
    values = {
        name: _size(name, size, given[name])
        for name, size in SIZES.items()
        if name in given and (given[name] is not None or name in UNSET)
    }
    if filled:
        values |= {name: size for name, size in NEEDED.items() if name in given and given[name] is None}
    values |= _layers(given)
    if given.get("kv_lora_rank"):
        values["num_key_value_heads"] = values["num_attention_heads"]
        if (given.get("head_dim") or 0) > max(given["qk_nope_head_dim"], given["qk_rope_head_dim"]):
            values["head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    kinds = values.get("layer_types") or ()
    if "sliding_window" in given and given["sliding_window"] is None and any("sliding" in kind for kind in kinds):
        values["sliding_window"] = 8
    if (rope := _rope(given, values, kinds)) is not None:
        values["rope_parameters"] = rope
    for part in config.sub_configs:
        if hasattr(inner := getattr(config, part, None), "to_dict"):
            values[part] = _set_by_whole(inner) | {"model_type": inner.model_type} | _small(inner, filled)
    for name, value in OWN.get(config.model_type, {}).items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return values


def _size(name: str, size: Any, default: Any) -> Any:
    if isinstance(size, list):
        return size
    if isinstance(default, list | tuple):
        return [_size(name, size, entry) for entry in default]
    return size if name in FREE or not isinstance(default, int) else min(size, default)


def _layers(given: dict[str, Any]) -> dict[str, Any]:
    """The number of layers, and what has an entry for each."""
    counts = {name: given[name] for name in LAYERS if isinstance(given.get(name), int)}
    kinds = {name: list(dict.fromkeys(given[name]))[:MOST_KINDS] for name in KINDS if given.get(name)}
    left = max(2, *(len(found) for found in kinds.values())) if kinds else 2
    values: dict[str, Any] = {name: left if kinds else min(left, count) for name, count in counts.items()}
    if isinstance(given.get("num_kv_shared_layers"), int):
        values["num_kv_shared_layers"] = min(left, given["num_kv_shared_layers"])
    for name, value in given.items():
        is_of_layers = isinstance(value, list | tuple) and len(value) in counts.values() and len(value) >= left
        if name in kinds:
            values[name] = _repeated(kinds[name], left)
        elif is_of_layers and not isinstance(value[0], dict):
            values[name] = list(value[:left])
    if isinstance(given.get("per_layer_config"), dict):
        values["per_layer_config"] = {}
    return values


def _repeated(values: Sequence[Any], count: int) -> list[Any]:
    return [values[place % len(values)] for place in range(count)]


def _rope(given: dict[str, Any], values: dict[str, Any], kinds: Sequence[str]) -> Any:
    """Rotary embeddings: for each kind of layer where the defaults have none, and in sections that fit the head."""
    rope = given.get("rope_parameters")
    if rope is None:
        return None
    if not rope:
        return {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in kinds} or None
    width = values.get("qk_rope_head_dim") or values.get("head_dim") or WIDTH // 4

    def fitting(one: dict[str, Any]) -> dict[str, Any]:
        factor = one.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1
        half = int(width * factor) // 2
        return one | {"mrope_section": [half // 3, half // 3, half - 2 * (half // 3)]}

    if all(isinstance(one, dict) for one in rope.values()):
        return {kind: fitting(one) for kind, one in rope.items()}
    return fitting(rope)


def _set_by_whole(part: Any) -> dict[str, Any]:
    """What the whole's defaults set in a part."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if part.model_type not in CONFIG_MAPPING:
        return {}
    of_type, given = AutoConfig.for_model(part.model_type).to_dict(), part.to_dict()
    return {name: value for name, value in given.items() if name in of_type and of_type[name] != value}

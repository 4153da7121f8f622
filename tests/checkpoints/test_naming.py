from __future__ import annotations

from splaser_plugin.checkpoints.naming import block_index, type_in_block, types_and_blocks


def types(*names, **towers):
    return {name: found for name, (found, _) in types_and_blocks(dict.fromkeys(names, "") | towers).items()}


def test_a_type_is_the_name_inside_the_block():
    names = ["model.layers.0.mlp.up_proj", "model.layers.11.self_attn.q_proj"]
    assert list(types(*names).values()) == ["mlp.up_proj", "self_attn.q_proj"]
    assert types_and_blocks(dict.fromkeys(names, ""))[names[1]] == ("self_attn.q_proj", 11)


def test_encoder_and_decoder_are_told_apart_and_a_tower_from_the_language_model():
    assert list(types("encoder.block.0.q", "decoder.block.0.q").values()) == ["encoder.q", "decoder.q"]
    found = types_and_blocks({"model.language_model.layers.0.q": "", "model.visual.blocks.0.q": "visual"})
    assert [kind for kind, _ in found.values()] == ["q", "visual.q"]


def test_numbers_inside_a_block_stay_but_an_experts():
    names = ["h.0.ffn.0", "h.0.ffn.2", "h.0.mlp.experts.3.up_proj", "h.1.mlp.experts.0.up_proj"]
    assert list(types(*names).values()) == ["ffn.0", "ffn.2", "mlp.experts.up_proj", "mlp.experts.up_proj"]


def test_a_number_at_the_end_is_no_block_and_no_type_is_empty():
    assert types("model.altup_projections.1", "model.layers.0.q") == {
        "model.altup_projections.1": "model.altup_projections.1",
        "model.layers.0.q": "q",
    }
    assert (block_index("model.altup_projections.1"), type_in_block("lm_head")) == (None, "lm_head")


def test_of_stacks_one_inside_another_only_the_difference_stands_in_the_type():
    assert list(types("model.layers.0.q", "model.mtp.layers.0.q").values()) == ["q", "mtp.q"]

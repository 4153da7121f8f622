"""Mixtures of experts whose stacks are split into layers, some of them factored."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from splaser_plugin import expand, load
from splaser_plugin.integrations.peft import merge_and_unload
from splaser_plugin.weights.factored import is_factorable
from splaser_plugin.weights.factored_experts import FactoredExperts
from splaser_plugin.weights.factored_folder import parameter_counts, save_model
from splaser_plugin.weights.factored_layers import GaugeLinear
from splaser_plugin.weights.in_memory import Weights
from tests.weights.factored_models import same_state, stored_in

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2))


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    options = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **options))


def gpt_oss():
    """Its matrices are stored as (inputs, outputs), with biases and a gate of its own."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2))


def llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    options = {"num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **options))


MIXTURES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def lasered(make, dtype=torch.float32, experts=(0, 2)):
    """Some experts' first matrices and one second one reduced, as factors, and an attention matrix."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():  # biases are zero at first
        nn.init.normal_(parameter, std=0.3)
    weights = Weights(model.to(dtype).eval())
    weights.keep_factors()
    for matrix in weights.matrices()[0]:
        is_first = matrix.type.endswith("gate_up_proj")
        if (matrix.expert in experts and is_first) or (matrix.expert == 1 and not is_first) or "q_proj" in matrix.name:
            weights.reduce(matrix, 5)
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_stored_as_factors_and_come_back_bit_for_bit(kind, dtype, tmp_path):
    weights = lasered(MIXTURES[kind], dtype)
    assert len(weights.factors) == 4
    save_model(weights, tmp_path / "factored", None)
    assert len(stored_in(tmp_path / "factored")) == 4
    loaded = load(tmp_path / "factored")
    assert sum(isinstance(module, FactoredExperts) for module in loaded.modules()) == 1
    assert sum(isinstance(module, GaugeLinear) for module in loaded.modules()) == 4
    before, after = parameter_counts(weights)
    assert (before, after) == (weights.model.num_parameters(), loaded.num_parameters())
    assert before - after == sum(
        (rows - 5) * (columns - 5) for rows, columns in (factor.shape for factor in weights.factors)
    )
    ids = torch.arange(40)[None]
    with torch.no_grad():
        dense, factored = (model(ids).logits.float() for model in (weights.model, loaded))
    assert (factored - dense).norm() < 30 * torch.finfo(dtype).eps * dense.norm()
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "factored"), loaded)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="5KB")
    assert same_state(load(tmp_path / "again"), loaded)
    assert same_state(expand(loaded), weights.model)
    weights.model.save_pretrained(tmp_path / "dense")
    loaded.save_pretrained(tmp_path / "expanded")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "expanded" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def layers_of(model):
    return [name for name, module in model.named_modules() if "each_" in name and isinstance(module, nn.Linear)]


def test_lora_trains_on_experts_and_merges_into_them(tmp_path):
    from peft import LoraConfig, get_peft_model

    save_model(lasered(mixtral), tmp_path, None)
    loaded = load(tmp_path)
    ids = torch.arange(40)[None]
    config = LoraConfig(r=2, target_modules=layers_of(loaded), init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(loaded, config).eval()
    adapted(ids, labels=ids).loss.backward()
    gradients = [
        parameter.grad for name, parameter in adapted.named_parameters() if "each_gate_up_proj.0.lora_A" in name
    ]
    assert gradients and gradients[0].abs().sum() > 0
    after = adapted(ids).logits
    merged = merge_and_unload(adapted)
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    ranks = {
        name.split("experts.")[-1]: module.rank for name, module in merged.named_modules() if hasattr(module, "rank")
    }
    assert ranks["each_gate_up_proj.0"] == 5 + 2
    expanded = expand(merged)
    assert not any(isinstance(module, FactoredExperts) for module in expanded.modules())
    torch.testing.assert_close(expanded(ids).logits, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_peft_takes_all_linear_layers_of_a_factored_mixture_by_their_names_alone(make, tmp_path):
    from peft import LoraConfig, get_peft_model

    save_model(lasered(make), tmp_path, None)
    with pytest.raises(ValueError, match=r"(?s)Target module \w+DecoderLayer\(.* is not supported"):
        get_peft_model(load(tmp_path), LoraConfig(target_modules="all-linear"))
    loaded = load(tmp_path)
    names = [name for name, layer in loaded.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    adapted = get_peft_model(loaded, LoraConfig(r=2, target_modules=names))
    assert set(adapted.targeted_module_names) == set(names) and len(names) == 4 + 6


def test_expanding_under_adapters_makes_the_experts_whole_once_they_are_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    save_model(lasered(mixtral), tmp_path, None)
    loaded = load(tmp_path)
    config = LoraConfig(r=2, target_modules=layers_of(loaded), init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(loaded, config).eval()
    ids = torch.arange(40)[None]
    after = adapted(ids).logits
    merged = expand(expand(adapted).merge_and_unload())
    assert merged.state_dict().keys() == mixtral().state_dict().keys()
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)


def test_experts_outside_of_transformers_interface_stay_whole():
    model = llama4()
    experts = [matrix for matrix in Weights(model).matrices()[0] if matrix.expert is not None]
    assert experts and not any(is_factorable(model, matrix) for matrix in experts)

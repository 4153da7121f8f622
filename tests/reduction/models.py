"""Tiny models of the kinds that multiply by their weights in different ways."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

FUSED = ("mixtral", "gpt_oss", "llama4")


def tiny_gpt2(seed=0):
    """Two blocks whose linear weights are stored as (inputs, outputs)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tiny_fused(kind, seed=0):
    """A few experts in one parameter: stored as (outputs, inputs) by Mixtral, the other way round by the others."""
    import transformers as t

    torch.manual_seed(seed)
    common = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    if kind == "mixtral":
        config = t.MixtralConfig(**common, num_hidden_layers=2, num_local_experts=5, num_experts_per_tok=2)
        return t.MixtralForCausalLM(config).eval()
    if kind == "gpt_oss":
        config = t.GptOssConfig(**common, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2)
        return t.GptOssForCausalLM(config).eval()
    config = t.Llama4TextConfig(
        **common, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=48,
        interleave_moe_layer_step=1,
    )  # fmt: skip
    return t.Llama4ForCausalLM(config).eval()


class ListedExperts(nn.Module):
    """Four experts, each a module of its own, of which all are called, with the tokens that are routed to them."""

    def __init__(self, size=32, inner=48):
        super().__init__()
        self.gate = nn.Linear(size, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {"up_proj": nn.Linear(size, inner, bias=False), "down_proj": nn.Linear(inner, size, bias=False)}
            )
            for _ in range(4)
        )

    def routed(self, tokens):
        return self.gate(tokens).argmax(-1)

    def forward(self, states):
        tokens = states.flatten(0, -2)
        routed, shares = self.routed(tokens), self.gate(tokens).softmax(-1)
        total = torch.zeros_like(tokens)
        for place, expert in enumerate(self.experts):
            mine = (routed == place).nonzero()[:, 0]
            out = expert["down_proj"](functional.silu(expert["up_proj"](tokens[mine])))
            total = total.index_add(0, mine, out * shares[mine, place, None])
        return total.view_as(states)

"""Small models that are reduced, their factors kept."""

from __future__ import annotations

import json

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from splaser_plugin.weights.in_memory import Weights
from tests.builders import tiny_llama

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUERY = "model.layers.0.self_attn.q_proj"


def small_llama(**changes):
    return tiny_llama(vocabulary=64, attention_bias=True, **changes)


def small_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2, bos_token_id=1)
    ).eval()


def lasered(model, rank=5, include=()):
    """Every matrix of the first block reduced, as factors."""
    weights = Weights(model)
    weights.keep_factors()
    for matrix in weights.matrices(include)[0]:
        if matrix.block == 0:
            weights.reduce(matrix, rank)
    return weights


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stored_in(folder):
    """The layers that the folder's config.json lists."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]

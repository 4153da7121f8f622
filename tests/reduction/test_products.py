from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from splaser_plugin.errors import ModelError
from splaser_plugin.reduction.products import watching
from splaser_plugin.weights.adapted import MergedWeights
from splaser_plugin.weights.in_memory import Weights
from tests.builders import tiny_llama
from tests.reduction.models import FUSED, tiny_fused, tiny_gpt2
from tests.reduction.watched import IDS, loss_of, unseen, watched


@pytest.mark.parametrize("model_of", [tiny_llama, tiny_gpt2])
def test_inputs_times_gradients_are_the_gradient_of_the_weight(model_of):
    weights = Weights(model_of())
    matrices = weights.matrices()[0]
    sums, tokens, told = watched(weights, matrices)
    narrow = {"self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"}  # and without a bias, which GPT-2 has
    assert all(told[matrix.name] == (matrix.type in narrow) for matrix in matrices)
    assert set(sums) == {matrix.name for matrix in matrices}
    assert set(tokens.values()) == {IDS.numel()}
    assert not unseen(weights, sums)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", FUSED)
def test_experts_see_the_tokens_routed_to_them(kind, implementation):
    model = tiny_fused(kind)
    if hasattr(model, "set_experts_implementation") and kind != "llama4":
        model.set_experts_implementation(implementation)
    weights = Weights(model)
    matrices = weights.matrices()[0]
    experts = [matrix for matrix in matrices if matrix.expert is not None]
    assert experts
    before = model.config._experts_implementation
    sums, tokens, told = watched(weights, matrices)
    for matrix in experts:
        assert matrix.name not in told or told[matrix.name] == matrix.type.endswith("down_proj")
    assert not any(told.get(f"model.layers.{block}.feed_forward.shared_expert.down_proj") for block in (0, 1)), (
        "llama4 adds the other experts' outputs to these in place"
    )
    assert model.config._experts_implementation == before
    assert not unseen(weights, sums)
    if kind == "mixtral":
        down = [tokens.get(expert.name, 0) for expert in experts if expert.type.endswith("down_proj")]
        assert sum(down) == 2 * 2 * IDS.numel(), "two experts a token in each of two blocks"


class HeadByHead(nn.Module):
    """Two layers that each read other inputs, of which none lie in order in memory."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, states):
        heads = states.unflatten(-1, (4, 8))
        both = self.up_proj(heads.transpose(1, 2)) + self.down_proj(heads.tanh().transpose(1, 2))
        return both.transpose(1, 2).flatten(2)


def test_inputs_keep_their_address_until_the_pass_ends_so_that_none_are_taken_for_others():
    model = tiny_llama()
    model.model.layers[1].mlp = HeadByHead()
    weights = Weights(model)
    given, alive = [], []

    def see(matrix, product):
        given.append(weakref.ref(product.inputs))
        alive.append(sum(ref() is not None for ref in given))

    with watching(weights, [matrix for matrix in weights.matrices()[0] if ".layers.1.mlp" in matrix.name], see):
        loss_of(model).backward()
    assert alive == [1, 2]


@pytest.mark.parametrize("change", [lambda hidden: hidden.mul_(0), lambda hidden: hidden[:, 0].zero_()])
def test_inputs_that_the_model_writes_over_are_refused(change):
    model = tiny_llama()
    mlp = model.model.layers[1].mlp

    def forward(states):
        hidden = functional.silu(mlp.gate_proj(states)) * mlp.up_proj(states)
        outputs = mlp.down_proj(hidden)
        change(hidden)
        return outputs

    mlp.forward = forward
    weights = Weights(model)
    with pytest.raises(ModelError, match=r"1\.mlp\.down_proj: the model writes over its inputs .* Exclude it, or use"):
        watched(weights, weights.matrices()[0])
    watched(weights, weights.matrices(exclude=["layers.1.mlp.down_proj"])[0])


def test_under_lora_the_base_layer_is_what_is_seen():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.eval()
    weights = MergedWeights(model)
    matrices = weights.matrices()[0]
    merged = {matrix: weights.read(matrix).clone() for matrix in matrices}
    sums, *_ = watched(weights, matrices)
    plain = Weights(tiny_llama())
    for matrix in plain.matrices()[0]:
        plain.write(matrix, merged[matrix])
    assert not unseen(plain, sums)


def test_the_backward_pass_goes_no_deeper_than_the_first_matrix():
    weights = Weights(tiny_llama())
    last = [matrix for matrix in weights.matrices()[0] if matrix.block == 1]
    seen = []
    with watching(weights, last, lambda matrix, *_: seen.append(matrix.name)):
        assert not weights.model.model.layers[0](torch.ones(1, 3, 32), position_embeddings=rotary(3)).requires_grad
        loss_of(weights.model).backward()
    assert len(seen) == len(last)


def rotary(length):
    return torch.ones(1, length, 8), torch.zeros(1, length, 8)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_afterwards_as_before(fails):
    model = tiny_fused("mixtral")
    model.set_experts_implementation("grouped_mm")
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 2 == 0)
        parameter.grad = torch.ones_like(parameter) if place % 3 == 0 else None
    before = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    weights = Weights(model)

    def see(*_):
        if fails:
            raise ZeroDivisionError

    try:
        with watching(weights, weights.matrices()[0], see):
            loss_of(model).backward()
    except ZeroDivisionError:
        assert fails
    for parameter, (requires_grad, gradient) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad is requires_grad
        assert parameter.grad is gradient
        assert gradient is None or bool((gradient == 1).all())
    assert model.config._experts_implementation == "grouped_mm"

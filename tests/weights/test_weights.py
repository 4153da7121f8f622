from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from splaser_plugin.errors import MatrixError, RankError
from splaser_plugin.weights.in_memory import Weights
from tests.builders import tiny_llama
from tests.reference import truncate


def state_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_reduced_matrix_is_the_best_approximation_of_its_rank(dtype):
    model = tiny_llama().to(dtype)
    weights = Weights(model)
    matrix = weights.matrices(["mlp.down_proj"])[0][0]
    original = weights.read(matrix).clone()
    weights.reduce(matrix, 5)
    assert weights.read(matrix).dtype == dtype
    expected = truncate(original, 5).to(dtype)
    torch.testing.assert_close(weights.read(matrix), expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
    if dtype == torch.float32:
        assert torch.linalg.matrix_rank(weights.read(matrix).double(), rtol=1e-5) == 5


def test_the_parameter_object_stays_the_same(tiny_model):
    before = {name: (id(parameter), parameter.data_ptr()) for name, parameter in tiny_model.named_parameters()}
    weights = Weights(tiny_model)
    weights.reduce(weights.matrices()[0][0], 3)
    assert before == {name: (id(parameter), parameter.data_ptr()) for name, parameter in tiny_model.named_parameters()}


@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
def test_an_undecided_change_is_undone_bit_for_bit(tiny_model, raised):
    before = state_of(tiny_model)
    weights = Weights(tiny_model)
    matrix = weights.matrices()[0][3]
    try:
        with weights.trying(matrix) as attempt:
            attempt.reduce(2)
            assert not unchanged(tiny_model, before)
            if raised:
                raise raised
    except (ValueError, KeyboardInterrupt):
        pass
    assert unchanged(tiny_model, before)


def test_a_kept_change_stays(tiny_model):
    weights = Weights(tiny_model)
    matrix = weights.matrices()[0][3]
    with weights.trying(matrix) as attempt:
        attempt.reduce(2)
        changed = weights.read(matrix).clone()
        attempt.keep()
    assert torch.equal(weights.read(matrix), changed)


def tensor_bytes():
    """Of all storages that any living tensor has; a compiler's tensors, which other tests may leave, have none."""
    gc.collect()
    living = (get_object for get_object in gc.get_objects() if isinstance(get_object, torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in living if not isinstance(tensor, FakeTensor | FunctionalTensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_only_the_matrix_being_tried_is_held_twice(tiny_model, kept):
    weights = Weights(tiny_model)
    matrix = weights.matrices()[0][3]
    size = weights.read(matrix).nbytes
    before = tensor_bytes()
    with weights.trying(matrix) as attempt:
        attempt.reduce(2)
        assert tensor_bytes() == before + size
        if kept:
            attempt.keep()
    assert tensor_bytes() == before


def test_originals_come_back_inside_and_only_there(tiny_model):
    before = state_of(tiny_model)
    weights = Weights(tiny_model)
    weights.remember_originals()
    first, second, third = weights.matrices()[0][:3]
    with weights.trying(first) as attempt:
        attempt.reduce(2)
        attempt.keep()
    with weights.trying(second) as attempt:
        attempt.reduce(2)
    with weights.trying(third) as attempt:
        attempt.reduce(2)
        now = state_of(tiny_model)
        with weights.originals():
            assert unchanged(tiny_model, before)
        assert unchanged(tiny_model, now)
    assert torch.equal(weights.read(second), before[second.parameter])


def test_originals_that_were_not_kept_are_refused(tiny_model):
    with pytest.raises(MatrixError, match="original weights were not kept"), Weights(tiny_model).originals():
        pass


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_out_of_range_names_the_matrix(tiny_model, rank):
    weights = Weights(tiny_model)
    matrix = weights.matrices(["layers.1.mlp.down_proj"])[0][0]
    with pytest.raises(RankError, match=rf"model\.layers\.1\.mlp\.down_proj: rank {rank}.*allows 1 to 32"):
        weights.reduce(matrix, rank)


def test_an_expert_is_reduced_alone():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    weights = Weights(MixtralForCausalLM(config))
    matrices = weights.matrices(["experts.down_proj"])[0]
    before = [weights.read(matrix).clone() for matrix in matrices]
    weights.reduce(matrices[1], 2)
    assert torch.equal(weights.read(matrices[0]), before[0])
    assert torch.equal(weights.read(matrices[2]), before[2])
    assert torch.linalg.matrix_rank(weights.read(matrices[1]).double(), rtol=1e-5) == 2

from __future__ import annotations

import pytest
import torch

from splaser_plugin.reduction.importance import fisher_cost, gradient_size
from splaser_plugin.reduction.moments import Moments
from splaser_plugin.weights.matrices import Matrix


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_both_are_what_single_tokens_say_one_by_one(shape):
    """The Kronecker form takes inputs and gradients as independent: so each gradient meets each input."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(7, shape[1], generator=generator, dtype=torch.float64)
    gradients = torch.randn(6, shape[0], generator=generator, dtype=torch.float64)
    predictions = 4
    changes = [float(g @ weight @ x) ** 2 / len(inputs) / predictions for g in gradients for x in inputs]
    input_norm = sum(float(x.norm()) ** 2 for x in inputs) / len(inputs)
    gradient_norm = sum(float(g.norm()) ** 2 for g in gradients) / predictions

    of_inputs, of_gradients = inputs.mT @ inputs / len(inputs), gradients.mT @ gradients / predictions
    is_upright = shape[0] >= shape[1]
    short, long = (of_inputs, of_gradients) if is_upright else (of_gradients, of_inputs)
    upright = weight if is_upright else weight.mT
    gram, long_mean = upright.mT @ long @ upright, float(long.diagonal().mean())
    moments = Moments(short.float(), gram.float(), long_mean, 0.0, 0.0, is_upright, 7, "a")
    assert fisher_cost(moments) == pytest.approx(sum(changes) / 2, rel=1e-5)
    matrix = Matrix("a", "a.weight", "a", None, shape)
    assert gradient_size(moments, matrix) == pytest.approx((input_norm * gradient_norm) ** 0.5, rel=1e-5)

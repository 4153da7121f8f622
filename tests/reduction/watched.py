"""What is told of a model's products, against the gradients of its weights."""

from __future__ import annotations

import torch
from torch.nn import functional

from splaser_plugin.reduction.products import watching

IDS = torch.arange(7, 47).reshape(2, 20) * 11 % 512


def loss_of(model, ids=IDS):
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def watched(weights, matrices, ids=IDS):
    """By name: the sum over tokens of the outer product as the matrix is stored, how many tokens there were, and
    whether the model's own outputs are told. These, and the gradients of the inputs, are checked."""
    sums, tokens, told = {}, {}, {}

    def see(matrix, product):
        inputs, gradients = product.inputs, product.output_gradients
        outer = gradients.mT @ inputs if product.columns_are_inputs else inputs.mT @ gradients
        sums[matrix.name] = sums.get(matrix.name, 0) + outer
        tokens[matrix.name] = tokens.get(matrix.name, 0) + len(inputs)
        weight = weights.parameters[matrix.parameter].detach()
        weight = matrix.view(weight).mT if product.columns_are_inputs else matrix.view(weight)
        told[matrix.name] = product.outputs is not None
        if product.outputs is not None:
            assert_close(product.outputs, inputs @ weight)
        assert_close(product.input_gradients, gradients @ weight.mT)

    with watching(weights, matrices, see):
        loss = loss_of(weights.model, ids)
        if loss.requires_grad:  # not where no product is followed
            loss.backward()
    return sums, tokens, told


def unseen(weights, sums, ids=IDS):
    """Names of the matrices that have a gradient and were not seen. That of a seen one is checked: it is the sum over
    tokens of its output's gradient times its input."""
    model = weights.model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        loss_of(model, ids).backward()
    found = []
    for matrix in weights.matrices()[0]:
        gradient = weights.parameters[matrix.parameter].grad
        if matrix.name in sums:
            assert_close(sums[matrix.name], matrix.view(gradient), share=1e-4)
        elif gradient is not None and matrix.view(gradient).abs().max() > 0:
            found.append(matrix.name)
    return found


def assert_close(got, expected, share=1e-5):
    assert torch.allclose(got, expected, rtol=1e-3, atol=share * float(expected.abs().max()) + 1e-7)

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splaser_plugin.reduction.allocation import gauge_storage
from splaser_plugin.reduction.gauge import gauge, interpolative
from splaser_plugin.reduction.gauge_layer import GaugeLinear


def factors_of(outputs, inputs, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -3, rank, dtype=torch.float64)
    left = torch.randn(outputs, rank, dtype=torch.float64, generator=generator) * decay
    return left, torch.randn(rank, inputs, dtype=torch.float64, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(2, 24), st.data())
def test_it_is_the_same_matrix_in_as_many_numbers_as_it_has_freedom(outputs, inputs, data):
    rank = data.draw(st.integers(1, min(outputs, inputs) - 1))
    left, right = factors_of(outputs, inputs, rank, seed=outputs)
    found = gauge(left, right, torch.float64)
    exact = left @ right
    assert torch.allclose(found.product(), exact, rtol=0, atol=1e-11 * float(exact.abs().max()))
    assert found.skeleton.numel() + found.interpolation.numel() == gauge_storage(outputs, inputs, rank)
    assert (found.shape, found.rank) == ((outputs, inputs), rank)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10**6), st.data())
def test_no_coefficient_is_above_the_bound(rows, seed, data):
    rank = data.draw(st.integers(1, rows - 1))
    left = np.random.default_rng(seed).standard_cauchy((rows, rank))
    pivots, coefficients = interpolative(left, bound=1.1)
    others = np.setdiff1d(np.arange(rows), pivots)
    assert np.abs(coefficients).max() <= 1.1
    assert coefficients @ left[pivots] == pytest.approx(left[others], rel=1e-6, abs=1e-6 * np.abs(left).max())


def test_the_bound_is_kept_where_pivoted_qr_alone_breaks_it():
    """Kahan's matrix, on which QR with column pivoting changes nothing and leaves large coefficients."""
    size, sine, cosine = 30, np.sqrt(1 - 0.285**2), 0.285
    kahan = np.diag(sine ** np.arange(size)) @ (np.eye(size) - cosine * np.triu(np.ones((size, size)), 1))
    left = kahan[: size - 1].T
    _, coefficients = interpolative(left)
    assert np.abs(coefficients).max() <= 2.0


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
def test_rounding_is_amplified_little(dtype, limit):
    left, right = factors_of(96, 64, 40)
    exact = left @ right
    error = (gauge(left, right, dtype).product().double() - exact).norm() / exact.norm()
    plain = ((left.to(dtype).double() @ right.to(dtype).double()).to(dtype).double() - exact).norm() / exact.norm()
    assert error < limit
    assert error < 5 * plain


def test_rows_or_columns_by_which_is_closer_once_rounded():
    left, right = factors_of(60, 60, 20)
    lopsided = left.clone()
    lopsided[0] *= 1e4
    exact = lopsided @ right
    for found in (gauge(lopsided, right, torch.bfloat16), gauge(right.mT, lopsided.mT, torch.bfloat16)):
        assert found.product().dtype == torch.bfloat16
    one = gauge(lopsided, right, torch.bfloat16)
    other = gauge(right.mT, lopsided.mT, torch.bfloat16)
    assert one.by_rows != other.by_rows, "the transpose is stored the other way"
    assert torch.equal(one.product(), other.product().mT)
    assert (one.product().double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_layer_computes_with_the_matrix(transposed, with_bias):
    left, right = factors_of(24, 15, 7)
    found = gauge(left, right, torch.float64)
    if transposed:  # whichever way the first one is stored, this is the other
        found = type(found)(found.pivots, found.skeleton.mT, found.interpolation.mT, not found.by_rows)
    outputs, inputs = found.shape
    bias = torch.nn.Parameter(torch.randn(outputs, dtype=torch.float64)) if with_bias else None
    layer = GaugeLinear.of(found, bias)
    x = torch.randn(2, 5, inputs, dtype=torch.float64)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, found.product(), bias), atol=1e-10)
    assert layer(x[0, 0]).shape == (outputs,)
    assert torch.equal(layer.gauge.pivots, found.pivots)
    assert torch.equal(layer.gauge.product(), found.product())
    assert sum(each.numel() for each in layer.parameters() if each is not bias) == gauge_storage(outputs, inputs, 7)
    assert "rank=7" in repr(layer)


def test_the_layer_is_filled_from_a_state_dict_and_trains():
    left, right = factors_of(12, 10, 4)
    layer = GaugeLinear.of(gauge(left, right, torch.float32))
    again = GaugeLinear(10, 12, 4, by_rows=layer.by_rows, bias=False)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 10)
    assert torch.equal(again(x), layer(x))
    again(x).square().sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in again.parameters())
    assert again.to(torch.bfloat16).order.dtype == torch.int32

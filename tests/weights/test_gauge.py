"""Storage by pivot rows or columns: exact, bounded, close once rounded; the layers that compute with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splaser_plugin.reduction.allocation import gauge_storage
from splaser_plugin.spectra import spectrum
from splaser_plugin.weights.factored_layers import GaugeLinear, TwoFactorLinear
from splaser_plugin.weights.gauge import gauge, interpolative


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
    assert error < 4 * plain


def test_the_pivots_are_of_the_shorter_side():
    left, right = factors_of(60, 50, 20)
    lopsided = left * torch.logspace(0, 4, len(left), dtype=left.dtype)[:, None]
    exact = lopsided @ right
    columns = gauge(lopsided, right, torch.bfloat16)
    rows = gauge(right.mT, lopsided.mT, torch.bfloat16)
    assert rows.by_rows and not columns.by_rows
    assert rows.product().dtype == columns.product().dtype == torch.bfloat16
    assert torch.equal(columns.product(), rows.product().mT)
    assert (columns.product().double() - exact).norm() < 1e-2 * exact.norm()


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
    x = torch.randn(2, 40, inputs, dtype=torch.float64)
    for tokens in (x, x[0, 0], x[:, :1], x[0, :12], x[:0]):  # few tokens take another way than many
        wanted = torch.nn.functional.linear(tokens, found.product(), bias)
        assert torch.allclose(layer(tokens), wanted, atol=1e-10)
        for_training = tokens.clone().requires_grad_()
        (layer(for_training) * wanted).sum().backward()
        assert torch.allclose(for_training.grad, wanted @ found.product(), atol=1e-9)
    assert torch.equal(layer.gauge.pivots, found.pivots)
    assert torch.equal(layer.gauge.product(), found.product())
    assert sum(parameter.numel() for parameter in layer.parameters() if parameter is not bias) == gauge_storage(
        outputs, inputs, 7
    )
    assert "rank=7" in repr(layer)


@pytest.mark.parametrize("transposed", [False, True])
def test_many_tokens_are_computed_at_a_high_rank_as_at_a_low_one(transposed):
    found = gauge(*factors_of(40, 38, 37), torch.float64)
    if transposed:
        found = type(found)(found.pivots, found.skeleton.mT, found.interpolation.mT, not found.by_rows)
    x = torch.randn(50, found.shape[1], dtype=torch.float64)
    assert torch.allclose(GaugeLinear.of(found)(x), x @ found.product().mT, atol=1e-10)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [3, 60])
def test_under_autocast_it_computes_in_the_dtype_that_a_plain_layer_does(tokens, transposed):
    found = gauge(*factors_of(16, 12, 5), torch.float32)
    layer = GaugeLinear.of(found.mT if transposed else found, torch.nn.Parameter(torch.randn(found.shape[transposed])))
    x = torch.randn(tokens, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        computed, plain = layer(x), layer.dense()(x)
    assert computed.dtype == plain.dtype == torch.bfloat16
    assert torch.allclose(computed, plain, atol=0.05 * float(plain.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [3, 50])
def test_an_exported_layer_takes_other_numbers_of_tokens(tokens):
    found = gauge(*factors_of(40, 24, 4), torch.float64)
    layer, dynamic = GaugeLinear.of(found), {0: torch.export.Dim.AUTO}
    example, other = (torch.randn(count, 24, dtype=torch.float64) for count in (tokens, tokens + 1))
    exported = torch.export.export(layer, (example,), dynamic_shapes=(dynamic,), strict=False).module()
    assert torch.allclose(exported(other), other @ found.product().mT, atol=1e-10)


def test_the_layer_is_filled_from_a_state_dict_and_trains():
    left, right = factors_of(12, 10, 4)
    layer = GaugeLinear.of(gauge(left, right, torch.float32))
    again = GaugeLinear(10, 12, 4, by_rows=layer.by_rows, bias=False)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 10)
    assert torch.equal(again(x), layer(x))
    again(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in again.parameters())
    assert again.to(torch.bfloat16).order.dtype == torch.int32


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 10), (10, 12)])
def test_factors_that_hold_less_than_their_rank_are_stored_as_well(outputs, inputs):
    """As of an adapter that was never trained: its second factor is zero."""
    left, right = factors_of(outputs, inputs, 3)
    wide = torch.cat([left, torch.zeros(outputs, 2)], dim=1), torch.cat([right, torch.ones(2, inputs)])
    for factors in (wide, (wide[1].mT, wide[0].mT), (0 * wide[0], wide[1])):
        found = gauge(*factors, torch.float64)
        assert float(found.interpolation.abs().max()) <= 2.0
        assert torch.allclose(found.product(), factors[0] @ factors[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_weights_stay_finite(scale, dtype):
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)) * scale
    found = gauge(*spectrum.factors(weight, 4), dtype).product()
    best = spectrum.truncate(weight, 4)
    assert (found.double() - best.double()).norm() < 8 * torch.finfo(dtype).eps * best.double().norm()


def test_what_is_beyond_the_dtype_becomes_its_largest_number():
    left, right = factors_of(12, 10, 4)
    found = gauge(left * 1e6, right, torch.float16)
    assert torch.isfinite(found.product()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_transpose_has_the_same_bits(dtype):
    found = gauge(*factors_of(40, 30, 12), dtype)
    assert found.mT.by_rows != found.by_rows
    assert torch.equal(found.mT.product(), found.product().mT)
    assert torch.equal(found.mT.mT.product(), found.product())


def test_its_factors_multiply_to_it():
    for found in (gauge(*factors_of(40, 30, 12), torch.float64), gauge(*factors_of(30, 40, 12), torch.float64).mT):
        left, right = found.factors()
        assert torch.allclose(left @ right, found.product(), atol=1e-12)


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_layer_joined_with_an_adapter_has_both_ranks(by_rows):
    found = gauge(*factors_of(24, 15, 7), torch.float64)
    layer = GaugeLinear.of(found if found.by_rows == by_rows else found.mT, torch.nn.Parameter(torch.zeros(1)))
    before = layer.product()
    left, right = torch.randn(before.shape[0], 3).double(), torch.randn(3, before.shape[1]).double()
    joined = layer.joined(left, right)
    assert (joined.rank, joined.bias) == (10, layer.bias)
    assert torch.allclose(joined.product(), before + left @ right, atol=1e-10)
    full = layer.joined(torch.eye(before.shape[0]).double(), torch.randn(*before.shape).double())
    assert type(full) is torch.nn.Linear
    old = TwoFactorLinear(15, 24, 7, dtype=torch.float64)
    for parameter, values in zip((old.weight, old.right_factor), factors_of(24, 15, 7), strict=True):
        parameter.data.copy_(values)
    assert old.joined(left[:24, :1].new_ones(24, 1), right.new_ones(1, 15)).rank == 8

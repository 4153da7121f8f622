from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splaser_plugin.errors import RankError, SpectrumError
from splaser_plugin.reduction.calibration import window_rows
from splaser_plugin.reduction.moments import Moments, _add, _noise, measure
from splaser_plugin.reduction.truncation import LEAST_SHRINKAGE, _shrunk, decompose, decompose_by_moments
from splaser_plugin.spectra.spectrum import factors, singular_values, truncate
from splaser_plugin.weights.in_memory import Weights
from tests.builders import tiny_llama
from tests.products import are_exact, coarse_products
from tests.reduction.models import tiny_fused, tiny_gpt2


def moments(size, seed, condition=1e3):
    """A positive definite matrix of float64 whose eigenvalues span the condition number."""
    generator = torch.Generator().manual_seed(seed)
    vectors, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return vectors * torch.logspace(0, -np.log10(condition), size, dtype=torch.float64) @ vectors.mT


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.sqrt() @ vectors.mT


def best_by_brute_force(weight, rows, columns, rank):
    """Truncated SVD of the weighed matrix, brought back with inverse square roots."""
    left, right = root(rows), root(columns)
    u, s, v = torch.linalg.svd(left @ weight @ right, full_matrices=False)
    kept = u[:, :rank] * s[:rank] @ v[:rank]
    return torch.linalg.inv(left) @ kept @ torch.linalg.inv(right), float(s[rank:].square().sum()) / 2


def cost_of(change, rows, columns):
    return float(torch.trace(change.mT @ rows @ change @ columns)) / 2


def random_weight(shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_truncation_is_the_optimum_and_costs_what_is_predicted(shape, rank):
    weight = random_weight(shape)
    rows, columns = moments(shape[0], 1), moments(shape[1], 2)
    found = decompose(weight, rows, columns)
    best, cost = best_by_brute_force(weight, rows, columns, rank)
    truncated = found.truncated(weight, rank)
    assert torch.allclose(truncated, best, rtol=0, atol=1e-8 * float(best.abs().max()))
    assert found.costs[rank] == pytest.approx(cost, rel=1e-8)
    assert cost_of(truncated - weight, rows, columns) == pytest.approx(cost, rel=1e-8)
    assert torch.linalg.matrix_rank(truncated, rtol=1e-9) == rank


def test_costs_fall_from_losing_everything_to_nothing():
    weight = random_weight((9, 7))
    rows, columns = moments(9, 1), moments(7, 2)
    costs = decompose(weight, rows, columns).costs
    assert costs.shape == (8,)
    assert costs[0] == pytest.approx(cost_of(weight, rows, columns))
    assert costs[-1] == 0
    assert (np.diff(costs) < 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 99))
def test_no_random_matrix_of_the_rank_costs_less(rows_count, columns_count, seed):
    weight = random_weight((rows_count, columns_count), seed)
    rows, columns = moments(rows_count, seed + 1), moments(columns_count, seed + 2)
    found = decompose(weight, rows, columns)
    rank = 1 + seed % min(rows_count, columns_count)
    left, right = found.factors(weight, rank)
    for step in (1e-1, 1e-3):
        moved = (left + step * random_weight(left.shape, seed)) @ (right + step * random_weight(right.shape, seed + 1))
        assert cost_of(moved - weight, rows, columns) >= found.costs[rank] - 1e-12


def test_a_planted_low_rank_comes_back_without_loss():
    planted = random_weight((20, 3)) @ random_weight((3, 30), 1)
    found = decompose(planted, moments(20, 2), moments(30, 3))
    assert found.costs[3] < 1e-12 * found.costs[0]
    assert torch.allclose(found.truncated(planted, 3), planted, atol=1e-9)


def test_directions_that_no_input_has_go_first():
    weight = random_weight((8, 6))
    columns = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-9, 1e-9, 1e-9], dtype=torch.float64))
    found = decompose(weight, None, columns)
    assert torch.allclose(found.truncated(weight, 3)[:, :3], weight[:, :3], atol=1e-6)
    assert found.costs[3] < 1e-7


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (8, 8)])
def test_a_matrix_stored_the_other_way_round_gives_the_same(shape):
    weight = random_weight(shape)
    rows, columns = moments(shape[0], 1), moments(shape[1], 2)
    one, other = decompose(weight, rows, columns), decompose(weight.mT.contiguous(), columns, rows)
    assert other.costs == pytest.approx(one.costs, rel=1e-9, abs=1e-12)
    assert torch.allclose(one.truncated(weight, 4), other.truncated(weight.mT.contiguous(), 4).mT, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_nothing_weighed_it_is_the_plain_truncation_bit_for_bit(dtype):
    weight = random_weight((30, 20)).to(dtype)
    found = decompose(weight, None, None)
    assert torch.equal(found.truncated(weight, 7), truncate(weight, 7))
    for one, other in zip(found.factors(weight, 7), factors(weight, 7), strict=True):
        assert torch.equal(one, other)
    assert found.costs[7] == pytest.approx((singular_values(weight)[7:] ** 2).sum() / 2)


def test_identities_weigh_like_nothing():
    weight = random_weight((14, 9))
    weighed = decompose(weight, torch.eye(14, dtype=torch.float64), torch.eye(9, dtype=torch.float64))
    assert weighed.costs == pytest.approx(decompose(weight, None, None).costs, abs=1e-12)
    assert torch.allclose(weighed.truncated(weight, 4), truncate(weight, 4), atol=1e-9)


def test_one_side_alone_is_whitened_truncation():
    weight, columns = random_weight((14, 9)), moments(9, 3)
    best, cost = best_by_brute_force(weight, torch.eye(14, dtype=torch.float64), columns, 4)
    found = decompose(weight, None, columns)
    assert torch.allclose(found.truncated(weight, 4), best, atol=1e-9)
    assert found.costs[4] == pytest.approx(cost)


@pytest.mark.parametrize("rank", [3, 17])
def test_factors_multiply_to_the_truncation_near_full_rank_too(rank):
    weight = random_weight((20, 18))
    found = decompose(weight, moments(20, 1, 1e6), moments(18, 2, 1e6))
    left, right = found.factors(weight, rank)
    assert left.shape == (20, rank) and right.shape == (rank, 18)
    assert torch.allclose(left @ right, found.truncated(weight, rank), atol=1e-8)


def test_float32_weights_are_cut_as_exactly_as_they_are_stored():
    weight = random_weight((40, 30)).float()
    rows, columns = moments(40, 1, 1e5), moments(30, 2, 1e5)
    _, cost = best_by_brute_force(weight.double(), rows, columns, 12)
    found = decompose(weight, rows.float(), columns.float())
    assert found.truncated(weight, 12).dtype == torch.float32
    assert cost_of(found.truncated(weight, 12).double() - weight.double(), rows, columns) == pytest.approx(
        cost, rel=1e-3
    )


@pytest.mark.parametrize("rank", [3, 17])
def test_a_truncation_is_exact_where_the_user_asked_for_coarse_products(rank):
    weight = random_weight((20, 18)).float()
    with coarse_products() as precisions:
        found = decompose(weight, moments(20, 1), moments(18, 2))
        found.truncated(weight, rank)
        found.factors(weight, rank)
    assert are_exact(precisions)


def test_the_full_rank_is_a_copy():
    weight = random_weight((6, 5)).bfloat16()
    copy = decompose(weight, moments(6, 1), moments(5, 2)).truncated(weight, 5)
    assert torch.equal(copy, weight) and copy.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_out_of_range_is_refused(rank):
    weight = random_weight((6, 5))
    found = decompose(weight, moments(6, 1), moments(5, 2))
    with pytest.raises(RankError, match=rf"rank {rank}, but a weight of shape \(6, 5\) allows 1 to 5"):
        found.truncated(weight, rank)


def test_moments_that_are_not_those_of_the_weight_are_refused():
    with pytest.raises(SpectrumError, match=r"moments of shape \(5, 5\) for side 0 of a weight of shape \(6, 5\)"):
        decompose(random_weight((6, 5)), moments(5, 1), None)


def test_moments_of_too_few_tokens_are_refused():
    x = random_weight((2, 5))
    with pytest.raises(SpectrumError, match=r"not positive definite, .* Exclude this matrix, or use .*reduce svd\."):
        decompose(random_weight((6, 5)), None, x.mT @ x)


def test_a_weight_with_nan_is_refused():
    weight = random_weight((6, 5))
    weight[2, 3] = float("nan")
    with pytest.raises(SpectrumError, match="hold inf or nan"):
        decompose(weight, None, moments(5, 1))


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_measured_moments_weigh_as_those_of_both_sides_shrunk(shape, transposed, with_gradients):
    weight = random_weight(shape)
    inputs_side, outputs_side = (0, 1) if transposed else (1, 0)
    sides = [moments(shape[0], 1), moments(shape[1], 2)]
    upright = shape[0] >= shape[1]
    short_side, long_side = (1, 0) if upright else (0, 1)
    standing = weight if upright else weight.mT
    measured = Moments(
        short=sides[short_side],
        gram=standing.mT @ sides[long_side] @ standing,
        long_mean=float(sides[long_side].diagonal().mean()),
        short_noise=0.0,
        gram_noise=0.0,
        short_is_inputs=short_side == inputs_side,
        tokens=100,
        reads="",
    )
    shrunk = [
        torch.lerp(side, side.diagonal().mean() * torch.eye(len(side), dtype=side.dtype), LEAST_SHRINKAGE)
        for side in sides
    ]
    if not with_gradients:
        shrunk[outputs_side] = None
    found = decompose_by_moments(weight, measured, with_gradients=with_gradients)
    expected = decompose(weight, *shrunk)
    assert found.costs == pytest.approx(expected.costs, rel=1e-9, abs=1e-12)
    assert torch.allclose(found.truncated(weight, 4), expected.truncated(weight, 4), atol=1e-9)


@pytest.mark.parametrize("tokens", [30, 300, 3000])
def test_moments_are_shrunk_by_about_the_share_that_is_closest_to_the_truth(tokens):
    generator = torch.Generator().manual_seed(0)
    truth = torch.diag(torch.linspace(0.1, 2, 20, dtype=torch.float64))
    values = torch.randn(tokens, 20, dtype=torch.float64, generator=generator) * truth.diagonal().sqrt()
    total = torch.zeros(20, 20, dtype=torch.float64)
    fourth = _add(total, values)
    measured = total / tokens
    target = measured.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    noise = _noise(total, fourth, tokens) / tokens**2
    assert noise == pytest.approx(float((measured - truth).square().sum()), rel=0.35)

    def error(share):
        return float((torch.lerp(measured, target, share) - truth).norm())

    best = min(error(share) for share in np.linspace(0, 1, 101))
    shrunk = _shrunk(measured, target, noise)
    assert float((shrunk - truth).norm()) < 1.1 * best
    assert float((shrunk - truth).norm()) < 1.01 * error(0.0)


@pytest.mark.parametrize("tokens", [2, 3, 10])
def test_the_error_expected_of_few_tokens_is_the_true_one_on_average(tokens):
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.1, 2, 20, dtype=torch.float64).sqrt()
    expected, true = [], []
    for _ in range(2000):
        values = torch.randn(tokens, 20, dtype=torch.float64, generator=generator) * scales
        total = torch.zeros(20, 20, dtype=torch.float64)
        expected.append(_noise(total, _add(total, values), tokens) / tokens**2)
        true.append(float((total / tokens - torch.diag(scales**2)).square().sum()))
    assert np.mean(expected) == pytest.approx(np.mean(true), rel=0.05)


def test_what_a_single_token_had_says_nothing_of_directions():
    weight, values = random_weight((12, 7)), random_weight((1, 7), 1)
    short = torch.zeros(7, 7, dtype=torch.float64)
    fourth = _add(short, values)
    target = short.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    noise = _noise(short, fourth, 1)
    assert torch.equal(_shrunk(short, target, noise), target)
    measured = Moments(short, weight.mT @ weight, 1.0, noise, noise, True, 1, "")
    plain = decompose(weight, None, None).costs * float(target[0, 0])
    assert decompose_by_moments(weight, measured).costs == pytest.approx(plain, abs=1e-12)


def kl_of(model, rows, before):
    """Mean over all predictions of KL(before || now), in nats."""
    with torch.no_grad():
        now = torch.cat([model(input_ids=row).logits[0] for row in rows]).double().log_softmax(-1)
    return float((before.exp() * (before - now)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("model_of", [lambda: tiny_llama(vocabulary=512), tiny_gpt2, lambda: tiny_fused("gpt_oss")])
def test_the_predicted_cost_is_the_measured_divergence_of_small_changes(model_of):
    model = model_of()
    weights = Weights(model)
    matrices = weights.matrices()[0][::2]
    if any(matrix.expert is not None for matrix in matrices):  # a change before a router moves tokens by jumps
        matrices = [matrix for matrix in matrices if matrix.expert is not None and matrix.block == 1]
    windows = torch.randint(3, 512, (24, 32), generator=torch.Generator().manual_seed(0))
    found = dict(measure(weights, matrices, window_rows(windows.tolist()), samples=4))
    rows = [window[None] for window in windows]
    with torch.no_grad():
        before = torch.cat([model(input_ids=row).logits[0] for row in rows]).double().log_softmax(-1)
    predicted, measured = [], []
    for matrix in matrices:
        weight = weights.read(matrix).clone()
        unshrunk = replace(found[matrix], short_noise=0.0, gram_noise=0.0)
        decomposition = decompose_by_moments(weight, unshrunk)
        rank = min(weight.shape) - 2
        change = decomposition.truncated(weight, rank) - weight
        step = (1e-4 / decomposition.costs[rank]) ** 0.5  # to where higher orders don't count
        weights.write(matrix, weight + step * change)
        measured.append(kl_of(model, rows, before) / step**2)
        predicted.append(decomposition.costs[rank])
        weights.write(matrix, weight)
    ratios = np.array(measured) / np.array(predicted)
    assert 0.7 < np.median(ratios) < 1.4
    assert ratios.min() > 0.3 and ratios.max() < 3
    assert np.corrcoef(np.log(measured), np.log(predicted))[0, 1] > 0.9

"""Edges in given singular values: known spectra, planted ranks, and values of every size."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate

from splaser_plugin.errors import SpectrumError
from splaser_plugin.spectra.edges import EDGES, EdgeFit, fit_edge, fit_edges, mp_density, mp_median, same_fits
from tests import reference

MAGNITUDES = st.floats(0, 1e300, allow_subnormal=True)


@lru_cache(maxsize=8)
def gaussian_spectrum(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((rows, columns))
    return torch.linalg.svdvals(torch.from_numpy(noise)).numpy()


def assert_finite_or_reasoned(fit: EdgeFit) -> None:
    assert math.isfinite(fit.sigma) and math.isfinite(fit.threshold)
    ratios = (fit.snr, fit.snr_ratio)
    assert (None in ratios) == (fit.reason is not None)
    assert all(math.isfinite(ratio) for ratio in ratios if ratio is not None)


@pytest.mark.parametrize("beta", [0.001, 0.05, 0.25, 0.5, 0.75, 0.99, 1.0])
def test_mp_median_agrees_with_integrating_the_density(beta: float) -> None:
    assert mp_median(beta) == pytest.approx(reference.mp_median(beta), rel=1e-9)


@pytest.mark.parametrize("shape", [(64, 64), (64, 65), (576, 1536), (1536, 576), (1, 50), (4096, 14336)])
@pytest.mark.parametrize("sigma", [1.0, 0.02])
def test_mp_density_integrates_to_one_within_the_support(shape: tuple[int, int], sigma: float) -> None:
    low, high = (sigma * abs(math.sqrt(shape[0]) + sign * math.sqrt(shape[1])) for sign in (-1, 1))

    def density(value: float) -> float:
        return float(mp_density(np.array([value]), shape, sigma)[0])

    assert integrate.quad(density, low, high, limit=200)[0] == pytest.approx(1, abs=1e-6)
    assert (mp_density(np.array([0.5 * low, 1.01 * high]), shape, sigma) == 0).all() or low == 0


def test_mp_density_at_zero_is_that_of_the_quarter_circle() -> None:
    assert mp_density(np.zeros(1), (100, 100), 2.0)[0] == pytest.approx(1 / (math.pi * math.sqrt(100)))
    assert mp_density(np.zeros(1), (100, 101), 2.0)[0] == 0


@pytest.mark.parametrize("shape", [(400, 400), (300, 700), (700, 300)])
def test_mp_density_is_that_of_simulated_noise(shape: tuple[int, int]) -> None:
    values = 0.5 * gaussian_spectrum(*shape)
    ends = (0.5 * abs(math.sqrt(shape[0]) + sign * math.sqrt(shape[1])) for sign in (-1, 1))
    for low, high in pairwise(np.linspace(*ends, 7)):
        points = np.linspace(low, high, 2000)
        expected = integrate.trapezoid(mp_density(points, shape, 0.5), points)
        assert np.mean((values >= low) & (values < high)) == pytest.approx(expected, abs=3 / len(values))


def test_mp_median_is_the_median_of_squared_singular_values_of_noise() -> None:
    squares = gaussian_spectrum(400, 800) ** 2 / 800
    assert np.median(squares) == pytest.approx(mp_median(0.5), rel=0.01)


@pytest.mark.parametrize("beta", [0.0, -1.0, 1.1, math.nan])
def test_mp_median_refuses_a_beta_out_of_range(beta: float) -> None:
    with pytest.raises(SpectrumError, match=r"is not in \(0, 1\]: give the short side over the long side"):
        mp_median(beta)


@pytest.mark.parametrize("shape", [(1024, 1024), (512, 1024), (256, 1024)])
@pytest.mark.parametrize("edge", ["mp", "gavish-donoho"])
def test_calibrated_edges_flag_at_most_two_values_of_pure_noise(shape: tuple[int, int], edge: str) -> None:
    assert fit_edge(gaussian_spectrum(*shape), shape, edge).rank <= 2


@pytest.mark.parametrize(("rows", "share"), [(1024, 0.24), (512, 0.65), (256, 1.0)])
def test_published_edge_finds_signal_in_pure_noise(rows: int, share: float) -> None:
    fit = fit_edge(gaussian_spectrum(rows, 1024), (rows, 1024), "iqr")
    assert fit.rank / rows == pytest.approx(share, abs=0.02)
    if share == 1.0:
        assert (fit.snr, fit.snr_ratio) == (None, None)
        assert fit.reason == "no singular value is at or below the threshold: all 256 count as signal"


def test_planted_rank_comes_back() -> None:
    generator = np.random.default_rng(1)
    left, right = generator.standard_normal((1024, 20)), generator.standard_normal((20, 2752))
    weight = 0.2 * left @ right + generator.standard_normal((1024, 2752))
    values = np.linalg.svd(weight, compute_uv=False)
    assert fit_edge(values, (1024, 2752), "mp").rank == 20
    assert fit_edge(values, (1024, 2752), "gavish-donoho").rank == 20


def test_every_edge_follows_its_published_formula() -> None:
    weight = torch.randn(60, 150, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight[:, 0] *= 40
    fits = fit_edges(reference.singular_values(weight).numpy(), (60, 150))
    for edge, threshold in reference.thresholds(weight).items():
        snr, rank = reference.snr_and_rank(weight, threshold)
        largest = reference.singular_values(weight).max().item()
        assert fits[edge].threshold == pytest.approx(threshold, rel=1e-9)
        assert fits[edge].rank == rank
        assert fits[edge].snr == pytest.approx(snr, rel=1e-12)
        assert fits[edge].snr_ratio == pytest.approx(snr / largest, rel=1e-12)


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.integers(1, 40), elements=MAGNITUDES), st.integers(0, 50))
def test_any_values_give_finite_numbers_or_a_reason(values: np.ndarray, longer: int) -> None:
    for fit in fit_edges(values, (values.size, values.size + longer)).values():
        assert_finite_or_reasoned(fit)


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1e6, allow_subnormal=False)),
    st.integers(0, 50),
    st.integers(-100, 100),
)
def test_scale_and_transposition_change_no_rank_and_no_snr(values: np.ndarray, longer: int, power: int) -> None:
    shape = (values.size, values.size + longer)
    values = np.where(values < 1e-6, 0.0, values)
    for edge in EDGES:
        fit = fit_edge(values, shape, edge)
        scaled = fit_edge(np.ldexp(values, power), shape[::-1], edge)
        assert (scaled.rank, scaled.snr) == (fit.rank, fit.snr)


@pytest.mark.parametrize(
    ("values", "edge", "reason"),
    [
        ([0.0, 0.0], "iqr", "every singular value is zero"),
        ([2.0, 0.0, 0.0, 0.0], "mp", "the 3 singular values at or below the threshold are zero"),
        ([5.0], "iqr", "all 1 count as signal"),
        ([1e300] + [1e-20] * 8, "mp", "the ratio of signal to noise is too large for float64"),
        ([1e-320, 4e-321, 4e-321, 4e-321], "mp", "divided by the largest singular value"),
    ],
)
def test_a_missing_ratio_has_its_reason(values: list[float], edge: str, reason: str) -> None:
    fit = fit_edge(np.array(values), (len(values), len(values)), edge)
    assert_finite_or_reasoned(fit)
    assert fit.reason is not None and reason in fit.reason


def test_an_unknown_edge_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpectrumError, match=r"unknown edge 'knee'. Use one of: iqr, mp, gavish-donoho"):
        fit_edge(np.ones(3), (3, 3), "knee")


@pytest.mark.parametrize("shape", [(3, 4), (5, 5), (0, 4), (4,)])
def test_values_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpectrumError, match="expected one a row or column, whichever are fewer"):
        fit_edges(np.ones(4), shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.inf, math.nan, -1.0])
def test_values_that_are_not_finite_or_negative_are_refused(bad: float) -> None:
    with pytest.raises(SpectrumError, match=r"must be finite and not negative.*Check the weight for inf and nan"):
        fit_edges(np.array([1.0, bad]), (2, 2))


def test_a_threshold_beyond_float64_is_refused() -> None:
    values = np.array([1.7e308, 1.7e308, 1e300, 1e300])
    with pytest.raises(SpectrumError, match=r"threshold is too large for float64.*Scale the weight down"):
        fit_edge(values, (4, 4), "mp")


def test_bounds_that_move_nothing_agree() -> None:
    values = gaussian_spectrum(50, 100)
    assert same_fits(values, values, (50, 100), 1e-6)
    assert same_fits(values * (1 - 1e-8), values * (1 + 1e-8), (50, 100), 1e-6)


def test_bounds_that_leave_a_sum_open_do_not_agree() -> None:
    values = gaussian_spectrum(50, 100)
    assert not same_fits(values * (1 - 1e-6), values * (1 + 1e-6), (50, 100), 1e-6)


@pytest.mark.parametrize("edge", EDGES)
def test_a_value_at_a_threshold_leaves_the_rank_open(edge: str) -> None:
    values = gaussian_spectrum(100, 150).copy()
    threshold = fit_edge(values, (100, 150), edge).threshold
    values[np.argmin(np.abs(values - threshold))] = threshold
    assert fit_edge(values, (100, 150), edge).threshold == threshold
    assert not same_fits(values * (1 - 1e-12), values * (1 + 1e-12), (100, 150), 1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-12, 1e-5))
def test_bounds_that_agree_hold_the_same_rank_everywhere_between(seed: int, width: float) -> None:
    values = gaussian_spectrum(20, 30, seed)
    lower, upper = values * (1 - width), values * (1 + width)
    inside = np.sort(np.random.default_rng(seed).uniform(lower, upper))[::-1]
    if same_fits(lower, upper, (20, 30), 1e-4):
        for edge in EDGES:
            first, second = fit_edge(values, (20, 30), edge), fit_edge(inside, (20, 30), edge)
            assert first.rank == second.rank
            assert first.threshold == pytest.approx(second.threshold, rel=1e-4)

"""Singular values and truncation against a plain SVD in float64, on spectra easy and hard, in every dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splaser_plugin.errors import RankError, SpectrumError
from splaser_plugin.spectra import spectrum
from splaser_plugin.spectra.edges import EDGES, fit_edge, fit_edges
from splaser_plugin.spectra.spectrum import factors, singular_values, singular_values_of_batch, truncate
from tests import reference

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    left = torch.linalg.qr(gaussian(rows, values.numel(), seed))[0]
    right = torch.linalg.qr(gaussian(columns, values.numel(), seed + 1))[0]
    return (left * values) @ right.mT


def trained_like(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Noise under a power law of signal, with one direction that outweighs all the others."""
    short = min(rows, columns)
    values = 3.0 * torch.arange(1, short + 1, dtype=torch.float64) ** -0.7
    values[0] = 60.0
    return with_spectrum(values, rows, columns, seed) + gaussian(rows, columns, seed + 2) * 0.003


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "square noise": lambda: gaussian(96, 96),
    "wide noise": lambda: gaussian(64, 300),
    "tall noise": lambda: gaussian(300, 64),
    "more than one panel": lambda: gaussian(300, 400),
    "trained": lambda: trained_like(120, 200),
    "one large mean": lambda: gaussian(80, 160) * 0.01 + 1.0,
    "duplicates": lambda: with_spectrum(torch.tensor([4.0, 4.0, 4.0] + [1.0] * 29 + [0.5] * 32).double(), 64, 90),
    "decay to 1e-4": lambda: with_spectrum(torch.logspace(0, -4, 80, dtype=torch.float64), 80, 100),
    "decay to 1e-7": lambda: with_spectrum(torch.logspace(0, -7, 80, dtype=torch.float64), 80, 100),
    "decay to 1e-10": lambda: with_spectrum(torch.logspace(0, -10, 80, dtype=torch.float64), 80, 100),
    "low rank in noise of 1e-6": lambda: gaussian(90, 9) @ gaussian(9, 120) + 1e-6 * gaussian(90, 120),
    "exact low rank": lambda: gaussian(90, 9).float().double() @ gaussian(9, 120).float().double(),
    "a few zero columns": lambda: gaussian(90, 120) * (torch.arange(90) > 3)[:, None],
    "identity": lambda: torch.eye(70, dtype=torch.float64),
    "diagonal": lambda: torch.diag(torch.arange(1.0, 81.0, dtype=torch.float64)),
}

DEGENERATE: dict[str, Tensor] = {
    "zeros": torch.zeros(5, 7),
    "all equal": torch.full((6, 9), 0.3),
    "one row": torch.linspace(-1, 1, 9)[None],
    "one column": torch.linspace(-1, 1, 9)[:, None],
    "one entry": torch.tensor([[2.0]]),
    "rank one": torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 10.0)),
    "denormal": gaussian(12, 20).float() * 1e-42,
    "one denormal": torch.tensor([[1e-45, 0.0], [0.0, 0.0]]),
    "float64 denormal": gaussian(12, 20) * 1e-315,
    "huge bfloat16": (gaussian(12, 20) * 1e30).bfloat16(),
    "largest bfloat16": torch.full((12, 20), torch.finfo(torch.bfloat16).max).bfloat16(),
    "huge float64": gaussian(12, 20) * 1e300,
    "float16": gaussian(12, 20).half(),
    "float16 denormal": (gaussian(12, 20) * 1e-6).half(),
    "float8": gaussian(12, 20).to(torch.float8_e4m3fn),
    "all equal float8": torch.full((12, 20), 448.0).to(torch.float8_e4m3fn),
}


def plain_svd_runs(monkeypatch: pytest.MonkeyPatch, name: str) -> list[torch.Size]:
    """Counts calls of the SVD, which still runs."""
    shapes: list[torch.Size] = []
    original = getattr(torch.linalg, name)

    def counted(matrix: Tensor, **options: bool) -> Tensor:
        shapes.append(matrix.shape)
        return original(matrix, **options)

    monkeypatch.setattr(torch.linalg, name, counted)
    return shapes


def assert_same_fits(values: np.ndarray, weight: Tensor, tolerance: float = 1e-6) -> None:
    shape = (weight.shape[0], weight.shape[1])
    expected = reference.singular_values(weight).numpy()
    for edge in EDGES:
        ours, plain = fit_edge(values, shape, edge), fit_edge(expected, shape, edge)
        assert ours.rank == plain.rank, edge
        assert ours.reason == plain.reason, edge
        assert ours.threshold == pytest.approx(plain.threshold, rel=tolerance), edge
        if plain.snr is not None:
            assert ours.snr == pytest.approx(plain.snr, rel=tolerance), edge
            assert ours.snr_ratio == pytest.approx(plain.snr_ratio, rel=tolerance), edge


@pytest.mark.parametrize("name", WEIGHTS)
def test_fits_agree_with_a_plain_svd(name: str) -> None:
    weight = WEIGHTS[name]()
    values = singular_values(weight)
    assert values.dtype == np.float64 and values.shape == (min(weight.shape),)
    assert (np.diff(values) <= 0).all() and values[-1] >= 0
    assert_same_fits(values, weight)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 48), st.integers(2, 48), st.floats(0, 9), st.integers(0, 10_000))
def test_fits_agree_with_a_plain_svd_for_any_shape_and_decay(
    rows: int, columns: int, decades: float, seed: int
) -> None:
    spread = torch.logspace(0, -decades, min(rows, columns), dtype=torch.float64)
    weight = with_spectrum(spread, rows, columns, seed).float()
    assert_same_fits(singular_values(weight), weight)


def test_published_snr_and_rank_come_out_of_a_weight() -> None:
    weight = trained_like(150, 260).bfloat16()
    fits = fit_edges(singular_values(weight), (150, 260))
    for edge, threshold in reference.thresholds(weight).items():
        snr, rank = reference.snr_and_rank(weight, threshold)
        assert fits[edge].rank == rank
        assert fits[edge].snr == pytest.approx(snr, rel=1e-6)


def test_a_well_conditioned_weight_needs_no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = plain_svd_runs(monkeypatch, "svdvals")
    singular_values(trained_like(120, 200))
    assert runs == []


def test_an_ill_conditioned_weight_goes_to_the_svd_and_is_bit_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = WEIGHTS["decay to 1e-10"]()
    expected = reference.singular_values(weight).numpy()
    runs = plain_svd_runs(monkeypatch, "svdvals")
    assert np.array_equal(singular_values(weight), expected)
    assert runs == [weight.shape]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8])
def test_every_float_dtype_is_read_exactly(dtype: torch.dtype) -> None:
    weight = gaussian(60, 100).to(dtype)
    np.testing.assert_allclose(singular_values(weight), reference.singular_values(weight), rtol=1e-10)


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_degenerate_weight_gives_finite_numbers_or_a_reason(name: str, precision: spectrum.Precision) -> None:
    weight = DEGENERATE[name]
    values = singular_values(weight, precision=precision)
    np.testing.assert_allclose(values, reference.singular_values(weight), rtol=1e-5, atol=1e-6 * values[0])
    for fit in fit_edges(values, (weight.shape[0], weight.shape[1])).values():
        numbers = (fit.sigma, fit.threshold, fit.snr, fit.snr_ratio)
        assert all(math.isfinite(number) for number in numbers if number is not None)
        assert (None in numbers) == (fit.reason is not None)


@given(st.integers(-140, 120), st.booleans(), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_scale_and_transposition_change_no_rank_and_no_snr(power: int, transposed: bool, seed: int) -> None:
    weight = trained_like(40, 60, seed).float()
    changed = torch.ldexp(weight.double(), torch.tensor(power))
    changed = changed.mT if transposed else changed
    shape = (changed.shape[0], changed.shape[1])
    first, second = fit_edges(singular_values(weight), (40, 60)), fit_edges(singular_values(changed), shape)
    for edge in EDGES:
        assert first[edge].rank == second[edge].rank
        assert first[edge].snr == pytest.approx(second[edge].snr, rel=1e-9)


def test_float32_is_good_to_a_percent_and_gives_way_where_it_is_not() -> None:
    good, bad = gaussian(100, 160), WEIGHTS["decay to 1e-7"]()
    np.testing.assert_allclose(singular_values(good, precision="float32"), reference.singular_values(good), rtol=1e-2)
    assert_same_fits(singular_values(bad, precision="float32"), bad)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("compute", [singular_values, lambda weight: truncate(weight, 2)])
def test_inf_and_nan_are_refused(bad: float, compute: Callable[[Tensor], object]) -> None:
    weight = torch.ones(4, 6)
    weight[2, 3] = bad
    with pytest.raises(SpectrumError, match=r"weight of shape \(4, 6\) holds inf or nan.*exclude this matrix"):
        compute(weight)


def test_inf_in_a_batch_is_refused_with_its_number() -> None:
    weights = torch.ones(5, 4, 6)
    weights[3, 0, 0] = math.inf
    with pytest.raises(SpectrumError, match=r"shape \(4, 6\), number 3 of its batch, holds inf or nan"):
        singular_values_of_batch(weights)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(2, 2, 2), torch.ones(0, 4)])
def test_what_is_no_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(SpectrumError, match=r"expected \(rows, columns\) with at least one entry"):
        singular_values(weight)


def test_a_batch_without_its_count_is_refused() -> None:
    with pytest.raises(SpectrumError, match=r"shape \(3, 4\): expected \(count, rows, columns\)"):
        singular_values_of_batch(torch.ones(3, 4))


@pytest.mark.parametrize("weight", [torch.ones(3, 3, dtype=torch.int8), torch.ones(3, 3, device="meta")])
def test_weights_without_float_entries_are_refused(weight: Tensor) -> None:
    with pytest.raises(SpectrumError, match=r"need floating point entries in memory. Load it, or dequantize"):
        singular_values(weight)


@pytest.mark.parametrize(
    "compute", [singular_values, lambda weight, precision: truncate(weight, 1, precision=precision)]
)
def test_an_unknown_precision_is_refused(compute: Callable[..., object]) -> None:
    with pytest.raises(SpectrumError, match=r"unknown precision 'half'. Use one of: auto, float32, float64"):
        compute(torch.ones(3, 3), precision="half")


def test_a_singular_value_beyond_float64_is_refused() -> None:
    with pytest.raises(SpectrumError, match=r"beyond float64. Scale the weight down"):
        singular_values(torch.full((50, 50), 1e308, dtype=torch.float64))


def test_a_parameter_under_autocast_is_measured_exactly_and_left_alone() -> None:
    weight = torch.nn.Parameter(gaussian(60, 90).float())
    before = weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = singular_values(weight)
        truncated = truncate(weight, 20)
    np.testing.assert_allclose(values, reference.singular_values(before), rtol=1e-10)
    torch.testing.assert_close(truncated, reference.truncate(before, 20).float())
    assert torch.equal(weight, before) and not truncated.requires_grad


@pytest.mark.parametrize("shape", [(7, 12, 20), (7, 20, 12), (3, 1, 5), (1, 4, 4)])
def test_a_batch_gives_what_each_of_its_weights_gives(shape: tuple[int, int, int]) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = singular_values_of_batch(weights)
    for weight, own in zip(weights, values, strict=True):
        np.testing.assert_allclose(own, singular_values(weight), rtol=1e-9)


@pytest.mark.parametrize("weights_at_once", [4, 8, 9])
def test_a_batch_computed_in_parts_or_one_by_one_gives_the_same(
    weights_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.randn(9, 10, 16, generator=torch.Generator().manual_seed(0))
    whole = singular_values_of_batch(weights)
    monkeypatch.setattr(spectrum, "_BATCH_BYTES", weights_at_once * 8 * 10 * 16)
    np.testing.assert_allclose(singular_values_of_batch(weights), whole, rtol=1e-9)


def test_one_ill_conditioned_weight_of_a_batch_is_as_exact_as_alone() -> None:
    weights = torch.stack([gaussian(80, 100), WEIGHTS["decay to 1e-10"](), torch.zeros(80, 100).double()])
    values = singular_values_of_batch(weights)
    assert_same_fits(values[0], weights[0])
    assert np.array_equal(values[1], singular_values(weights[1]))
    assert not values[2].any()


def test_blocks_of_rows_add_up_to_the_whole_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(130, 47)
    whole = singular_values(weight)
    monkeypatch.setattr(spectrum, "_BLOCK_BYTES", 8 * 47 * 9)
    monkeypatch.setattr(spectrum, "_PANEL", 10)
    np.testing.assert_allclose(singular_values(weight), whole, rtol=1e-12)
    torch.testing.assert_close(truncate(weight, 30), reference.truncate(weight, 30))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("share", [0.1, 0.7])
def test_truncation_is_as_near_as_a_plain_svd_gets(name: str, share: float) -> None:
    weight = WEIGHTS[name]()
    rank = max(1, round(share * min(weight.shape)))
    error = torch.linalg.norm(weight - truncate(weight, rank))
    best = torch.linalg.norm(reference.singular_values(weight)[rank:])
    torch.testing.assert_close(error, best, rtol=1e-6, atol=1e-6 * torch.linalg.norm(weight).item())


@pytest.mark.parametrize("shape", [(96, 256), (256, 96), (128, 128)])
@pytest.mark.parametrize("rank", [4, 40, 90])
@pytest.mark.parametrize("make", [gaussian, trained_like])
def test_truncation_equals_a_plain_svd_after_rounding_to_bfloat16(
    shape: tuple[int, int], rank: int, make: Callable[[int, int], Tensor]
) -> None:
    weight = (make(*shape) * 0.02).bfloat16()
    truncated = truncate(weight, rank)
    same = truncated == reference.truncate(weight, rank).bfloat16()
    assert truncated.dtype == torch.bfloat16
    assert same.double().mean() >= 0.999


@pytest.mark.parametrize("rank", [3, 40, 60])
def test_truncation_of_float32_is_exact_to_float32(rank: int) -> None:
    weight = trained_like(64, 100).float()
    torch.testing.assert_close(truncate(weight, rank), reference.truncate(weight, rank).float(), rtol=1e-6, atol=1e-7)


def test_a_boundary_the_gram_matrix_cannot_resolve_goes_to_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = with_spectrum(torch.linspace(1, 1 - 1e-12, 30, dtype=torch.float64), 30, 40)
    runs = plain_svd_runs(monkeypatch, "svd")
    truncated = truncate(weight, 15)
    assert runs == [weight.shape]
    expected = reference.truncate(weight, 15)
    torch.testing.assert_close(truncated, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8])
def test_truncation_keeps_dtype_shape_and_strides(dtype: torch.dtype) -> None:
    weight = gaussian(20, 30).to(dtype)
    for stored in (weight, weight.mT):
        truncated = truncate(stored, 5)
        assert (truncated.dtype, truncated.shape, truncated.stride()) == (dtype, stored.shape, stored.stride())
        expected = reference.truncate(stored, 5)
        allowed = max(1e-12, 1.01 * torch.finfo(dtype).eps)
        assert (truncated.double() - expected).abs().max() <= allowed * expected.abs().max()


@pytest.mark.parametrize("name", DEGENERATE)
def test_truncation_of_a_degenerate_weight_is_finite(name: str) -> None:
    weight = DEGENERATE[name]
    truncated = truncate(weight, 1)
    assert torch.isfinite(truncated.double()).all()
    expected = reference.truncate(weight, 1)
    assert torch.linalg.norm(truncated.double() - expected) <= 0.1 * torch.linalg.norm(expected) + 1e-44


def test_entries_beyond_the_range_of_the_dtype_become_its_largest_number() -> None:
    weight = torch.full((8, 8), 448.0)
    weight[0, 0] = -448.0
    truncated = truncate(weight.to(torch.float8_e4m3fn), 1).double()
    assert reference.truncate(weight, 1).max() > 448 and truncated.max() == 448


def test_full_rank_is_an_exact_copy() -> None:
    weight = gaussian(6, 9).bfloat16()
    copy = truncate(weight, 6)
    assert torch.equal(copy, weight) and copy.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("shape", [(20, 34), (34, 20), (1, 5), (5, 1)])
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_factors_multiply_to_the_truncation(shape: tuple[int, int], precision: spectrum.Precision) -> None:
    weight = gaussian(*shape) * 1e3
    for rank in {1, min(shape) // 2 or 1, min(shape)}:
        left, right = factors(weight, rank, precision=precision)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        assert left.dtype == right.dtype == torch.float64
        short = right if shape[0] >= shape[1] else left.mT
        accuracy = 1e-10 if precision == "auto" else 1e-4
        torch.testing.assert_close(short @ short.mT, torch.eye(rank).double(), rtol=0, atol=accuracy)
        torch.testing.assert_close(left @ right, reference.truncate(weight, rank), rtol=accuracy, atol=1e3 * accuracy)


@pytest.mark.parametrize("rank", [0, -1, 4])
@pytest.mark.parametrize("compute", [truncate, factors])
def test_a_rank_out_of_range_is_refused(rank: int, compute: Callable[[Tensor, int], object]) -> None:
    with pytest.raises(RankError, match=rf"rank {rank}, but a weight of shape \(3, 5\) allows 1 to 3"):
        compute(torch.ones(3, 5), rank)


def test_the_same_weight_twice_gives_the_same_bytes() -> None:
    weight = trained_like(90, 140).bfloat16()
    assert singular_values(weight).tobytes() == singular_values(weight).tobytes()
    assert torch.equal(truncate(weight, 11), truncate(weight, 11))

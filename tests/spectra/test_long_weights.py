"""Weights that go to the SVD and are much longer than wide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splaser_plugin.spectra import spectrum
from splaser_plugin.spectra.spectrum import singular_values
from tests import reference


@pytest.mark.parametrize("shape", [(81, 40), (140, 40), (40, 140), (120, 40)])
def test_a_long_weight_of_exactly_low_rank_takes_squares_of_its_short_side(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-2, 3, size, generator=generator).bfloat16() for size in ((shape[0], 3), (3, shape[1]))
    )
    weight = left @ right
    expected = reference.singular_values(weight).numpy()
    shapes: dict[str, list[torch.Size]] = {"svdvals": [], "qr": []}
    for name, seen in shapes.items():
        plain = getattr(torch.linalg, name)

        def counted(matrix: torch.Tensor, *, plain=plain, seen=seen, **options: str) -> object:
            seen.append(matrix.shape)
            return plain(matrix, **options)

        monkeypatch.setattr(torch.linalg, name, counted)
    values = singular_values(weight)
    np.testing.assert_allclose(values, expected, atol=1e-13 * expected[0])
    assert (values > 1e-13 * values[0]).sum() == 3
    assert shapes["svdvals"] == [(40, 40)]
    assert all(rows <= 80 for rows, _ in shapes["qr"])
    torch.testing.assert_close(spectrum.truncate(weight, 3), weight, rtol=0, atol=1e-5)

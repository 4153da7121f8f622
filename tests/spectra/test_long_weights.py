"""Weights of exactly low rank, which go to the SVD: what that takes of memory, by the weight's shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from splaser_plugin.spectra import spectrum
from splaser_plugin.spectra.spectrum import singular_values
from tests import reference
from tests.planted import low_rank

PEAKS = """
    import json, sys, torch
    from splaser_plugin.spectra.spectrum import singular_values
    from tests.planted import low_rank

    def resident(key):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    singular_values(low_rank(90, 40))
    found = []
    for rows, columns in json.loads(sys.argv[1]):
        weight = low_rank(rows, columns)
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        before = resident("VmRSS")
        singular_values(weight)
        found.append(resident("VmHWM") - before)
    print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's record of a peak of memory")
def test_a_weight_of_exactly_low_rank_takes_at_most_eight_squares_whatever_its_shape() -> None:
    short = 1024
    shapes = [(short, short), (2 * short, short), (short, 2 * short), (4 * short, short), (short, 4 * short)]
    script = [sys.executable, "-c", textwrap.dedent(PEAKS), json.dumps(shapes)]
    peaks = json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
    assert len(peaks) == len(shapes)
    assert max(peaks) <= 8 * 8 * short**2, peaks


@pytest.mark.parametrize("shape", [(40, 40), (40, 80), (80, 40)])
def test_a_square_weight_of_exactly_low_rank_goes_to_the_svd_as_it_is(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, plain = [], torch.linalg.svdvals
    weight = low_rank(*shape)
    expected = reference.singular_values(weight).numpy()
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: plain(seen.append(matrix.shape) or matrix))
    monkeypatch.setattr(torch.linalg, "qr", None)
    values = singular_values(weight)
    np.testing.assert_allclose(values, expected, atol=1e-13 * expected[0])
    assert (values > 1e-13 * values[0]).sum() == 3
    assert seen == [shape]
    torch.testing.assert_close(spectrum.truncate(weight, 3), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(81, 40), (140, 40), (40, 140), (120, 40)])
def test_a_long_weight_of_exactly_low_rank_takes_squares_of_its_short_side(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = low_rank(*shape)
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

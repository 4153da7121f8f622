"""A harmful component planted in a real model's matrix is found by the search, and most of it is gone afterwards."""

from __future__ import annotations

import re

import pytest
import torch

from splaser_plugin.spectra.edges import fit_edge
from tests.benchmarks.repair import MATRIX, component, parse, repair


def truncated(weight, rank):
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def test_what_is_planted_lies_below_the_edge_harms_most_and_goes_with_a_truncation():
    generator = torch.Generator().manual_seed(0)
    left, right, gradient = (torch.randn(48, 48, generator=generator, dtype=torch.float64) for _ in range(3))
    basis = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    values = torch.cat([torch.full((12,), 9.0), torch.linspace(1.0, 0.1, 36)]).double()
    weight = basis[0] * values @ basis[1].mT
    fit = fit_edge(torch.linalg.svdvals(weight).numpy(), (48, 48), "iqr")
    assert fit.rank == 12
    added = component(weight, gradient, rank=5, share=0.5)
    size = 0.5 * fit.threshold
    assert torch.linalg.svdvals(added)[:6].tolist() == pytest.approx([size] * 5 + [0.0], abs=1e-9)
    assert torch.allclose(truncated(weight + added, fit.rank), truncated(weight, fit.rank))
    others = [
        component(weight, torch.randn(48, 48, generator=generator, dtype=torch.float64), rank=5, share=0.5)
        for _ in range(20)
    ]
    first_order = (added * gradient).sum()
    assert all(first_order < (other * gradient).sum() for other in others)


@pytest.mark.real
def test_a_search_finds_what_was_planted_in_smollm2_and_held_out_pairs_say_so(capsys):
    sizes = ["--plant-pairs", "4", "--samples", "8", "--held-out", "20", "--candidates", "2"]
    result = repair(parse([*sizes, "--include", *(f"layers.{block}.self_attn.q_proj" for block in (1, 2, 3))]))
    assert [candidate.matrix.name for candidate in result.search.kept][:1] == [MATRIX]
    assert result.held_out.verdict == "better" and result.held_out.interval[0] > 0
    (left,) = re.findall(r"of what was planted (-?\d+)% is left", capsys.readouterr().err)
    assert abs(int(left)) < 50

"""Scan files that earlier versions wrote, of one tied two-block Llama, are read and used as today's are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from splaser_plugin.artifacts.report import render
from splaser_plugin.errors import MatrixError
from splaser_plugin.scanning.records import Scan
from splaser_plugin.scanning.selection import choose, lora_targets
from splaser_plugin.spectra.edges import fit_edges

DATA = Path(__file__).parents[1] / "data"
OLD = {
    "scan_of_the_first_version": {"tower", "stored", "stack"},
    "scan_without_stacks": {"stack"},
}
"""The fields of a matrix that each lacks."""


@pytest.mark.parametrize("name", OLD)
def test_an_old_scan_is_read_and_written_as_one_of_today(name, tmp_path):
    path = DATA / f"{name}.json"
    found = Scan.load(path)
    stored = json.loads(path.read_text())
    assert found.matrices[0].to_dict().keys() - stored["matrices"][0].keys() == OLD[name]
    assert len(found.matrices) == 14
    for matrix in found.matrices:  # the whole spectrum is there, to 6 digits
        fits = fit_edges(np.array(matrix.spectrum), matrix.shape)
        for edge, fit in fits.items():
            assert matrix.edges[edge].threshold == pytest.approx(fit.threshold, rel=1e-5)
            assert matrix.edges[edge].rank == fit.rank
    ties = {left_out.name: left_out.tied_to for left_out in found.skipped if left_out.tied_to}
    assert ties["model.embed_tokens"] == "lm_head"
    found.save(tmp_path / "scan.json")
    assert Scan.load(tmp_path / "scan.json") == found


@pytest.mark.parametrize("name", OLD)
def test_an_old_scan_is_chosen_from_and_reported(name):
    found = Scan.load(DATA / f"{name}.json")
    selection = choose(found, top=1)
    assert lora_targets(selection) == (selection.names, [])
    assert len(selection.names) == 7
    with pytest.raises(MatrixError, match="lm_head shares its weight with the embeddings"):
        choose(found, top=1, include_head=True)
    assert selection.names[0] in render(found)


def test_the_two_hold_the_same_figures():
    first, second = (Scan.load(DATA / f"{name}.json") for name in OLD)
    for mine, others in zip(first.matrices, second.matrices, strict=True):
        assert (mine.name, mine.type, mine.block, mine.shape) == (others.name, others.type, others.block, others.shape)
        for edge, fit in mine.edges.items():
            assert fit.threshold == pytest.approx(others.edges[edge].threshold, rel=1e-6)
            assert fit.rank == others.edges[edge].rank

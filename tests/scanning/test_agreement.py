"""How far edges agree: on planted orders, and on the scan of SmolLM2."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from splaser_plugin.scanning.agreement import agreements, in_words, rank_correlation
from splaser_plugin.scanning.records import Scan
from splaser_plugin.scanning.selection import choose
from splaser_plugin.scanning.spectrum_format import load_scan
from tests.integrations.emitting import DATA, SCAN
from tests.report_data import made_up_scan

SMOLLM2 = Scan.load(SCAN)


def with_orders(scan: Scan, **values) -> Scan:
    """The scan with these snr_ratio at each edge (gavish_donoho for gavish-donoho), one for each matrix."""
    matrices = []
    for place, matrix in enumerate(scan.matrices):
        fits = dict(matrix.edges)
        for name, of_edge in values.items():
            edge = name.replace("_", "-")
            fits[edge] = replace(fits[edge], snr_ratio=of_edge[place])
        matrices.append(replace(matrix, edges=fits))
    return replace(scan, matrices=tuple(matrices))


@pytest.fixture
def planted() -> Scan:
    """Six matrices of one type: mp orders them as iqr does, gavish-donoho the other way round."""
    scan = made_up_scan(6, {"self_attn.q_proj": (64, 64)})
    order = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    return with_orders(scan, iqr=order, mp=[10 * value for value in order], gavish_donoho=order[::-1])


def test_the_rank_correlation_is_spearmans():
    random = np.random.default_rng(0)
    first, second = random.integers(0, 30, size=(2, 40)).tolist()
    ranks = [
        [sum(one < value for one in values) + sum(one == value for one in values) / 2 for value in values]
        for values in (first, second)
    ]
    assert rank_correlation(first, second) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation([1.0], [2.0]) is None and rank_correlation([1.0, 1.0], [2.0, 3.0]) is None


def test_edges_that_order_alike_agree_and_those_that_turn_the_order_round_disagree(planted):
    alike, turned = agreements(planted, choose(planted, fraction=0.5))
    assert (alike.edge, alike.other, alike.correlation, alike.shared) == ("iqr", "mp", 1.0, 3)
    assert not alike.disagrees
    assert (turned.other, turned.correlation, turned.shared, turned.by_chance) == ("gavish-donoho", -1.0, 0, 1.5)
    assert turned.disagrees
    assert in_words([alike, turned]) == [
        "edge mp chooses 3 of these 3 too; rank correlation +1.00 (self_attn.q_proj) to +1.00 (self_attn.q_proj)",
        "edge gavish-donoho chooses 0 of these 3 too; rank correlation -1.00 (self_attn.q_proj) to -1.00 "
        "(self_attn.q_proj); edges disagree: in 1 of 1 module types no more is shared than by chance",
    ]


def test_a_choice_of_everything_is_shared_and_no_disagreement(planted):
    for agreement in agreements(planted, choose(planted, fraction=1.0)):
        assert (agreement.shared, agreement.chosen, agreement.disagrees) == (6, 6, False)


def test_the_edges_halves_of_smollm2_are_counted_as_by_hand():
    half = choose(SMOLLM2, fraction=0.5)
    found = {(agreed.other, agreed.type): agreed for agreed in agreements(SMOLLM2, half)}
    for other in ("mp", "gavish-donoho"):
        theirs = choose(SMOLLM2, fraction=0.5, edge=other).by_type
        for kind, names in half.by_type.items():
            mine = found[other, kind]
            assert mine.shared == len({*names} & {*theirs[kind]})
            of_type = [matrix for matrix in SMOLLM2.matrices if matrix.type == kind]
            values = [[matrix.edges[edge].snr_ratio for matrix in of_type] for edge in ("iqr", other)]
            assert mine.correlation == pytest.approx(stats.spearmanr(*values).statistic)
    assert (found["mp", "self_attn.v_proj"].shared, found["mp", "self_attn.q_proj"].shared) == (3, 14)


@pytest.mark.parametrize("by", ["random", "uniform"])
def test_what_no_edge_chose_isnt_compared(by):
    assert agreements(SMOLLM2, choose(SMOLLM2, fraction=0.5, by=by)) == ()


def test_a_published_scan_has_a_single_edge():
    published = load_scan(DATA / "published_snr_SmolLM-135M.json")
    assert agreements(published, choose(published, fraction=0.5)) == ()

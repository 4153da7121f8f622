"""How far edges agree on which matrices are best: a choice by one edge, beside the same choice by the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from splaser_plugin.config.stages import EDGES, Edge
from splaser_plugin.scanning.measures import OF_EDGES
from splaser_plugin.scanning.records import Scan
from splaser_plugin.scanning.selection import Selection, choose
from splaser_plugin.scanning.spectrum_format import PublishedScan


@dataclass(frozen=True)
class Agreement:
    """Two edges on the matrices of one module type, by the same measure."""

    type: str
    edge: Edge
    """The one whose choice it is."""
    other: Edge
    correlation: float | None
    """Spearman's rank correlation of the two orders, -1 to 1; None where one has no order."""
    matrices: int
    chosen: int
    """How many of them are chosen by either edge."""
    shared: int
    """How many are chosen by both."""

    @property
    def by_chance(self) -> float:
        """How many two random choices of as many matrices share on average."""
        return self.chosen**2 / self.matrices

    @property
    def disagrees(self) -> bool:
        """The two choices share no more than random ones would."""
        return self.chosen < self.matrices and self.shared <= self.by_chance


def agreements(scan: Scan | PublishedScan, selection: Selection) -> tuple[Agreement, ...]:
    """The selection's edge beside each other edge, module type by module type.

    Args:
        scan: What the selection was made from.
        selection: A choice by `snr_ratio`, `snr` or `rank`.

    Returns:
        Nothing where the choice isn't made by an edge, or the scan has the figures of one edge only. The head and the
        embeddings, each alone of its type, are left out.

    Raises:
        MatrixError: When the selection's types match nothing of this scan.
    """
    config, edge = selection.config, selection.edge
    if config.by not in OF_EDGES or isinstance(scan, PublishedScan):
        return ()
    config = replace(config, include_head=False, include_embeddings=False)
    everything = replace(config, top=None, fraction=1.0)
    choices = {name: choose(scan, config, edge=name).by_type for name in EDGES}
    values = {name: {m.name: m.value for m in choose(scan, everything, edge=name).matrices} for name in EDGES}
    kinds = choose(scan, everything, edge=edge).by_type
    found = []
    for other in (name for name in EDGES if name != edge):
        for kind, names in kinds.items():
            chosen, theirs = choices[edge][kind], choices[other][kind]
            orders = [[_comparable(values[of][name]) for name in names] for of in (edge, other)]
            shared = len({*chosen} & {*theirs})
            found.append(Agreement(kind, edge, other, rank_correlation(*orders), len(names), len(chosen), shared))
    return tuple(found)


def _comparable(value: float | None) -> float:
    """A matrix without noise stands above all others."""
    return math.inf if value is None else value


def in_words(found: Sequence[Agreement]) -> list[str]:
    """A sentence for each other edge: how much of the choice it shares, and whether the two edges disagree."""
    sentences = []
    for other in dict.fromkeys(agreement.other for agreement in found):
        mine = [agreement for agreement in found if agreement.other == other]
        shared, chosen = (sum(getattr(agreement, name) for agreement in mine) for name in ("shared", "chosen"))
        sentence = f"edge {other} chooses {shared} of these {chosen} too"
        ordered = sorted((found.correlation, found.type) for found in mine if found.correlation is not None)
        if ordered:
            (low, lowest), (high, highest) = ordered[0], ordered[-1]
            sentence += f"; rank correlation {low:+.2f} ({lowest}) to {high:+.2f} ({highest})"
        unlike = sum(agreement.disagrees for agreement in mine)
        if unlike:
            sentence += f"; edges disagree: in {unlike} of {len(mine)} module types no more is shared than by chance"
        sentences.append(sentence)
    return sentences


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None where all values of one are equal.

    Source: Spearman 1904.
    """
    from scipy import stats

    if min(len({*first}), len({*second})) < 2:
        return None
    return float(stats.spearmanr(first, second).statistic)

"""One matrix to choose, or a block's stack of experts' matrices as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from splaser_plugin.config.stages import Edge
from splaser_plugin.scanning.measures import MEASURED, OF_EDGES, Scanned
from splaser_plugin.scanning.records import Scan
from splaser_plugin.scanning.spectrum_format import PublishedScan, PublishedSnr
from splaser_plugin.weights.matrices import module_name


@dataclass(frozen=True)
class Chosen:
    """One matrix to train."""

    name: str
    """Module name, as in `model.layers.3.mlp.down_proj`."""
    type: str
    shape: tuple[int, int] | None
    """(rows, columns); None where the scan doesn't say."""
    value: float | None
    """What it was chosen by; None: it has no noise values, its value isn't known, or it wasn't chosen by a value."""
    rank: int | None
    """Singular values above the edge; None where the scan doesn't say."""
    parameter: str = ""
    """Full name of the parameter, where that has to be named instead of the module: a stack of experts' matrices, or
    a matrix that PEFT would take for one."""
    experts: int = 1
    """How many matrices of this shape are stacked in it. Value and rank are their means."""


def chosen_of(matrix: Scanned, value: float | None, edge: Edge) -> Chosen:
    if isinstance(matrix, PublishedSnr):
        return Chosen(matrix.name, matrix.type, None, value, None)
    return Chosen(matrix.name, matrix.type, matrix.shape, value, matrix.edges[edge].rank)


def experts_together(ranked: Sequence[Chosen], scan: Scan | PublishedScan, by: str) -> list[Chosen]:
    """The same, best first, with one entry for each stack of experts' matrices, since none of them is trained alone.

    Its value and rank are the means over its experts. One that `fisher` or `gradient` has no value of counts as 0, as
    no token reached it, and so does one whose weights are all 0. Else a stack has no value where one of its experts
    has none: by a figure of an edge it then stands before all that have one (no noise values are the highest SNR), by
    `kappa` after them (a singular matrix has the highest condition number).
    """
    stacks = {} if isinstance(scan, PublishedScan) else {matrix.name: matrix.stack for matrix in scan.matrices}
    groups: dict[str, list[Chosen]] = {}
    for matrix in ranked:
        groups.setdefault(stacks.get(matrix.name) or matrix.name, []).append(matrix)
    if not any(stacks.values()):
        return list(ranked)
    whole = [group[0] if not stacks[group[0].name] else _stack(name, group, by) for name, group in groups.items()]
    sign, unknown = 1 if by == "kappa" else -1, -math.inf if by in OF_EDGES else math.inf
    return sorted(whole, key=lambda matrix: unknown if matrix.value is None else sign * matrix.value)


def _stack(parameter: str, experts: Sequence[Chosen], by: str) -> Chosen:
    ranks = [expert.rank for expert in experts if expert.rank is not None]
    return replace(
        experts[0],
        name=module_name(parameter),
        value=_mean([0.0 if by in OF_EDGES and expert.rank == 0 else expert.value for expert in experts], by),
        rank=round(fmean(ranks)) if ranks else None,
        parameter=parameter,
        experts=len(experts),
    )


def _mean(values: Sequence[float | None], by: str) -> float | None:
    known = [value for value in values if value is not None]
    if by in MEASURED and known:
        return sum(known) / len(values)
    return fmean(known) if known and len(known) == len(values) else None

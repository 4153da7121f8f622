"""Candidates: which matrices a search tries, to which ranks they are reduced, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from splaser_plugin.config.stages import Edge
from splaser_plugin.errors import MatrixError
from splaser_plugin.scanning.records import MatrixScan, Scan
from splaser_plugin.weights.matrices import Matrix, by_name


@dataclass(frozen=True)
class Candidate:
    """A matrix to try, and the rank to reduce it to."""

    matrix: Matrix
    rank: int
    edge: Edge | float
    """Where the rank comes from: an edge, or the fraction of components that stays."""
    threshold: float | None
    """Of the edge; None for a fraction."""
    snr: float | None
    """At the scan's edge."""
    predicted: float | None = None
    """Change of the mean margin, in nats a token; None without a prediction."""
    is_factorable: bool = True
    """Whether it can be stored as factors, see `splaser_plugin.weights.factored`."""

    @property
    def parameters_removed(self) -> int:
        """Parameters that the matrix has fewer at this rank, stored as factors; 0 where it is stored whole.

        A matrix of n rows and m columns loses (n - r) (m - r) of them, see `splaser_plugin.weights.gauge`.
        """
        rows, columns = self.matrix.shape
        return (rows - self.rank) * (columns - self.rank) if self.is_factorable else 0


def choose_candidates(scan: Scan, matrices: Sequence[Matrix], ranks: Sequence[Edge | float] = ()) -> list[Candidate]:
    """The published order: lowest snr first, each matrix at its edge's rank, or at several from gentle to hard.

    ranks: edges, and fractions of the components to keep (rounded, at least 1); the scan's edge if there are none.
    Ranks at which nothing is removed are passed over, and of those that come to the same rank the first is taken;
    where an edge leaves nothing to keep, the largest component stays.
    Raises MatrixError when no candidate is left.
    """
    named = by_name(matrices)
    candidates = [
        candidate
        for found in scan.ranked("snr")
        for candidate in _at_ranks(found, named[found.name], scan.edge, ranks or (scan.edge,))
    ]
    if candidates:
        return candidates
    count = len(scan.matrices)
    if ranks:
        raise MatrixError(f"--ranks keeps every singular value of all {count} matrices. Add a lower rank to it.")
    raise MatrixError(
        f"edge '{scan.edge}' calls every singular value of all {count} matrices signal: nothing to reduce. Try "
        "another --edge."
    )


def by_prediction(candidates: Sequence[Candidate], predicted: Sequence[float]) -> list[Candidate]:
    """The same candidates, each with its prediction, best first; among equals their order stays."""
    with_predictions = [
        replace(candidate, predicted=value) for candidate, value in zip(candidates, predicted, strict=True)
    ]
    return sorted(with_predictions, key=lambda candidate: -(candidate.predicted or 0.0))


def by_size(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that remove parameters: least predicted loss a parameter first, else the matrix that may lose the most.

    A matrix's ranks stay in their order, from gentle to hard. A predicted gain counts as no loss, and among equals
    what removes the most comes first. Raises MatrixError when none removes anything.
    """
    smaller = [candidate for candidate in candidates if candidate.parameters_removed]
    if not smaller:
        raise MatrixError(
            f"none of the {len(candidates)} candidates can be stored as factors: embeddings are kept whole, and so are "
            "experts whose module has a forward pass of its own. Choose other matrices with --include."
        )
    most: dict[Matrix, int] = {}
    for candidate in smaller:
        most[candidate.matrix] = max(most.get(candidate.matrix, 0), candidate.parameters_removed)
    if smaller[0].predicted is None:
        return sorted(smaller, key=lambda candidate: -most[candidate.matrix])

    def loss(candidate: Candidate) -> float:
        return max(0.0, -(candidate.predicted or 0.0)) / candidate.parameters_removed

    return sorted(smaller, key=lambda candidate: (loss(candidate), -candidate.parameters_removed))


def _at_ranks(found: MatrixScan, matrix: Matrix, edge: Edge, sources: Sequence[Edge | float]) -> list[Candidate]:
    """This matrix at every rank that removes something, the gentlest first. sources: where the ranks come from."""
    by_rank: dict[int, Candidate] = {}
    for source in sources:
        fit = found.edges[source] if isinstance(source, str) else None
        rank = max(1, fit.rank if fit else round(float(source) * min(matrix.shape)))
        threshold = fit.threshold if fit else None
        by_rank.setdefault(rank, Candidate(matrix, rank, source, threshold, found.edges[edge].snr))
    return [by_rank[rank] for rank in sorted(by_rank, reverse=True) if rank < min(matrix.shape)]

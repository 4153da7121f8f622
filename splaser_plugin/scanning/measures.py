"""What matrices are chosen by, beside the figures of an edge: an order of a scan's matrices, best first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from splaser_plugin.config.stages import Edge
from splaser_plugin.errors import ConfigError
from splaser_plugin.scanning.records import MatrixScan, Scan
from splaser_plugin.scanning.spectrum_format import PublishedScan, PublishedSnr

Scanned = MatrixScan | PublishedSnr

OF_EDGES = ("snr_ratio", "snr", "rank")
"""Figures of `EdgeFit`."""
MEASURED = ("fisher", "gradient")
"""They need the model and a text: see `splaser_plugin.jobs.importance`."""
CONTROLS = ("random", "uniform")
"""They look at nothing, and are what a choice has to beat."""

KAPPA_ERROR = 0.01
"""Relative error of a smallest singular value above which no condition number is given."""
_ROUNDING = {"float32": 2.0**-24, "float64": 2.0**-53}


def best_first(
    scan: Scan | PublishedScan, by: str, edge: Edge, *, seed: int = 0, importances: Mapping[str, float] | None = None
) -> list[tuple[Scanned, float | None]]:
    """All matrices of the scan with their values, in an order that the order of the file has no part in.

    Args:
        scan: What was scanned, by splaser or as it is published.
        by: A measure of `SelectConfig`. Highest first, but `kappa`: lowest first, as KappaTune chooses (Ludwig 2025,
            arXiv 2506.16289); `random`: by a hash of seed and name; `uniform`: by depth.
        edge: Whose figures count, for those of an edge.
        seed: Of `random`.
        importances: Values by name, for `fisher` and `gradient`; a matrix without one comes last.

    Raises:
        ConfigError: The scan, or what was given with it, has no such values.
    """
    _check_measure(scan, by, edge, importances)
    matrices: Sequence[Scanned] = sorted(scan.matrices, key=_depth)
    if by == "random":
        return [(matrix, None) for matrix in sorted(matrices, key=lambda matrix: _hash(seed, matrix.name))]
    if by == "uniform":
        return [(matrix, None) for matrix in matrices]
    if by == "kappa" and isinstance(scan, Scan):
        by_depth = sorted(scan.matrices, key=_depth)
        conditions = [(matrix, condition_number(matrix, scan.precision)) for matrix in by_depth]
        return sorted(conditions, key=lambda found: math.inf if found[1] is None else found[1])
    if importances is not None and by in MEASURED:
        values = [(matrix, importances.get(matrix.name)) for matrix in matrices]
        if all(value is None for _, value in values):
            raise ConfigError(
                f"--by {by}: none of the scan's matrices was measured ({matrices[0].name}, ...). Measure the model "
                "that was scanned."
            )
        return sorted(values, key=lambda found: math.inf if found[1] is None else -found[1])
    if isinstance(scan, PublishedScan):
        return [(matrix, matrix.snr_ratio) for matrix in reversed(scan.ranked(by, edge))]
    return [(matrix, getattr(matrix.edges[edge], by)) for matrix in reversed(scan.ranked(by, edge))]


def evenly_spaced(count: int, total: int) -> list[int]:
    """Places of `count` of `total` things in a row, each in the middle of its share of the row."""
    return [(2 * place + 1) * total // (2 * count) for place in range(count)]


def condition_number(matrix: MatrixScan, precision: str) -> float | None:
    """Largest over smallest singular value; None where the smallest is nothing but rounding error.

    Eigenvalues of a Gram matrix are as exact as `splaser_plugin.spectra.spectrum` bounds them: u times the sum of the
    squared singular values, in float64 2 (sqrt(rows) + sqrt(columns)) times that. An SVD in float64 is exact to u
    times the largest singular value, times a modest factor (LAPACK Users' Guide, section 4.9), here 10 sqrt(short).

    Args:
        matrix: What the scan found.
        precision: The scan's.

    Raises:
        ConfigError: The scan's precision doesn't give the smallest singular value to `KAPPA_ERROR`.
    """
    largest, smallest = matrix.max_singular_value, matrix.min_singular_value
    rows, columns = matrix.shape
    short = min(rows, columns)
    if precision == "svd":
        error = 10 * math.sqrt(short) * _ROUNDING["float64"] * largest
        return largest / smallest if smallest * KAPPA_ERROR > error else None
    squares = [value**2 for value in matrix.spectrum] or [largest**2]
    bound = _ROUNDING.get(precision, _ROUNDING["float64"]) * short * sum(squares) / len(squares)
    if precision != "float32":
        bound *= 2 * (math.sqrt(rows) + math.sqrt(columns))
    if bound > 2 * KAPPA_ERROR * smallest**2:
        raise ConfigError(
            f"--by kappa: {matrix.name} is so ill-conditioned that the scan doesn't tell its smallest singular value. "
            "Scan the model with `splaser scan --precision svd`, which takes several times as long."
        )
    return largest / smallest


def _check_measure(scan: Scan | PublishedScan, by: str, edge: Edge, importances: Mapping[str, float] | None) -> None:
    if by in CONTROLS:
        return
    if by in MEASURED:
        if importances is None:
            raise ConfigError(
                f"--by {by}: a scan doesn't have it, since it is measured on a text with the model itself. Give "
                "--text FILE; in Python choose(..., importances=splaser_plugin.importances(model, tokenizer, ...))."
            )
        return
    if isinstance(scan, PublishedScan) and (by, edge) != ("snr_ratio", scan.edge):
        raise ConfigError(
            f"--by {by} --edge {edge}: {scan.model} holds only snr_ratio at edge {scan.edge}. "
            "Leave both options out, or scan the model with splaser scan."
        )


def _depth(matrix: Scanned) -> tuple[int, str]:
    return -1 if matrix.block is None else matrix.block, matrix.name


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()

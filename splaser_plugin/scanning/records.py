"""What a scan finds: the records of its matrices, and the file they stand in."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from splaser_plugin.config.stages import EDGES
from splaser_plugin.errors import RecipeError
from splaser_plugin.files import reading
from splaser_plugin.files.output import whole_file
from splaser_plugin.files.typed import check_types
from splaser_plugin.spectra.edges import EdgeFit, fit_edges
from splaser_plugin.tables import Table
from splaser_plugin.weights.matrices import Matrix, Skipped

SCHEMA = "splaser.scan/1"
QUANTILES = 256
"""Most values kept of one spectrum, for drawing."""
MAX_SCAN_BYTES = 2_000_000_000
"""That of 10,000 matrices has 100 MB."""


@dataclass(frozen=True)
class MatrixScan:
    """What the scan found in one matrix."""

    name: str
    type: str
    block: int | None
    shape: tuple[int, int]
    max_singular_value: float
    min_singular_value: float
    edges: dict[str, EdgeFit]
    spectrum: Sequence[float]
    """At most 256 singular values, evenly spaced by order, largest first, to 6 digits: for drawing only."""
    tower: str = ""
    """The part of a composite model that it stands in; empty for the language model."""
    stored: tuple[str, ...] = field(default=(), compare=False)
    """Names on disk of the tensors it is made of; none where the model was scanned in memory."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in scan.json."""
        edges = {edge: asdict(fit) for edge, fit in self.edges.items()}
        return {**vars(self), "edges": edges, "spectrum": list(self.spectrum), "stored": list(self.stored)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> MatrixScan:
        """The record from its plain values. Raises KeyError, TypeError or OverflowError when it isn't whole."""
        record = cls(
            **{
                **stored,
                "shape": tuple(stored["shape"]),
                "stored": tuple(stored.get("stored", ())),
                "spectrum": array("d", stored["spectrum"]),
                "edges": {edge: EdgeFit(**stored["edges"][edge]) for edge in EDGES},
            }
        )
        check_types(record)
        if min(record.shape) < 1:
            raise TypeError(f"shape is {record.shape}, expected rows and columns")
        return record


@dataclass(frozen=True)
class Scan(Table):
    """The scan of one model."""

    model: str
    """Folder or hub id."""
    weights: str
    """Identity of the weights that were scanned (sha256)."""
    edge: str
    """The edge that ranking and reducing go by, unless another is asked for."""
    matrices: tuple[MatrixScan, ...]
    skipped: tuple[Skipped, ...]
    precision: str = "auto"
    version: str = ""
    """Of the program that made it; empty when it was put together otherwise."""

    def __repr__(self) -> str:
        left_out = f", {len(self.skipped)} parameters left out" if self.skipped else ""
        return f"Scan({self.model!r}, edge={self.edge!r}, {len(self.matrices)} matrices{left_out})"

    def rows(self) -> list[dict[str, Any]]:
        """One of each matrix, with what its edge found: threshold, rank, snr, snr_ratio."""
        return [
            {
                "name": matrix.name,
                "type": matrix.type,
                "block": matrix.block,
                "rows": matrix.shape[0],
                "columns": matrix.shape[1],
                **asdict(matrix.edges[self.edge]),
            }
            for matrix in self.matrices
        ]

    def ranked(self, by: str = "snr", edge: str | None = None) -> list[MatrixScan]:
        """Matrices from the lowest to the highest `by` (a number of `EdgeFit`), never tied by file order.

        A matrix without noise values (its snr is None) stands above all others; among its kind the one
        whose smallest singular value is farther above the threshold stands higher. Then the name decides.
        """
        edge = edge or self.edge
        return sorted(self.matrices, key=lambda matrix: rank_key(matrix, by, edge))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in scan.json."""
        return self._content([matrix.to_dict() for matrix in self.matrices])

    def save(self, path: str | Path) -> None:
        """Write scan.json, whole or not at all. Raises OutputError when it can't be written."""
        write_json(path, self._content(self.matrices), default=MatrixScan.to_dict)

    def _content(self, matrices: Sequence[object]) -> dict[str, Any]:
        skipped = [asdict(each) for each in self.skipped]
        return {"schema": SCHEMA, **vars(self), "matrices": matrices, "skipped": skipped}

    @classmethod
    def from_dict(cls, stored: Any, source: str = "scan") -> Scan:
        """Raises RecipeError when `stored` is no scan of this version."""
        if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
            got = stored.get("schema") if isinstance(stored, dict) else type(stored).__name__
            raise RecipeError(f"{source}: schema is {got!r}, expected '{SCHEMA}'. Make it anew with splaser scan.")
        try:
            scan = cls(
                **{key: stored[key] for key in ("model", "weights", "edge")},
                matrices=tuple(MatrixScan.from_dict(each) for each in stored["matrices"]),
                skipped=tuple(Skipped(**each) for each in stored["skipped"]),
                **{key: stored[key] for key in ("precision", "version") if key in stored},
            )
            check_types(replace(scan, matrices=()))
            if scan.edge not in EDGES:
                raise TypeError(f"edge is {scan.edge!r:.80}, expected one of {', '.join(EDGES)}")
            if not scan.matrices:
                raise TypeError("no matrices")
            return scan
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise RecipeError(f"{source}: not a whole scan ({error}). Make it anew with splaser scan.") from error

    @classmethod
    def load(cls, path: str | Path) -> Scan:
        """Read a scan.json. Raises RecipeError when it is missing, damaged or of another version."""
        return cls.from_dict(read_json(path, _compact), str(path))


def rank_key(matrix: MatrixScan, by: str, edge: str) -> tuple[bool, float, str, int, str]:
    """Sort key of `Scan.ranked`."""
    value = getattr(matrix.edges[edge], by)
    above = (matrix.min_singular_value - matrix.edges[edge].threshold) / (matrix.max_singular_value or 1.0)
    strength = above if value is None else value
    return value is None, strength, matrix.type, -1 if matrix.block is None else matrix.block, matrix.name


def matrix_scan(matrix: Matrix, values: np.ndarray) -> MatrixScan:
    """The record of one matrix. values: all its singular values, descending, float64."""
    places = np.linspace(0, len(values) - 1, min(QUANTILES, len(values))).round().astype(int)
    return MatrixScan(
        name=matrix.name,
        type=matrix.type,
        block=matrix.block,
        shape=matrix.shape,
        max_singular_value=float(values[0]),
        min_singular_value=float(values[-1]),
        edges=fit_edges(values, matrix.shape),
        spectrum=array("d", [float(f"{value:.6g}") for value in values[places]]),
        tower=matrix.tower,
        stored=matrix.stored,
    )


def _compact(stored: dict[str, Any]) -> dict[str, Any]:
    """Pack a spectrum as soon as it is read: as Python's numbers those of 10,000 matrices take 80 MB."""
    with suppress(TypeError, OverflowError):  # left as it is for `MatrixScan.from_dict` to refuse
        if isinstance(stored.get("spectrum"), list):
            stored["spectrum"] = array("d", stored["spectrum"])
    return stored


def read_json(path: str | Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """A JSON file's content; object_hook as in `json.loads`.

    Raises RecipeError when it is missing, too large or no JSON.
    """
    return reading.read_json(path, RecipeError, max_bytes=MAX_SCAN_BYTES, object_hook=object_hook)


def write_json(path: str | Path, content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write JSON with a final newline, whole or not at all; refuses nan and infinity.

    default: turns what JSON doesn't know into what it does, one at a time as it is written.
    Raises OutputError when the file can't be written.
    """
    with whole_file(path) as file:
        json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False, default=default)
        file.write("\n")

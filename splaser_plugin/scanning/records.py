"""What a scan finds: the records of its matrices, and the file they stand in."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from splaser_plugin.config.stages import Edge
from splaser_plugin.errors import RecipeError
from splaser_plugin.files.json import read_json, write_json
from splaser_plugin.files.validation import NO_OTHER_KEYS, InvalidRecordError, Number, Whole, validated
from splaser_plugin.spectra.edges import EDGES, EdgeFit, fit_edges
from splaser_plugin.tables import Table
from splaser_plugin.weights.matrices import SHARES, Matrix, Skipped, module_name

SCHEMA = "splaser.scan/1"
QUANTILES = 256
"""Most values kept of one spectrum, for drawing."""
MAX_SCAN_BYTES = 2_000_000_000
"""That of 10,000 matrices has 100 MB."""

Size = Annotated[Whole, Field(ge=1)]


def _packed(values: Any) -> array[float]:
    """Numbers in 8 bytes each: as Python's those of the spectra of 10,000 matrices take 80 MB."""
    if not isinstance(values, array):
        if not isinstance(values, (list, tuple)) or any(type(value) not in (int, float) for value in values):
            raise ValueError("a list of numbers")
        try:
            values = array("d", values)
        except OverflowError as error:
            raise ValueError("numbers of 64 bits") from error
    if not all(map(math.isfinite, values)):
        raise ValueError("finite numbers")
    return values


def _of_every_edge(fits: dict[str, EdgeFit]) -> dict[str, EdgeFit]:
    if missing := [edge for edge in EDGES if edge not in fits]:
        raise ValueError(f"an entry '{missing[0]}'")
    return {edge: fits[edge] for edge in EDGES}


def _known_edge(edge: Any) -> Any:
    if edge not in EDGES:
        raise ValueError(f"one of {', '.join(EDGES)}")
    return edge


def _with_tie(skipped: Skipped) -> Skipped:
    """Files of old versions say in the reason alone with what a weight is shared."""
    if skipped.tied_to is None and skipped.reason.startswith(SHARES):
        return replace(skipped, tied_to=skipped.reason.removeprefix(SHARES))
    return skipped


@dataclass(frozen=True)
class MatrixScan:
    """What the scan found in one matrix."""

    __pydantic_config__ = NO_OTHER_KEYS

    name: str
    type: str
    block: Whole | None
    shape: tuple[Size, Size]
    max_singular_value: Number
    min_singular_value: Number
    edges: Annotated[dict[str, EdgeFit], AfterValidator(_of_every_edge)]
    spectrum: Annotated[Sequence[float], PlainValidator(_packed)]
    """At most 256 singular values, evenly spaced by order, largest first, to 6 digits: for drawing only."""
    tower: str = ""
    """The part of a composite model that it stands in; empty for the language model."""
    stored: tuple[str, ...] = field(default=(), compare=False)
    """Names on disk of the tensors it is made of; none where the model was scanned in memory."""
    stack: str = ""
    """The parameter that holds this expert's matrix with those of the others; empty for a matrix of its own."""

    @property
    def trained_as(self) -> str:
        """What a choice of matrices to train calls it: its own name, or that of its stack."""
        return module_name(self.stack) if self.stack else self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in scan.json."""
        edges = {edge: asdict(fit) for edge, fit in self.edges.items()}
        return {**vars(self), "edges": edges, "spectrum": list(self.spectrum), "stored": list(self.stored)}

    @classmethod
    def from_dict(cls, stored: Any) -> MatrixScan:
        """The record from its plain values. Raises InvalidRecordError when it isn't whole."""
        return validated(cls, stored)


@dataclass(frozen=True)
class Scan(Table):
    """The scan of one model."""

    model: str
    """Folder or hub id."""
    weights_identity: Annotated[str, Field(alias="weights")]
    """Of the weights that were scanned (sha256)."""
    edge: Annotated[Edge, BeforeValidator(_known_edge)]
    """The edge that ranking and reducing go by, unless another is asked for."""
    matrices: Annotated[tuple[MatrixScan, ...], Field(min_length=1)]
    skipped: tuple[Annotated[Skipped, AfterValidator(_with_tie)], ...]
    precision: str = "auto"
    version: str = ""
    """Of the program that made it; empty when it was put together otherwise."""
    stored_as: str = ""
    """How the files hold the weights, where it is by codes and scales; else empty."""

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

    def ranked(self, by: str = "snr", edge: Edge | None = None) -> list[MatrixScan]:
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
        """Write scan.json, whole or not at all.

        Raises:
            OutputError: It can't be written.
        """
        write_json(path, self._content(self.matrices), default=MatrixScan.to_dict)

    def _content(self, matrices: Sequence[object]) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "weights": self.weights_identity,
            "edge": self.edge,
            "matrices": matrices,
            "skipped": [asdict(left_out) for left_out in self.skipped],
            "precision": self.precision,
            "version": self.version,
            "stored_as": self.stored_as,
        }

    @classmethod
    def from_dict(cls, stored: Any, source: str = "scan") -> Scan:
        """The scan that plain values stand for.

        Raises:
            RecipeError: They are no scan of this version.
        """
        if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
            got = stored.get("schema") if isinstance(stored, dict) else type(stored).__name__
            raise RecipeError(f"{source}: schema is {got!r:.80}, expected '{SCHEMA}'. Make it anew with splaser scan.")
        try:
            return validated(cls, stored)
        except InvalidRecordError as error:
            raise RecipeError(f"{source}: not a whole scan ({error}). Make it anew with splaser scan.") from error

    @classmethod
    def load(cls, path: str | Path) -> Scan:
        """Read a scan.json.

        Raises:
            RecipeError: It is missing, damaged or of another version.
        """
        return cls.from_dict(read_json(path, RecipeError, max_bytes=MAX_SCAN_BYTES, object_hook=_compact), str(path))


def rank_key(matrix: MatrixScan, by: str, edge: Edge) -> tuple[bool, float, str, int, str]:
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
        stack="" if matrix.expert is None else matrix.parameter,
    )


def _compact(stored: dict[str, Any]) -> dict[str, Any]:
    """Pack a spectrum as soon as it is read, before the next one is."""
    with suppress(ValueError):  # left as it is for `MatrixScan` to refuse
        if "spectrum" in stored:
            stored["spectrum"] = _packed(stored["spectrum"])
    return stored

"""Scan a model: for every weight matrix its singular values, the edges placed in them, and what follows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from splaser_plugin.config import EDGES, ScanConfig
from splaser_plugin.edges import EdgeFit, fit_edges
from splaser_plugin.errors import RecipeError, SpectrumError
from splaser_plugin.matrices import Matrix, Skipped
from splaser_plugin.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from splaser_plugin.checkpoint import Checkpoint
    from splaser_plugin.weights import Weights

SCHEMA = "splaser.scan/1"
QUANTILES = 256
"""Most values kept of one spectrum, for drawing."""


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
    spectrum: tuple[float, ...]
    """At most 256 singular values, evenly spaced by order, largest first, to 6 digits: for drawing only."""


@dataclass(frozen=True)
class Scan:
    """The scan of one model."""

    model: str
    """Folder or hub id."""
    weights: str
    """Identity of the weights that were scanned (sha256)."""
    edge: str
    """The edge that ranking and reducing go by, unless another is asked for."""
    matrices: tuple[MatrixScan, ...]
    skipped: tuple[Skipped, ...]

    def ranked(self, by: str = "snr", edge: str | None = None) -> list[MatrixScan]:
        """Matrices from the lowest to the highest `by` (a number of `EdgeFit`), never tied by file order.

        A matrix without noise values (its snr is None) stands above all others; among its kind the one
        whose smallest singular value is farther above the threshold stands higher. Then the name decides.
        """
        edge = edge or self.edge
        return sorted(self.matrices, key=lambda matrix: rank_key(matrix, by, edge))

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, stored: Any, source: str = "scan") -> Scan:
        """Raises RecipeError when `stored` is no scan of this version."""
        if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
            got = stored.get("schema") if isinstance(stored, dict) else type(stored).__name__
            raise RecipeError(f"{source}: schema is {got!r}, expected '{SCHEMA}'. Make it anew with splaser scan.")
        try:
            matrices = [
                MatrixScan(
                    **{
                        **matrix,
                        "shape": tuple(matrix["shape"]),
                        "spectrum": tuple(matrix["spectrum"]),
                        "edges": {edge: EdgeFit(**matrix["edges"][edge]) for edge in EDGES},
                    }
                )
                for matrix in stored["matrices"]
            ]
            skipped = tuple(Skipped(**each) for each in stored["skipped"])
            return cls(stored["model"], stored["weights"], stored["edge"], tuple(matrices), skipped)
        except (KeyError, TypeError) as error:
            raise RecipeError(f"{source}: not a whole scan ({error}). Make it anew with splaser scan.") from error

    @classmethod
    def load(cls, path: str | Path) -> Scan:
        """Read a scan.json. Raises RecipeError when it is missing, damaged or of another version."""
        return cls.from_dict(read_json(path), str(path))


def rank_key(matrix: MatrixScan, by: str, edge: str) -> tuple[bool, float, str, int, str]:
    """Sort key of `Scan.ranked`."""
    value = getattr(matrix.edges[edge], by)
    above = (matrix.min_singular_value - matrix.edges[edge].threshold) / (matrix.max_singular_value or 1.0)
    strength = above if value is None else value
    return value is None, strength, matrix.type, -1 if matrix.block is None else matrix.block, matrix.name


def scan_model(
    model_weights: Weights,
    *,
    config: ScanConfig | None = None,
    name: str = "",
    identity: str = "",
    progress: Progress = SILENT,
) -> Scan:
    """Scan a loaded model where it is: on its device, one matrix at a time.

    name, identity: how the model and its weights are called in the result.
    Raises MatrixError, ModelError or SpectrumError, the last with the matrix's name.
    """
    from splaser_plugin.distributed import my_part

    config = config or ScanConfig()
    matrices, skipped = model_weights.matrices(config.include, config.exclude)
    mine = my_part(matrices)

    def read() -> Iterator[tuple[Matrix, Tensor]]:
        for matrix in matrices if model_weights.is_sharded else mine:
            weight = model_weights.read(matrix)
            if matrix in mine:
                yield matrix, weight

    found = _measure(read(), len(mine), config.precision, progress)
    return _complete(found, matrices, skipped, name, identity, config.edge)


def scan_checkpoint(
    checkpoint: Checkpoint, *, config: ScanConfig | None = None, name: str = "", progress: Progress = SILENT
) -> Scan:
    """Scan safetensors straight from disk, never holding more than two matrices.

    Raises CheckpointError, MatrixError or SpectrumError.
    """
    from splaser_plugin.checkpoint import read_tensors
    from splaser_plugin.distributed import my_part
    from splaser_plugin.matrices import stored_matrices

    config = config or ScanConfig()
    matrices, skipped = stored_matrices(checkpoint, include=config.include, exclude=config.exclude)
    by_part = {(matrix.parameter, matrix.expert): matrix for matrix in my_part(matrices)}

    def read() -> Iterator[tuple[Matrix, Tensor]]:
        for part, tensor in read_tensors(checkpoint, by_part):
            yield by_part[part], tensor.view(by_part[part].shape)

    found = _measure(read(), len(by_part), config.precision, progress)
    name = name or str(checkpoint.folder)
    return _complete(found, matrices, skipped, name, checkpoint.identity(), config.edge)


def _measure(
    weights: Iterator[tuple[Matrix, Tensor]], total: int, precision: str, progress: Progress
) -> list[MatrixScan]:
    """Records of this process's matrices and, in any order, of all other processes'."""
    from splaser_plugin.distributed import gather
    from splaser_plugin.spectrum import singular_values

    def measure_mine() -> list[MatrixScan]:
        found = []
        with progress.phase("scan", total) as advance:
            for matrix, weight in weights:
                try:
                    values = singular_values(weight, precision=precision)
                except SpectrumError as error:
                    raise SpectrumError(f"{matrix.name}: {error}") from error
                found.append(matrix_scan(matrix, values))
                advance(1)
        return found

    return gather(measure_mine)


def _complete(
    found: list[MatrixScan], matrices: list[Matrix], skipped: list[Skipped], name: str, identity: str, edge: str
) -> Scan:
    by_name = {each.name: each for each in found}
    return Scan(name, identity, edge, tuple(by_name[matrix.name] for matrix in matrices), tuple(skipped))


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
        spectrum=tuple(float(f"{value:.6g}") for value in values[places]),
    )


def read_json(path: str | Path) -> Any:
    """A JSON file's content. Raises RecipeError when it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: can't be read ({error.strerror}). Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not JSON ({error}). It may be half written; make it anew.") from error


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON with a final newline; refuses nan and infinity."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")

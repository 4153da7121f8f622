"""Truncation of a whole model's matrices by what was measured of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from splaser_plugin.distributed import from_main, gather
from splaser_plugin.errors import OutputError
from splaser_plugin.progress import SILENT, Progress
from splaser_plugin.reduction.calibration import Row
from splaser_plugin.reduction.moments import Moments, measure
from splaser_plugin.reduction.truncation import Decomposition, Projection, decompose_by_moments, decompose_plainly
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix, Skipped


class MeasuredReducer:
    """Truncates each matrix by its moments, see `splaser_plugin.reduction.truncation`.

    Its projections, two squares of the short side in float32 for each matrix, lie in a temporary folder, and are read
    one matrix at a time. The folder goes with the object.
    """

    def __init__(self) -> None:
        self.costs: dict[Matrix, np.ndarray] = {}
        """Of each matrix and rank from 0 to the full one; see `Decomposition.costs`."""
        self.left_out: list[Skipped] = []
        """Matrices without statistics, and why."""
        self._folder = tempfile.TemporaryDirectory(prefix="splaser-")
        self._files: dict[Matrix, tuple[Path, bool]] = {}

    def add(self, matrix: Matrix, found: Decomposition) -> None:
        """Keep what is known of one matrix. Raises OutputError when its projection can't be written."""
        self.costs[matrix] = np.array(from_main(found.costs.tolist()))
        projection = found.projection
        if projection is None:
            return
        path = Path(self._folder.name) / f"{len(self._files)}.safetensors"

        def write() -> list[None]:
            try:
                save_file({"basis": projection.basis.cpu(), "dual": projection.dual.cpu()}, path)
            except (OSError, SafetensorError) as error:
                raise OutputError(
                    f"{self._folder.name}: the projections of {matrix.name} can't be written there ({error}). Make "
                    "room, or set TMPDIR to a folder that has some."
                ) from error
            return []

        gather(write)
        self._files[matrix] = path, projection.on_columns

    def truncated(self, matrix: Matrix, weight: Tensor, rank: int) -> Tensor:
        return self._of(matrix, weight).truncated(weight, rank)

    def factors(self, matrix: Matrix, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return self._of(matrix, weight).factors(weight, rank)

    def _of(self, matrix: Matrix, weight: Tensor) -> Decomposition:
        if matrix not in self._files:
            return Decomposition(self.costs[matrix], None)
        path, on_columns = self._files[matrix]
        held = load_file(path, device=str(weight.device))
        return Decomposition(self.costs[matrix], Projection(held["basis"], held["dual"], on_columns))


def measured_reducer(
    weights: Weights,
    matrices: Sequence[Matrix],
    rows: Sequence[Row],
    *,
    way: Literal["svd", "whitened", "fisher"],
    seed: int = 0,
    progress: Progress = SILENT,
) -> MeasuredReducer:
    """Decompose matrices for truncation to any rank.

    Args:
        weights: The model's.
        matrices: Which of them.
        rows: What the statistics are measured on; unused for `svd`.
        way: `svd` weighs neither side, `whitened` the inputs, `fisher` the inputs and the outputs' gradients.
        seed: Of the labels that are drawn.
        progress: Told of each row.

    Raises:
        ModelError: The model is sharded over processes, or computes inf or nan on a row.
        OutputError: There is no room for the projections in the temporary folder.
    """
    reducer = MeasuredReducer()
    if way == "svd":
        for matrix in matrices:
            reducer.add(matrix, decompose_plainly(weights.read(matrix)))
        return reducer
    for matrix, found in measure(weights, matrices, rows, seed=seed, progress=progress):
        if isinstance(found, Moments):
            with_gradients = way == "fisher"
            reducer.add(matrix, decompose_by_moments(weights.read(matrix), found, with_gradients=with_gradients))
        else:
            reducer.left_out.append(found)
    return reducer

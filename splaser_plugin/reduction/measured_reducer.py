"""Truncation of a whole model's matrices by what was measured of them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from splaser_plugin.distributed import from_main, gather, process_count
from splaser_plugin.errors import OutputError, SpectrumError
from splaser_plugin.progress import SILENT, Progress
from splaser_plugin.reduction.calibration import Row
from splaser_plugin.reduction.moments import Moments, measure
from splaser_plugin.reduction.truncation import Decomposition, Projection, decompose_by_moments, decompose_plainly
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix, Skipped


class MeasuredReducer:
    """Truncates each matrix by its moments, see `splaser_plugin.reduction.truncation`.

    What is known of a matrix, two squares of its short side in float32 and the costs, lies in a file, and is read one
    matrix at a time.

    Args:
        matrices: All that are added.
        folder: Where the files lie, and stay; None for a temporary folder that goes with the object.
        is_in_nats: Whether costs are in nats a token, and not half a squared error.
    """

    def __init__(self, matrices: Sequence[Matrix], folder: Path | None = None, *, is_in_nats: bool = False) -> None:
        self.is_in_nats = is_in_nats
        self.costs: dict[Matrix, np.ndarray] = {}
        """Of each matrix and rank from 0 to the full one; see `Decomposition.costs`."""
        self.left_out: list[Skipped] = []
        """Matrices without statistics, and why."""
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="splaser-")
        self._folder = folder or Path(self._temporary.name if self._temporary else "")
        self._places = {matrix: place for place, matrix in enumerate(matrices)}
        self._on_columns: dict[Matrix, bool] = {}

    def recall(self) -> list[Matrix]:
        """Take up what an earlier run has left in the folder. Returns the matrices that some process has nothing of."""
        left = {matrix: self._left(matrix) for matrix in self._places}
        known = Counter(gather(lambda: [self._places[matrix] for matrix in left if left[matrix] is not None]))
        missing = []
        for matrix, found in left.items():
            if found is None or known[self._places[matrix]] < process_count():
                missing.append(matrix)
            elif isinstance(found, Skipped):
                self.left_out.append(found)
            else:
                self.costs[matrix], self._on_columns[matrix] = found
        return missing

    def add(self, matrix: Matrix, found: Decomposition | Skipped) -> None:
        """Keep what is known of one matrix. Raises OutputError when it can't be written."""
        about, tensors = {"matrix": matrix.name}, {"costs": torch.zeros(0)}
        if isinstance(found, Skipped):
            self.left_out.append(found)
            about["reason"] = found.reason
        else:
            self.costs[matrix] = np.array(from_main(found.costs.tolist()))
            projection = found.projection
            if projection is None:
                return
            self._on_columns[matrix] = projection.on_columns
            about["on_columns"] = str(projection.on_columns)
            tensors = {"basis": projection.basis.cpu(), "dual": projection.dual.cpu()}
            tensors["costs"] = torch.from_numpy(self.costs[matrix])

        def write() -> list[None]:
            path = self._path(matrix)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(tensors, path.with_suffix(".part"), about)
                path.with_suffix(".part").replace(path)
            except (OSError, SafetensorError) as error:
                where = "set TMPDIR to a folder that has some" if self._temporary else "choose another --output"
                raise OutputError(
                    f"{self._folder}: the projections of {matrix.name} can't be written there ({error}). Make "
                    f"room, or {where}."
                ) from error
            return []

        gather(write)

    def _path(self, matrix: Matrix) -> Path:
        return self._folder / f"{self._places[matrix]}.safetensors"

    def _left(self, matrix: Matrix) -> tuple[np.ndarray, bool] | Skipped | None:
        try:
            with safe_open(self._path(matrix), "pt") as file:
                # a copy: the file stays mapped where it isn't, and on Windows no such file can be moved or removed
                about, costs = file.metadata() or {}, file.get_tensor("costs").numpy().copy()
        except (OSError, SafetensorError):
            return None
        if about.get("matrix") != matrix.name:
            return None
        if "reason" in about:
            return Skipped(matrix.name, about["reason"])
        return costs, about["on_columns"] == "True"

    def truncated(self, matrix: Matrix, weight: Tensor, rank: int) -> Tensor:
        return self.decomposition(matrix, weight).truncated(weight, rank)

    def factors(self, matrix: Matrix, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return self.decomposition(matrix, weight).factors(weight, rank)

    def decomposition(self, matrix: Matrix, weight: Tensor) -> Decomposition:
        """What is known of a matrix, on the weight's device."""
        if matrix not in self._on_columns:
            return Decomposition(self.costs[matrix], None)
        held = load_file(self._path(matrix), device=str(weight.device))
        return Decomposition(self.costs[matrix], Projection(held["basis"], held["dual"], self._on_columns[matrix]))


def stored_bytes(matrix: Matrix, dtype: torch.dtype) -> int:
    """What a `MeasuredReducer` keeps of a matrix of that dtype on disk, in each process."""
    short = min(matrix.shape)
    return 2 * short**2 * (8 if dtype == torch.float64 else 4) + 8 * (short + 1)


def measured_reducer(
    weights: Weights,
    matrices: Sequence[Matrix],
    rows: Sequence[Row],
    *,
    way: Literal["svd", "whitened", "fisher"],
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress = SILENT,
) -> MeasuredReducer:
    """Decompose matrices for truncation to any rank. Those that would cost nothing at any rank are left out.

    Args:
        weights: The model's.
        matrices: Which of them.
        rows: What the statistics are measured on; unused for `svd`.
        way: `svd` weighs neither side, `whitened` the inputs, `fisher` the inputs and the outputs' gradients.
        seed: Of the labels that are drawn.
        folder: Keeps what was found of each matrix; what the same call left there before isn't measured again.
        progress: Told of each row.

    Raises:
        ModelError: The model is sharded over processes, computes inf or nan on a row, or writes over what it reads.
        OutputError: There is no room for the projections.
        SpectrumError: A matrix can't be decomposed.
    """
    reducer = MeasuredReducer(matrices, folder, is_in_nats=way == "fisher")
    if way == "svd":
        for matrix in matrices:
            reducer.add(matrix, _costly(matrix, decompose_plainly(weights.read(matrix))))
        return reducer
    missing = reducer.recall()
    for matrix, found in measure(weights, missing, rows, seed=seed, progress=progress) if missing else ():
        reducer.add(matrix, _decomposed(weights, matrix, found, with_gradients=way == "fisher"))
        del found  # or they would be held beside those of the next matrices, while these are measured
    reducer.costs = {matrix: reducer.costs[matrix] for matrix in matrices if matrix in reducer.costs}
    return reducer


def _decomposed(
    weights: Weights, matrix: Matrix, found: Moments | Skipped, *, with_gradients: bool
) -> Decomposition | Skipped:
    """Raises SpectrumError with the matrix's name."""
    if isinstance(found, Skipped):
        return found
    if why := found.why_unweighed(with_gradients=with_gradients):
        return Skipped(matrix.name, f"{why}, so nothing tells its ranks apart")
    try:
        return _costly(matrix, decompose_by_moments(weights.read(matrix), found, with_gradients=with_gradients))
    except SpectrumError as error:
        raise SpectrumError(f"{matrix.name}: {error}") from error


def _costly(matrix: Matrix, found: Decomposition) -> Decomposition | Skipped:
    """What costs nothing at any rank is left whole: a matrix that was added as zeros is there to be trained."""
    return found if found.costs[0] else Skipped(matrix.name, "it is zero, so nothing tells its ranks apart")

"""Scan a model: for every weight matrix its singular values, the edges placed in them, and what follows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from splaser_plugin import __version__
from splaser_plugin.config import EDGES, ScanConfig
from splaser_plugin.edges import EdgeFit, fit_edges
from splaser_plugin.errors import RecipeError, SpectrumError
from splaser_plugin.matrices import Matrix, Skipped
from splaser_plugin.output import whole_file
from splaser_plugin.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from splaser_plugin.checkpoint import Checkpoint, TensorPart
    from splaser_plugin.scan_journal import ScanJournal
    from splaser_plugin.spectrum import Precision
    from splaser_plugin.weights import Weights

    _Read: TypeAlias = Callable[[Sequence[Matrix], Sequence[Matrix]], Iterator[tuple[Matrix, Tensor]]]
    """This process's matrices with their weights, in order, given those and all that the processes want."""

SCHEMA = "splaser.scan/1"
BATCH_ENTRIES = 2**22
"""Most entries of experts that are computed together: 32 MiB in float64."""
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

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> MatrixScan:
        """The record that `asdict` turned into `stored`. Raises KeyError or TypeError when it isn't whole."""
        return cls(
            **{
                **stored,
                "shape": tuple(stored["shape"]),
                "spectrum": tuple(stored["spectrum"]),
                "edges": {edge: EdgeFit(**stored["edges"][edge]) for edge in EDGES},
            }
        )


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
    precision: str = "auto"
    version: str = ""
    """Of the program that made it; empty when it was put together otherwise."""

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
            return cls(
                **{key: stored[key] for key in ("model", "weights", "edge")},
                matrices=tuple(MatrixScan.from_dict(each) for each in stored["matrices"]),
                skipped=tuple(Skipped(**each) for each in stored["skipped"]),
                **{key: stored[key] for key in ("precision", "version") if key in stored},
            )
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


def run_scan(
    model: str | Path | nn.Module,
    *,
    config: ScanConfig | None = None,
    output: str | Path | None = None,
    progress: Progress = SILENT,
) -> Scan:
    """Scan a model: a loaded one where it is, a folder of safetensors or a hub id straight from disk.

    A .gguf file is loaded first. output: scan.json to write; with it nothing is computed twice: what a scan
    that was killed had finished is taken from its journal, and a finished scan of the same weights as it is.
    Raises CheckpointError, ModelError, MatrixError or SpectrumError; with `output` OutputError.
    """
    if output is not None:
        _check_output(output)
    if not isinstance(model, (str, Path)):
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        return _scan_loaded(model, name, config, output, progress)
    if str(model).endswith(".gguf"):
        from splaser_plugin.loading import load_model

        return _scan_loaded(load_model(model)[0], str(model), config, output, progress)
    from splaser_plugin.checkpoint import open_checkpoint, resolve_model

    checkpoint = open_checkpoint(resolve_model(str(model)))
    return scan_checkpoint(checkpoint, config=config, name=str(model), output=output, progress=progress)


def _scan_loaded(
    model: nn.Module, name: str, config: ScanConfig | None, output: str | Path | None, progress: Progress
) -> Scan:
    from splaser_plugin.weights import Weights

    weights = Weights(model)
    identity = weights.identity()
    return scan_model(weights, config=config, name=name, identity=identity, output=output, progress=progress)


def scan_model(
    model_weights: Weights,
    *,
    config: ScanConfig | None = None,
    name: str = "",
    identity: str = "",
    output: str | Path | None = None,
    progress: Progress = SILENT,
) -> Scan:
    """Scan a loaded model where it is: on its device, one matrix at a time.

    name, identity: how the model and its weights are called in the result. output: see `run_scan`; weights of
    one `identity` are taken for the same.
    Raises MatrixError, ModelError or SpectrumError, the last with the matrix's name; with `output` OutputError.
    """
    config = config or ScanConfig()
    matrices, skipped = model_weights.matrices(config.include, config.exclude)

    def read(mine: Sequence[Matrix], wanted: Sequence[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
        kept = frozenset(mine)
        for matrix in wanted if model_weights.is_sharded else mine:
            weight = model_weights.read(matrix)
            if matrix in kept:
                yield matrix, weight

    empty = Scan(name, identity, config.edge, (), tuple(skipped), config.precision, __version__)
    return _scan(empty, matrices, read, output, progress)


def scan_checkpoint(
    checkpoint: Checkpoint,
    *,
    config: ScanConfig | None = None,
    name: str = "",
    output: str | Path | None = None,
    progress: Progress = SILENT,
) -> Scan:
    """Scan safetensors straight from disk, holding one matrix (or a batch of small experts) and the next one.

    output: see `run_scan`. Several processes each read their own part of the matrices; the result is the same
    to the last bit where each computes on as many threads as the one.
    Raises CheckpointError, MatrixError or SpectrumError; with `output` OutputError.
    """
    from splaser_plugin.checkpoint import read_tensors
    from splaser_plugin.matrices import stored_matrices

    config = config or ScanConfig()
    matrices, skipped = stored_matrices(checkpoint, include=config.include, exclude=config.exclude)

    def read(mine: Sequence[Matrix], wanted: Sequence[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
        by_part = {(matrix.parameter, matrix.expert): matrix for matrix in mine}

        def as_matrix(found: tuple[TensorPart, Tensor]) -> tuple[Matrix, Tensor]:
            matrix = by_part[found[0]]
            return matrix, found[1].view(matrix.shape)

        return map(as_matrix, read_tensors(checkpoint, by_part))  # a loop would keep the last tensor alive

    name = name or str(checkpoint.folder)
    empty = Scan(name, checkpoint.identity(), config.edge, (), tuple(skipped), config.precision, __version__)
    return _scan(empty, matrices, read, output, progress)


def _scan(empty: Scan, matrices: Sequence[Matrix], read: _Read, output: str | Path | None, progress: Progress) -> Scan:
    """The scan with the records of `matrices`; with an output it is also written there."""
    batches = _batches(matrices)
    if output is None:
        return _with_records(empty, matrices, _measure(batches, read, empty.precision, progress))
    from splaser_plugin.distributed import gather, in_main, is_main
    from splaser_plugin.scan_journal import ScanJournal

    _check_output(output)
    path = Path(output).expanduser().resolve()
    settings = {"weights": empty.weights, "precision": empty.precision, "version": empty.version}
    with closing(ScanJournal(path, settings)) as journal:
        known = gather(lambda: _known(path, empty, matrices, journal, progress) if is_main() else [])
        names = {record.name for record in known}
        left = [batch for batch in batches if not names.issuperset(matrix.name for matrix in batch)]
        found = _measure(left, read, empty.precision, progress, journal)
        scan = _with_records(empty, matrices, [*known, *found])
        in_main(lambda: _finish(scan, path, journal))
    return scan


def _check_output(output: str | Path) -> None:
    from splaser_plugin.distributed import in_main
    from splaser_plugin.output import check_file

    in_main(lambda: check_file(output, replaceable=SCHEMA))


def _known(
    path: Path, empty: Scan, matrices: Sequence[Matrix], journal: ScanJournal, progress: Progress
) -> list[MatrixScan]:
    """Records of `matrices` that a finished scan at `path` or the journal of an unfinished one has already."""
    shapes = {matrix.name: matrix.shape for matrix in matrices}
    finished = [record for record in _finished(path, empty) if shapes.get(record.name) == record.shape]
    left = [record for record in map(_record_or_none, journal.resume()) if record is not None]
    known = {record.name: record for record in [*finished, *left] if shapes.get(record.name) == record.shape}
    if journal.other_settings:
        which = ", ".join(journal.other_settings)
        progress.fact("journal", f"{journal.path} was left by another scan (other {which}), so it is not used")
    if len(finished) == len(matrices):
        progress.fact("scanned before", f"{path} is of these weights and settings, so nothing is computed again")
    elif known:
        progress.fact("scanned before", f"{len(known)} of {len(matrices)} matrices, so the others are left")
    return list(known.values())


def _record_or_none(stored: Mapping[str, Any]) -> MatrixScan | None:
    try:
        return MatrixScan.from_dict(stored)
    except (KeyError, TypeError):
        return None


def _finished(path: Path, empty: Scan) -> tuple[MatrixScan, ...]:
    """Records of the scan at `path`, if it is one of the same weights and settings."""
    try:
        before = Scan.load(path)
    except RecipeError:  # there is none, or a damaged or older one, which is replaced
        return ()
    same = (before.weights, before.precision, before.version) == (empty.weights, empty.precision, empty.version)
    return before.matrices if same else ()


def _finish(scan: Scan, path: Path, journal: ScanJournal) -> None:
    scan.save(path)
    journal.remove()


def _batches(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """The matrices in their order: each alone, but neighbouring experts of a fused parameter together.

    How many are together depends on nothing but the parameter, so that a scan in parts gives the same bits.
    """
    batches: list[list[Matrix]] = []
    for matrix in matrices:
        together = batches and matrix.expert is not None and batches[-1][-1].parameter == matrix.parameter
        if together and (len(batches[-1]) + 1) * matrix.shape[0] * matrix.shape[1] <= BATCH_ENTRIES:
            batches[-1].append(matrix)
        else:
            batches.append([matrix])
    return batches


def _measure(
    batches: Sequence[list[Matrix]],
    read: _Read,
    precision: str,
    progress: Progress,
    journal: ScanJournal | None = None,
) -> list[MatrixScan]:
    """Records of this process's matrices and, in any order, of all other processes'."""
    from splaser_plugin.distributed import gather, my_part

    def measure_mine() -> list[MatrixScan]:
        found: list[MatrixScan] = []
        mine = my_part(batches)
        matrices = [matrix for batch in mine for matrix in batch]
        with progress.phase("scan", len(matrices)) as advance:
            weights = read(matrices, [matrix for batch in batches for matrix in batch])
            for batch in mine:
                records = _measure_batch([next(weights) for _ in batch], cast("Precision", precision))
                if journal is not None:
                    journal.append([asdict(record) for record in records])
                found += records
                advance(len(records))
            for _ in weights:
                pass
        return found

    return gather(measure_mine)


def _measure_batch(batch: list[tuple[Matrix, Tensor]], precision: Precision) -> list[MatrixScan]:
    import torch

    from splaser_plugin.spectrum import singular_values, singular_values_of_batch

    if len(batch) > 1:
        with suppress(SpectrumError):  # raised again below, by the one matrix that is at fault
            stack = torch.stack([weight for _, weight in batch])
            spectra = singular_values_of_batch(stack, precision=precision)
            return [matrix_scan(matrix, values) for (matrix, _), values in zip(batch, spectra, strict=True)]
    records = []
    for matrix, weight in batch:
        try:
            records.append(matrix_scan(matrix, singular_values(weight, precision=precision)))
        except SpectrumError as error:
            raise SpectrumError(f"{matrix.name}: {error}") from error
    return records


def _with_records(empty: Scan, matrices: Sequence[Matrix], records: Iterable[MatrixScan]) -> Scan:
    by_name = {record.name: record for record in records}
    return replace(empty, matrices=tuple(by_name[matrix.name] for matrix in matrices))


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
    """Write JSON with a final newline, whole or not at all; refuses nan and infinity.

    Raises OutputError when the file can't be written.
    """
    with whole_file(path) as file:
        json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")

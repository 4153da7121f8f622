"""Scan a model: for every weight matrix its singular values, the edges placed in them, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from splaser_plugin import __version__
from splaser_plugin.config.stages import ScanConfig
from splaser_plugin.errors import CheckpointError, RecipeError, SpectrumError
from splaser_plugin.files.text import first_line_of
from splaser_plugin.files.validation import InvalidRecordError
from splaser_plugin.progress import SILENT, Progress, default_progress
from splaser_plugin.scanning.records import SCHEMA, MatrixScan, Scan, matrix_scan, rank_key
from splaser_plugin.weights.matrices import Matrix, overview

if TYPE_CHECKING:
    from torch import Tensor, nn

    from splaser_plugin.scanning.journal import ScanJournal
    from splaser_plugin.spectra.spectrum import Precision
    from splaser_plugin.weights.matrices import MatrixSource

    _Read: TypeAlias = Callable[[Sequence[Matrix], Sequence[Matrix]], Iterator[tuple[Matrix, Tensor]]]
    """This process's matrices with their weights, in order, given those and all that the processes want."""

__all__ = [
    "MatrixScan",
    "Scan",
    "matrix_scan",
    "rank_key",
    "scan",
    "scan_source",
]

BATCH_ENTRIES = 2**20
"""Most entries of experts that are computed together: 8 MiB in float64, of which a handful of copies are needed."""


def scan(
    model: str | Path | nn.Module,
    *,
    config: ScanConfig | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> Scan:
    """Scan a model: singular values of every weight matrix, split into signal and noise. Nothing is changed.

    Args:
        model: A loaded model, which is scanned where it is; a folder of safetensors or a hub id, straight from disk, a
            matrix at a time on the configuration's device; a .gguf file, or pickled weights where the configuration
            allows them, which are loaded there first.
        config: Edge, patterns of names, precision.
        output: scan.json to write. With it nothing is computed twice: what a scan that was killed had finished is
            taken from its journal, and a finished scan of the same weights as it is.
        progress: What is told of the work: as bars in a notebook and not at all elsewhere, if not given.

    Returns:
        The scan, with every edge placed in each spectrum.

    Raises:
        CheckpointError, ModelError, MatrixError: The model can't be read, or is of a kind that can't be scanned.
        ConfigError: There is no such device here.
        SpectrumError: Singular values can't be computed, or the device's memory is full; the message names the matrix.
        OutputError: The output can't be written.
    """
    from splaser_plugin.distributed import meet

    meet("scan()")
    progress = progress or default_progress()
    if output is not None:
        _check_output(output)
    if not isinstance(model, (str, Path)):
        from splaser_plugin.weights.in_memory import Weights, model_name
        from splaser_plugin.weights.wrapped import unwrapped

        inner = unwrapped(model)
        return scan_source(Weights(inner), config=config, name=model_name(inner), output=output, progress=progress)
    from splaser_plugin.checkpoints.checkpoint import open_checkpoint
    from splaser_plugin.checkpoints.folder import inspect, resolve_model
    from splaser_plugin.spectra.spectrum import FLOAT64_DEVICES
    from splaser_plugin.weights.devices import pick_device
    from splaser_plugin.weights.factored_format import stored_layers
    from splaser_plugin.weights.stored import CPU, StoredWeights

    config = config or ScanConfig()
    device = pick_device(config.device)
    is_gguf = str(model).endswith(".gguf")
    folder = None if is_gguf else inspect(resolve_model(str(model), allow_pickle=config.allow_pickle))
    if folder is None or (config.allow_pickle and folder.has_only_pickles):
        from splaser_plugin.weights.in_memory import Weights
        from splaser_plugin.weights.loading import load_model

        loaded, _ = load_model(model, device=config.device, allow_pickle=config.allow_pickle)
        return scan_source(Weights(loaded), config=config, name=str(model), output=output, progress=progress)
    checkpoint = open_checkpoint(folder)
    if stored_layers(checkpoint.config, checkpoint.folder):
        raise CheckpointError(
            f"{model}: has matrices stored as factors, which are not scanned. Scan the dense model: "
            f"splaser expand {model} -o DENSE."
        )
    if device.type not in FLOAT64_DEVICES:  # the arithmetic would take each matrix back to the CPU
        device = CPU
    progress.fact("device", str(device))
    return scan_source(
        StoredWeights(checkpoint, device), config=config, name=str(model), output=output, progress=progress
    )


def scan_source(
    source: MatrixSource,
    *,
    config: ScanConfig | None = None,
    name: str = "",
    identity: str = "",
    output: str | Path | None = None,
    progress: Progress = SILENT,
) -> Scan:
    """Scan weights where they are: a loaded model's on its device, files straight from disk; one matrix at a time.

    Of files one matrix (or a batch of small experts) and the next one are held. Several processes each take their own
    part; the result is the same to the last bit where each computes on as many threads as the one.

    Args:
        source: `in_memory.Weights` or `stored.StoredWeights`.
        config: See `scan`.
        name: How the model is called in the result.
        identity: The weights' own, where it is known already.
        output: See `scan`; weights of one identity are taken for the same.
        progress: See `scan`.

    Raises:
        CheckpointError, ModelError, MatrixError: See `scan`.
        SpectrumError: With the matrix's name.
        OutputError: With `output`.
    """
    config = config or ScanConfig()
    matrices, skipped = source.matrices(config.include, config.exclude, config.towers)
    if not identity:  # a run that knows it has told of its model already
        progress.fact("model", f"{name}: {overview(matrices)}")
        identity = source.identity()
    if source.note:
        progress.fact("names", source.note)
    if source.stored_as:
        progress.fact("weights", f"{source.stored_as}; scanned as the float32 weights that they stand for")
    empty = Scan(name, identity, config.edge, (), tuple(skipped), config.precision, __version__, source.stored_as)
    return _scan(empty, matrices, source.stream, output, progress)


def _scan(empty: Scan, matrices: Sequence[Matrix], read: _Read, output: str | Path | None, progress: Progress) -> Scan:
    """The scan with the records of `matrices`; with an output it is also written there."""
    batches = _batches(matrices)
    if output is None:
        return _with_records(empty, matrices, _measure(batches, read, empty.precision, progress))
    from splaser_plugin.distributed import gather, in_main, is_main
    from splaser_plugin.scanning.journal import ScanJournal

    _check_output(output)
    path = Path(output).expanduser().resolve()
    settings = {"weights": empty.weights_identity, "precision": empty.precision, "version": empty.version}
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
    from splaser_plugin.files.output import check_file

    in_main(lambda: check_file(output, replaceable=SCHEMA))


def _known(
    path: Path, empty: Scan, matrices: Sequence[Matrix], journal: ScanJournal, progress: Progress
) -> list[MatrixScan]:
    """Records of `matrices` that a finished scan at `path` or the journal of an unfinished one has already."""
    shapes = {matrix.name: matrix.shape for matrix in matrices}
    finished = [record for record in _finished(path, empty) if shapes.get(record.name) == record.shape]
    left = journal.resume(_record_or_none)
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
    except InvalidRecordError:
        return None


def _finished(path: Path, empty: Scan) -> tuple[MatrixScan, ...]:
    """Records of the scan at `path`, if it is one of the same weights and settings."""
    try:
        before = Scan.load(path)
    except RecipeError:  # there is none, or a damaged or older one, which is replaced
        return ()
    same = all(getattr(before, name) == getattr(empty, name) for name in ("weights_identity", "precision", "version"))
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
    from splaser_plugin.distributed import gather, is_out_of_memory, my_part

    def measure_mine() -> list[MatrixScan]:
        found: list[MatrixScan] = []
        mine = my_part(batches)
        matrices = [matrix for batch in mine for matrix in batch]
        with progress.phase("scan", len(matrices)) as advance:
            weights = read(matrices, [matrix for batch in batches for matrix in batch])
            for batch in mine:
                try:
                    records = _measure_batch([next(weights) for _ in batch], cast("Precision", precision))
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise SpectrumError(
                        f"{batch[0].name}: no memory is left to scan it ({first_line_of(error)}). Free some, or use "
                        "the CPU's: --device cpu."
                    ) from error
                if journal is not None:
                    journal.append([record.to_dict() for record in records])
                found += records
                advance(len(records))
            for _ in weights:
                pass
        return found

    return gather(measure_mine)


def _measure_batch(batch: list[tuple[Matrix, Tensor]], precision: Precision) -> list[MatrixScan]:
    import torch

    from splaser_plugin.spectra.spectrum import singular_values, singular_values_of_batch

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

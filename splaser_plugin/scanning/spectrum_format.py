"""The JSON that Spectrum and laserRMT publish: read it as a scan, write it from one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from splaser_plugin.checkpoints.naming import block_index, type_in_block
from splaser_plugin.config.stages import Edge, SelectConfig
from splaser_plugin.errors import ConfigError, RecipeError
from splaser_plugin.files.json import read_json, write_json
from splaser_plugin.scanning.records import MAX_SCAN_BYTES, MatrixScan, Scan
from splaser_plugin.weights.matrices import Skipped

LARGEST = sys.float_info.max
"""Stands for an infinite SNR in what is written: JSON has no infinity, and this sorts above all others."""


@dataclass(frozen=True)
class PublishedSnr:
    """One weight's entry: the file calls `snr` what a scan calls `snr_ratio` (snr divided by max(S))."""

    name: str
    type: str
    block: int | None
    snr_ratio: float | None
    """None: infinite, since the weight has no noise values."""


@dataclass(frozen=True)
class PublishedScan:
    """A scan made by somebody else: one figure a weight, no shapes."""

    model: str
    """The file's name without folder: the model's id can't be read back from it."""
    matrices: tuple[PublishedSnr, ...]
    edge: ClassVar[Edge] = "iqr"
    skipped: ClassVar[tuple[Skipped, ...]] = ()

    def ranked(self, by: str = "snr_ratio", edge: Edge | None = None) -> list[PublishedSnr]:
        """Weights from the lowest to the highest SNR; infinite ones stand above all others.

        The file doesn't tell those apart: among them, and among equals, type, block and name decide.
        """
        return sorted(self.matrices, key=_rank_key)

    @property
    def tied(self) -> tuple[str, ...]:
        """Head and embeddings, when their figures are the same to the last digit: then they are one weight."""
        outside = [matrix for matrix in self.matrices if matrix.block is None and matrix.snr_ratio is not None]
        figures = [name.snr_ratio for name in outside]
        return tuple(name.name for name in outside if figures.count(name.snr_ratio) > 1)


def load_scan(path: str | Path) -> Scan | PublishedScan:
    """Read a scan.json of this program, or a published one, plain or sorted.

    Args:
        path: The file.

    Returns:
        The scan; a published one has no more than each matrix's SNR.

    Raises:
        RecipeError: It is missing, damaged or of another kind.
    """
    stored = read_json(path, RecipeError, max_bytes=MAX_SCAN_BYTES)
    if isinstance(stored, dict) and "schema" not in stored:
        return published_from_dict(stored, str(path))
    return Scan.from_dict(stored, str(path))


def published_from_dict(stored: Any, source: str) -> PublishedScan:
    """A published scan from its parsed JSON.

    Plain: {name: {"snr": figure, "type": module type}}. Sorted: {module type: {name: figure}}.
    Raises RecipeError naming the entry that is neither.
    """
    if not isinstance(stored, dict) or not stored:
        raise RecipeError(f"{source}: no entries. Expected a scan.json, or the JSON that Spectrum writes.")
    matrices: dict[str, PublishedSnr] = {}
    for name, kind, figure in _entries(stored, source):
        if name in matrices:
            raise RecipeError(f"{source}: {name} occurs twice. Take it out of all but one module type.")
        matrices[name] = PublishedSnr(name, kind, block_index(name), _figure(name, figure, source))
    return PublishedScan(Path(source).name, tuple(matrices.values()))


def published_dict(scan: Scan, *, edge: str | None = None) -> dict[str, dict[str, Any]]:
    """The plain published form of a scan: name to `snr` (our snr_ratio) and `type`, highest first of each type.

    An infinite SNR is written as the largest float. Readers that sort, and keep the order of equals, then
    choose as we do. Experts are left out: they are no modules of their own.
    Raises ConfigError when there is no such edge.
    """
    of_edge = SelectConfig.from_dict({"edge": edge}).edge or scan.edge
    rows: dict[str, list[MatrixScan]] = {}
    for matrix in reversed(scan.ranked("snr_ratio", of_edge)):
        if "[" not in matrix.name:  # scans of old versions have nothing else to tell an expert by
            rows.setdefault(matrix.type, []).append(matrix)
    return {
        matrix.name: {"snr": _written(matrix.edges[of_edge].snr_ratio), "type": matrix.type}
        for _, group in sorted(rows.items())
        for matrix in group
    }


def save_published(scan: Scan, path: str | Path, *, edge: str | None = None) -> None:
    """Write `published_dict`."""
    write_json(path, published_dict(scan, edge=edge))


def published_name(model: str) -> str:
    """The file name under which Spectrum and Axolotl's plugin of that name look for the scan of a model."""
    if not model:
        raise ConfigError("the model's id is empty, so its scan's file can't be named. Give --model.")
    return f"snr_results_{model.replace('/', '-').replace('_', '-')}.json"


def _entries(stored: dict[str, Any], source: str) -> Iterator[tuple[str, str, Any]]:
    """(name, type, figure) of each weight."""
    for key, value in stored.items():
        if isinstance(value, dict) and "snr" in value:
            yield key, str(value.get("type") or type_in_block(key)), value["snr"]
        elif isinstance(value, dict) and value and not any(isinstance(inner, dict) for inner in value.values()):
            for name, figure in value.items():
                yield name, key, figure
        else:
            raise RecipeError(
                f"{source}: entry '{key}' is neither {{'snr': ..., 'type': ...}} nor a module type's {{name: snr}}. "
                "Expected a scan.json, or the JSON that Spectrum writes."
            )


def _figure(name: str, figure: Any, source: str) -> float | None:
    if isinstance(figure, bool) or not isinstance(figure, int | float) or not figure >= 0:
        raise RecipeError(f"{source}: {name} has snr {figure!r}, expected a number of at least 0 or Infinity.")
    return None if figure >= LARGEST else float(figure)


def _written(snr_ratio: float | None) -> float:
    return LARGEST if snr_ratio is None else snr_ratio


def _rank_key(found: PublishedSnr) -> tuple[bool, float, str, int, str]:
    return (
        found.snr_ratio is None,
        found.snr_ratio or 0.0,
        found.type,
        -1 if found.block is None else found.block,
        found.name,
    )

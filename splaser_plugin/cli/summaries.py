"""What a command says at its end: what came out, where it is, and the next command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from splaser_plugin.cli.lines import fitted
from splaser_plugin.files.text import printable

if TYPE_CHECKING:
    from splaser_plugin.jobs.compare import Comparison
    from splaser_plugin.jobs.laser import LaserResult
    from splaser_plugin.progress import Progress
    from splaser_plugin.scanning.records import MatrixScan
    from splaser_plugin.scanning.scan import Scan

SHOWN = 5
"""Matrices at either end of a scan that are shown."""
ROOM = 63
"""Columns right of the labels in the narrowest usual terminal."""


def show_scan(found: Scan, output: Path, progress: Progress) -> None:
    for left_out in found.skipped:
        progress.detail("left out", f"{left_out.name}: {left_out.reason}")
    progress.result("scanned", f"{len(found.matrices)} matrices; {len(found.skipped)} parameters were left out")
    ranked = found.ranked("snr")
    for label, matrices in (("noisiest", ranked[:SHOWN]), ("best", ranked[SHOWN:][::-1][:SHOWN])):
        for matrix in matrices:
            fit = matrix.edges[found.edge]
            snr = "no noise" if fit.snr is None else f"snr {fit.snr:.3f}"
            progress.fact(label, f"{_called(matrix)}  {snr}  rank {fit.rank} of {min(matrix.shape)}")
    progress.result("scan", str(output))
    progress.command("look at it", ["splaser", "report", str(output), "-o", "report.html"])


def _called(matrix: MatrixScan) -> str:
    """Its name where 80 columns have room for it, else its block and its name in there."""
    inside = matrix.name.partition(f".{matrix.block}.")[2]
    return matrix.name if len(matrix.name) <= ROOM or not inside else f"block {matrix.block}, {inside}"


def show_comparison(found: Comparison, output: Path) -> None:
    from rich.console import Console

    from splaser_plugin.cli.terminal import comparison_tables

    console = Console(stderr=True)
    names = [Path(model.model).name or model.model for model in found.models]
    for table in comparison_tables(names, found.figures()):
        console.print(table)
    note = f"Changes and their 95 % intervals are against {names[0]}. Written to {output}."
    print(fitted(printable(note)), file=sys.stderr)


def show_laser(result: LaserResult, output: Path, progress: Progress, *, has_model: bool, mend: str = "") -> None:
    """mend: what would have written the model where there is none."""
    if not has_model:
        progress.result("model", f"none was written: nothing was kept, so it would be the base again{mend}")
        progress.result("report", str(output / "report.html"))
        return
    dense, stored = result.parameters
    if result.config.save == "factored":
        progress.result("parameters", f"{dense:,} before, {stored:,} after")
    else:
        removed = result.search.parameters_removed
        progress.result("parameters", f"{removed:,} of {dense:,} removed, if stored as factors")
    progress.result("model", str(output))
    progress.result("report", str(output / "report.html"))
    if stored < dense:
        progress.command("dense model", ["splaser", "expand", str(output), "-o", "ANOTHER_FOLDER"])
    if result.config.reducer != "svd":
        progress.command("again", ["splaser", "laser", "--config", str(output / "run.yaml"), "-o", "ANOTHER_FOLDER"])
        return
    recipe = str(output / "recipe.json")
    progress.command("rebuild", ["splaser", "apply", recipe, result.recipe.model, "-o", "ANOTHER_FOLDER"])

"""Rows of the table of reductions: what was measured of a model, kept in a file, and shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from tests.benchmarks.training import interval


@dataclass(frozen=True)
class Row:
    """What was measured of one method at one budget."""

    method: str
    budget: float
    """Share of the numbers in the blocks' matrices to remove, 0 to 1."""
    removed: float
    """Share that was removed."""
    loss: float
    """Nats a token above the base, on the judging half."""
    standard_error: float
    """Of `loss`, over windows."""
    predicted: float | None
    """Cost that the allocation expected, in nats a token; None where it has another unit."""
    bytes: int
    seconds: dict[str, float]
    peak_bytes: int
    """Of the whole process so far."""
    margin: float | None = None
    """Change of the preference margin on the pairs, in nats a token; None without pairs."""
    margin_error: float | None = None
    """Standard error of `margin`, over pairs."""
    speed: float | None = None
    """Tokens a second of processor time of a forward pass through the factored layers, over those of the dense model;
    None where it wasn't asked for."""
    windows: Sequence[float] = ()
    """What `loss` is the mean of."""


CELLS: dict[str, Callable[[Row], str]] = {
    "loss (95 % interval)": lambda row: "{:+.4f} ({:+.4f} to {:+.4f})".format(row.loss, *interval(row.windows)),
    "margin": lambda row: "" if row.margin is None else f"{row.margin:+.4f} +- {row.margin_error or 0:.4f}",
    "speed, of the dense model's": lambda row: "" if row.speed is None else f"{row.speed:.2f}",
    "MB": lambda row: f"{row.bytes / 1e6:.0f}",
}


def hold_to(settings: str, path: Path) -> None:
    """Refuse measurements of other settings in the file, or beside it; note these for the next run."""
    noted = path.with_suffix(".settings")
    before = noted.read_text() if noted.exists() else "options that nobody noted" if path.exists() else settings
    if before != settings:
        raise SystemExit(f"{path}: measured with {before}. Give these options, or another file.")
    noted.write_text(settings)


def read(path: Path) -> dict[tuple[str, float], Row]:
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row.method, row.budget): row for row in rows}


def table(rows: dict[tuple[str, float], Row], methods: Sequence[str]) -> str:
    """One table each of loss, margin, speed and bytes, as far as they were measured, and what each method took; in the
    order of the methods."""
    budgets = sorted({budget for _, budget in rows})
    shown = []
    for title, cell in CELLS.items():
        told = {place: text for place, row in rows.items() if (text := cell(row))}
        names = [name for name in methods if any(name == method for method, _ in told)]
        if names:
            shown += [f"| {title} | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |"]
            shown += ["| --- |" + " ---: |" * len(budgets)]
            shown += [
                f"| {name} | " + " | ".join(told.get((name, budget), "") for budget in budgets) + " |" for name in names
            ]
            shown += [""]
    for name in methods:
        mine = [row for row in rows.values() if row.method == name]
        if mine:
            slowest = max(mine, key=lambda row: sum(row.seconds.values()))
            stages = ", ".join(f"{stage} {taken:.1f} s" for stage, taken in slowest.seconds.items())
            peak = max(row.peak_bytes for row in mine)
            shown.append(f"{name}: {sum(slowest.seconds.values()):.0f} s ({stages}), at most {peak / 1e9:.1f} GB")
    return "\n".join(shown)


def predictions(rows: dict[tuple[str, float], Row]) -> str:
    """Predicted cost against measured loss, with their rank correlation, where the cost is in nats."""
    found = [row for row in rows.values() if row.predicted is not None]
    if len(found) < 3:
        return f"predicted against measured: {len(found)} rows in nats so far, too few for a rank correlation"
    predicted, measured = [row.predicted for row in found], [row.loss for row in found]
    correlation = spearmanr(predicted, measured).statistic
    lines = [f"{row.method}, {row.budget:.0%}: {row.predicted:.4f} predicted, {row.loss:.4f} measured" for row in found]
    return "\n".join([*lines, f"rank correlation over {len(found)} rows: {correlation:.2f}"])


def compared(rows: dict[tuple[str, float], Row], others: dict[tuple[str, float], Row]) -> str:
    """The losses of rows that both have, less those of the others, over the same windows, with a 95 % t interval."""
    lines = []
    for (name, budget), row in rows.items():
        other = others.get((name, budget))
        if other is not None and len(row.windows) == len(other.windows) > 1:
            change = np.subtract(row.windows, other.windows)
            low, high = interval(change)
            lines.append(f"{name}, {budget:.0%}: {change.mean():+.4f} ({low:+.4f} to {high:+.4f})")
    return "\n".join(["less the other measurements, nats a token (95 % interval over windows):", *lines])

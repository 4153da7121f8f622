"""Singular values and truncation against a full SVD: ratios measured in one run, as a table and as JSON.

    python tests/benchmarks/spectra.py [--quick] [--rounds 2] [--json FILE]

In each round every way runs once on the same weight, one after the other; the best time of each counts. The
floor is n^2 m + 4/3 n^3 operations (Gram matrix by half, reduction to tridiagonal form) at the best rate that
a square matrix product in the same precision reached in this run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from splaser_plugin.spectra.edges import EDGES, fit_edge
from splaser_plugin.spectra.spectrum import singular_values, singular_values_of_batch, truncate

Shape = tuple[int, int]

MISTRAL_BLOCK: dict[Shape, int] = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 3}
SMALL_BLOCK: dict[Shape, int] = {(768, 768): 2, (192, 768): 2, (2688, 768): 3}
TRUNCATIONS: dict[Shape, tuple[int, ...]] = {(576, 1536): (58, 288), (2048, 5632): (205, 1024)}
SMALL_TRUNCATIONS: dict[Shape, tuple[int, ...]] = {(576, 1536): (58, 288)}
EXPERTS = (128, 128, 256)


@dataclass
class SpectrumRow:
    """Seconds of the four ways for one shape, or for a whole block, and how far the results are apart."""

    name: str
    ours_s: float
    ours_float32_s: float
    svdvals_float64_s: float
    svdvals_float32_s: float
    floor_s: float
    floor_float32_s: float
    snr_error: float
    same_ranks: bool

    @property
    def share_of_floor(self) -> float:
        return self.floor_s / self.ours_s


@dataclass
class TruncationRow:
    """Seconds of one truncation and of a full SVD, and the share of entries equal after rounding."""

    name: str
    rank: int
    ours_s: float
    svd_float64_s: float
    svd_float32_s: float
    equal_entries: float


@dataclass
class BatchRow:
    """Seconds for many small weights: as one batch, one by one, and by svdvals in float64."""

    name: str
    batch_s: float
    one_by_one_s: float
    svdvals_float64_s: float


def trained_like(rows: int, columns: int) -> Tensor:
    """Noise, and 64 directions of signal from half to five times as strong as noise gets, in bfloat16."""
    generator = torch.Generator().manual_seed(rows * 100_003 + columns)
    count = min(64, rows, columns)
    left, right = (torch.randn(side, count, generator=generator) for side in (rows, columns))
    signal = left * (torch.logspace(1.0, 0.0, count) / min(rows, columns) ** 0.5) @ right.mT
    return (0.02 * (signal + torch.randn(rows, columns, generator=generator))).bfloat16()


def best_seconds(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


class MatmulRate:
    """Operations a second of a square matrix product, the best seen so far."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.best = {torch.float64: 0.0, torch.float32: 0.0}

    def measure(self) -> None:
        for dtype in self.best:
            factor = torch.randn(self.side, self.side, dtype=dtype)
            seconds = best_seconds({"product": lambda factor=factor: factor @ factor}, 3)["product"]  # type: ignore[misc]
            self.best[dtype] = max(self.best[dtype], 2 * self.side**3 / seconds)

    def floor_s(self, shape: Shape, dtype: torch.dtype) -> float:
        n, m = min(shape), max(shape)
        return (n * n * m + 4 / 3 * n**3) / self.best[dtype]


def compare(ours: np.ndarray, plain: np.ndarray, shape: Shape) -> tuple[float, bool]:
    """Largest relative difference in snr over the edges, and whether all ranks are the same."""
    error, same_ranks = 0.0, True
    for edge in EDGES:
        first, second = fit_edge(ours, shape, edge), fit_edge(plain, shape, edge)
        same_ranks &= first.rank == second.rank
        if first.snr is not None and second.snr is not None:
            error = max(error, abs(first.snr / second.snr - 1))
    return error, same_ranks


def measure_spectrum(shape: Shape, rounds: int, rate: MatmulRate) -> SpectrumRow:
    weight = trained_like(*shape)
    results: dict[str, np.ndarray] = {}

    def ours() -> None:
        results["ours"] = singular_values(weight)

    def plain() -> None:
        results["plain"] = torch.linalg.svdvals(weight.double()).numpy()

    ways = {
        "ours": ours,
        "ours float32": lambda: singular_values(weight, precision="float32"),
        "float64": plain,
        "float32": lambda: torch.linalg.svdvals(weight.float()),
    }
    rate.measure()
    seconds = best_seconds(ways, rounds)
    rate.measure()
    error, same_ranks = compare(results["ours"], results["plain"], shape)
    return SpectrumRow(
        name=f"{shape[0]}x{shape[1]}",
        ours_s=seconds["ours"],
        ours_float32_s=seconds["ours float32"],
        svdvals_float64_s=seconds["float64"],
        svdvals_float32_s=seconds["float32"],
        floor_s=rate.floor_s(shape, torch.float64),
        floor_float32_s=rate.floor_s(shape, torch.float32),
        snr_error=error,
        same_ranks=same_ranks,
    )


def whole_block(rows: list[SpectrumRow], counts: list[int]) -> SpectrumRow:
    def total(field: str) -> float:
        return sum(count * getattr(row, field) for row, count in zip(rows, counts, strict=True))

    return SpectrumRow(
        name=f"block of {sum(counts)}",
        ours_s=total("ours_s"),
        ours_float32_s=total("ours_float32_s"),
        svdvals_float64_s=total("svdvals_float64_s"),
        svdvals_float32_s=total("svdvals_float32_s"),
        floor_s=total("floor_s"),
        floor_float32_s=total("floor_float32_s"),
        snr_error=max(row.snr_error for row in rows),
        same_ranks=all(row.same_ranks for row in rows),
    )


def measure_spectra(block: dict[Shape, int], rounds: int, rate: MatmulRate) -> list[SpectrumRow]:
    rows = []
    for shape in block:
        print(f"singular values of {shape[0]}x{shape[1]} ...", file=sys.stderr, flush=True)
        rows.append(measure_spectrum(shape, rounds, rate))
    for row, shape in zip(rows, block, strict=True):
        row.floor_s = rate.floor_s(shape, torch.float64)
        row.floor_float32_s = rate.floor_s(shape, torch.float32)
    return [*rows, whole_block(rows, list(block.values()))]


def svd_truncation(weight: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    U, S, Vh = torch.linalg.svd(weight.to(dtype), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).to(weight.dtype)


def measure_truncation(shape: Shape, rank: int, rounds: int) -> TruncationRow:
    print(f"truncation of {shape[0]}x{shape[1]} to rank {rank} ...", file=sys.stderr, flush=True)
    weight = trained_like(*shape)
    ways = {
        "ours": lambda: truncate(weight, rank),
        "float64": lambda: svd_truncation(weight, rank, torch.float64),
        "float32": lambda: svd_truncation(weight, rank, torch.float32),
    }
    seconds = best_seconds(ways, rounds)
    equal = truncate(weight, rank) == svd_truncation(weight, rank, torch.float64)
    name = f"{shape[0]}x{shape[1]}"
    return TruncationRow(
        name, rank, seconds["ours"], seconds["float64"], seconds["float32"], equal.double().mean().item()
    )


def measure_batch(rounds: int) -> BatchRow:
    count, rows, columns = EXPERTS
    print(f"{count} weights of {rows}x{columns} ...", file=sys.stderr, flush=True)
    weights = torch.stack([trained_like(rows, columns)] * count)
    ways = {
        "batch": lambda: singular_values_of_batch(weights),
        "one by one": lambda: [singular_values(weight) for weight in weights],
        "float64": lambda: torch.linalg.svdvals(weights.double()),
    }
    seconds = best_seconds(ways, rounds)
    return BatchRow(f"{count} of {rows}x{columns}", seconds["batch"], seconds["one by one"], seconds["float64"])


def table(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]

    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([row(head), rule, *(row(line) for line in lines)])


def spectra_table(rows: list[SpectrumRow]) -> str:
    head = ["weight", "ours", "svdvals f64", "of it", "svdvals f32", "of it", "floor", "share", "snr error", "ranks"]
    head += ["ours f32", "share"]
    lines = [
        [
            row.name,
            f"{row.ours_s:.2f} s",
            f"{row.svdvals_float64_s:.2f} s",
            f"1/{row.svdvals_float64_s / row.ours_s:.1f}",
            f"{row.svdvals_float32_s:.2f} s",
            f"1/{row.svdvals_float32_s / row.ours_s:.1f}",
            f"{row.floor_s:.2f} s",
            f"{row.share_of_floor:.0%}",
            f"{row.snr_error:.0e}",
            "same" if row.same_ranks else "DIFFER",
            f"{row.ours_float32_s:.2f} s",
            f"{row.floor_float32_s / row.ours_float32_s:.0%}",
        ]
        for row in rows
    ]
    return table(head, lines)


def truncation_table(rows: list[TruncationRow]) -> str:
    head = ["weight", "rank", "ours", "SVD f64", "of it", "SVD f32", "of it", "equal entries"]
    lines = [
        [
            row.name,
            str(row.rank),
            f"{row.ours_s:.3f} s",
            f"{row.svd_float64_s:.3f} s",
            f"1/{row.svd_float64_s / row.ours_s:.1f}",
            f"{row.svd_float32_s:.3f} s",
            f"1/{row.svd_float32_s / row.ours_s:.1f}",
            f"{row.equal_entries:.3%}",
        ]
        for row in rows
    ]
    return table(head, lines)


def batch_table(row: BatchRow) -> str:
    head = ["weights", "one batch", "one by one", "svdvals f64"]
    times = (row.batch_s, row.one_by_one_s, row.svdvals_float64_s)
    return table(head, [[row.name, *(f"{seconds:.3f} s" for seconds in times)]])


def machine() -> dict[str, object]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Singular values and truncation against a full SVD.")
    parser.add_argument("--quick", action="store_true", help="smaller weights, a few seconds")
    parser.add_argument("--rounds", type=int, default=2, help="times each way runs; the best counts")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()

    about = machine()
    rate = MatmulRate(1024 if arguments.quick else 4096)
    spectra = measure_spectra(SMALL_BLOCK if arguments.quick else MISTRAL_BLOCK, arguments.rounds, rate)
    chosen = SMALL_TRUNCATIONS if arguments.quick else TRUNCATIONS
    truncations = [
        measure_truncation(shape, rank, arguments.rounds) for shape, ranks in chosen.items() for rank in ranks
    ]
    batch = measure_batch(arguments.rounds)
    rates = {str(dtype).removeprefix("torch."): round(best / 1e9, 1) for dtype, best in rate.best.items()}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"matrix product: {rates['float64']} GFLOP/s in float64, {rates['float32']} in float32\n")
    print(spectra_table(spectra), truncation_table(truncations), batch_table(batch), sep="\n\n")
    if arguments.json:
        content = {
            "machine": about,
            "matmul_gflops": rates,
            "spectra": [asdict(row) | {"share_of_floor": row.share_of_floor} for row in spectra],
            "truncations": [asdict(row) for row in truncations],
            "batch": asdict(batch),
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

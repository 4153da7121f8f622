"""Gram matrices of bfloat16 weights from float32 products, added up in float64: processor time and errors.

    python tests/benchmarks/gram.py [--shapes 3584x1024 1024x1024] [--rows 64 256 1024]

A product of two bfloat16 numbers is exact in float32; what is rounded are the sums, over so many rows at a time.
Processor time on one thread, so that other work on the machine counts less. Errors are those of the singular values,
relative to what the Gram matrix in float64 gives: the largest, and that of the lower quartile, which the
edge `iqr` uses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from spectra import table, trained_like
from torch import Tensor

from splaser_plugin.spectra.spectrum import _BLOCK_BYTES, _PANEL, _exponent, _gram, _scaled


def blocked_gram(matrix: Tensor, exponent: int, rows: int) -> Tensor:
    """Lower triangle in float64 from float32 products over `rows` rows at a time."""
    upright = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    short = upright.shape[1]
    gram = torch.zeros(short, short, dtype=torch.float64)
    for source in upright.split(max(1, _BLOCK_BYTES // (4 * short))):
        block = _scaled(source, exponent).float()
        for start in range(0, short, _PANEL):
            end = min(start + _PANEL, short)
            for part in block.split(rows):
                gram[start:end, :end] += part[:, start:end].mT @ part[:, :end]
    return gram


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description="Gram matrices from float32 products, added up in float64.")
    parser.add_argument("--shapes", nargs="+", default=["3584x1024", "1024x1024"], metavar="ROWSxCOLUMNS")
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 256, 1024], help="rows in one float32 sum")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        weight = trained_like(rows, columns)
        exponent = _exponent(weight)
        seconds, exact = timed(lambda: _gram(weight, exponent, torch.float64))  # noqa: B023
        expected = torch.linalg.eigvalsh(exact).clamp(min=0).sqrt()
        lines.append([shape, "float64", f"{seconds:.2f} s", "", ""])
        for count in arguments.rows:
            seconds, gram = timed(lambda: blocked_gram(weight, exponent, count))  # noqa: B023
            error = (torch.linalg.eigvalsh(gram).clamp(min=0).sqrt() / expected - 1).abs()
            quartile = float(error[len(error) // 4])
            lines.append(
                [shape, f"float32, {count}", f"{seconds:.2f} s", f"{float(error.max()):.0e}", f"{quartile:.0e}"]
            )
    print(table(["weight", "sums", "processor time", "largest error", "at the quartile"], lines))


if __name__ == "__main__":
    main()

"""Ways to reduce SmolLM2 at several budgets: loss on unseen text, bytes, seconds and memory.

    python tests/benchmarks/reduction.py --text FILE --measured FILE.jsonl [--methods NAME ...] [--budgets SHARE ...]
        [--calibration-tokens N] [--judged-tokens N] [--threads N]

The text's first half is what the reductions are calibrated on, its second half what they are judged on. Each row is
one model, measured once and kept in the file of measurements: run the command again to go on where it was stopped.
The statistics are kept beside it, in FILE.pt; both are for one text and one choice of tokens.
Ranks are `uniform` (each matrix loses the same share) or `allocated` over all matrices at once: by predicted nats for
`fisher`, by the share of the lost output or weight energy of the matrix for the others. `gauge` stores r (n + m - r)
numbers for a rank, the rest r (n + m). Bytes are those of the blocks' matrices in the model's dtype.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.data.windows import open_text
from splaser_plugin.reduction.allocation import Storage, allocate, curve, gauge_storage, plain_storage
from splaser_plugin.reduction.calibration import window_rows
from splaser_plugin.reduction.moments import Moments, measure
from splaser_plugin.reduction.truncation import Decomposition, decompose_by_moments, decompose_plainly
from splaser_plugin.scoring.perplexity import PerplexityScorer
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model
from splaser_plugin.weights.matrices import Matrix

ROOT = Path(__file__).parents[2]
WINDOW = 512


@dataclass(frozen=True)
class Method:
    """A row of the table at each budget."""

    reduce: str
    is_allocated: bool = True
    storage: Storage = plain_storage


METHODS = {
    "svd uniform": Method("svd", is_allocated=False),
    "svd allocated": Method("svd"),
    "whitened uniform": Method("whitened", is_allocated=False),
    "whitened allocated": Method("whitened"),
    "fisher allocated": Method("fisher"),
    "fisher allocated gauge": Method("fisher", storage=gauge_storage),
}


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


class Study:
    """SmolLM2, its statistics, and the text to judge on."""

    def __init__(self, text: str, statistics: Path, calibration_tokens: int, judged_tokens: int) -> None:
        self.statistics = statistics
        self.model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")
        self.weights = Weights(self.model)
        self.matrices = self.weights.matrices()[0]
        self.originals = {matrix: self.weights.read(matrix).clone() for matrix in self.matrices}
        self.dense = sum(math.prod(matrix.shape) for matrix in self.matrices)
        tokens = tokenizer("".join(open_text(text)), add_special_tokens=False, verbose=False)["input_ids"]
        half = len(tokens) // 2
        self.calibration = windows(tokens[:half], calibration_tokens)
        self.judge = PerplexityScorer(self.model, windows(tokens[half:], judged_tokens), batch_size=1)
        self.seconds: dict[str, float] = {}
        with self.timed("judging the base"):
            self.base = self.losses()
        self._moments: dict[Matrix, Moments] = {}
        self._decomposed: tuple[str, dict[Matrix, Decomposition]] = ("", {})

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started
        print(f"{stage}: {self.seconds[stage]:.0f} s", file=sys.stderr)

    def losses(self) -> np.ndarray:
        """Of each judged window, in nats a token."""
        return -np.array(self.judge.score(range(self.judge.size)).values)

    def decompositions(self, reduce: str) -> dict[Matrix, Decomposition]:
        if reduce != "svd" and not self._moments:
            if not self.statistics.exists():
                self._measure_moments()
            self._moments, self.seconds["statistics"] = torch.load(self.statistics, weights_only=False)
        if self._decomposed[0] != reduce:
            self._decomposed = ("", {})
            with self.timed(f"decomposition ({reduce})"):
                self._decomposed = (reduce, {matrix: self._decompose(matrix, reduce) for matrix in self.matrices})
        return self._decomposed[1]

    def _measure_moments(self) -> None:
        with self.timed("statistics"):
            found = dict(measure(self.weights, self.matrices, window_rows(self.calibration)))
        torch.save((found, self.seconds["statistics"]), self.statistics)

    def _decompose(self, matrix: Matrix, reduce: str) -> Decomposition:
        weight = self.originals[matrix]
        if reduce == "svd":
            return decompose_plainly(weight)
        return decompose_by_moments(weight, self._moments[matrix], with_gradients=reduce == "fisher")

    def measure(self, name: str, budget: float) -> Row:
        method = METHODS[name]
        found = self.decompositions(method.reduce)
        with self.timed("allocation"):
            ranks, predicted = self._ranks(found, method, budget)
        with self.timed("reduction"):
            for matrix, rank in ranks.items():
                self.weights.write(matrix, found[matrix].truncated(self.originals[matrix], rank))
        with self.timed("judging"):
            change = self.losses() - self.base
        for matrix in ranks:
            self.weights.write(matrix, self.originals[matrix])
        stored = sum(stored_numbers(matrix, rank, method.storage) for matrix, rank in ranks.items())
        stages = ["allocation", "reduction", f"decomposition ({method.reduce})"]
        stages += ["statistics"] if method.reduce != "svd" else []
        return Row(
            name,
            budget,
            1 - stored / self.dense,
            float(change.mean()),
            float(change.std(ddof=1) / math.sqrt(len(change))),
            predicted,
            stored * self.originals[self.matrices[0]].element_size(),
            {stage: round(self.seconds[stage], 2) for stage in stages},
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def _ranks(
        self, found: dict[Matrix, Decomposition], method: Method, budget: float
    ) -> tuple[dict[Matrix, int], float | None]:
        if not method.is_allocated:
            return {matrix: uniform_rank(matrix, method.storage, budget) for matrix in self.matrices}, None
        in_nats = method.reduce == "fisher"
        curves = [
            curve(matrix.shape, found[matrix].costs / (1 if in_nats else found[matrix].costs[0]), method.storage)
            for matrix in self.matrices
        ]
        allocation = allocate(curves, int((1 - budget) * self.dense))
        return dict(zip(self.matrices, allocation.ranks, strict=True)), allocation.cost if in_nats else None


def windows(tokens: Sequence[int], count: int) -> list[list[int]]:
    """Whole windows, evenly spaced over the tokens, of about `count` tokens together."""
    available = len(tokens) // WINDOW
    wanted = min(available, max(2, count // WINDOW))
    places = [available * place // wanted for place in range(wanted)]
    return [list(tokens[place * WINDOW : (place + 1) * WINDOW]) for place in places]


def stored_numbers(matrix: Matrix, rank: int, storage: Storage) -> int:
    return storage(*matrix.shape, rank) if rank < min(matrix.shape) else math.prod(matrix.shape)


def uniform_rank(matrix: Matrix, storage: Storage, budget: float) -> int:
    """The highest rank that stores at most the share of the matrix's own numbers that is to stay."""
    room = (1 - budget) * math.prod(matrix.shape)
    return max(rank for rank in range(1, min(matrix.shape)) if rank == 1 or storage(*matrix.shape, rank) <= room)


def read(path: Path) -> dict[tuple[str, float], Row]:
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row.method, row.budget): row for row in rows}


def table(rows: dict[tuple[str, float], Row]) -> str:
    budgets = sorted({budget for _, budget in rows})
    lines = [
        "| method | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " | seconds, all stages | peak GB |",
        "| --- |" + " ---: |" * (len(budgets) + 2),
    ]
    for name in METHODS:
        mine = [rows[name, budget] for budget in budgets if (name, budget) in rows]
        if not mine:
            continue
        found = [rows.get((name, budget)) for budget in budgets]
        cells = [f"{row.loss:+.4f} +- {row.standard_error:.4f}" if row else "" for row in found]
        seconds = max(sum(row.seconds.values()) for row in mine)
        peak = max(row.peak_bytes for row in mine)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} | {peak / 1e9:.1f} |")
    return "\n".join(lines)


def predictions(rows: dict[tuple[str, float], Row]) -> str:
    """Predicted cost against measured loss, with their rank correlation, where the cost is in nats."""
    found = [row for row in rows.values() if row.predicted is not None]
    if len(found) < 3:
        return f"predicted against measured: {len(found)} rows in nats so far, too few for a rank correlation"
    predicted, measured = [row.predicted for row in found], [row.loss for row in found]
    correlation = spearmanr(predicted, measured).statistic
    lines = [f"{row.method}, {row.budget:.0%}: {row.predicted:.4f} predicted, {row.loss:.4f} measured" for row in found]
    return "\n".join([*lines, f"rank correlation over {len(found)} rows: {correlation:.2f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways to reduce SmolLM2 at several budgets, as a table.")
    parser.add_argument("--text", required=True, help="UTF-8 file: one half to calibrate on, the other to judge on")
    parser.add_argument("--measured", type=Path, required=True, help="file that keeps the measurements")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.3], help="shares to remove")
    parser.add_argument("--calibration-tokens", type=int, default=12_288)
    parser.add_argument("--judged-tokens", type=int, default=8_192)
    parser.add_argument("--threads", type=int, help="threads of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    measured = read(arguments.measured)
    left = [
        (name, budget) for name in arguments.methods for budget in arguments.budgets if (name, budget) not in measured
    ]
    if left:
        statistics = arguments.measured.with_suffix(".pt")
        study = Study(arguments.text, statistics, arguments.calibration_tokens, arguments.judged_tokens)
    for name, budget in left:
        row = measured[name, budget] = study.measure(name, budget)
        with arguments.measured.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    print(table(measured))
    print(predictions(measured))


if __name__ == "__main__":
    main()

"""Statistics of the dense model against those taken again once it is reduced: loss on unseen text.

    python tests/benchmarks/measured_anew.py --text FILE --statistics FILE.pt [--budgets SHARE ...]
        [--calibration-tokens N] [--judged-tokens N] [--threads N]

A reduced model reads and says other things than the dense one that its statistics are of. Here the inputs and the
gradients of the reduced model, on the same tokens, weigh the dense model's matrices, which are truncated once more.
FILE.pt is what tests/benchmarks/reduction.py leaves.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.data.windows import open_text
from splaser_plugin.reduction.allocation import allocate, curve, gauge_storage
from splaser_plugin.reduction.calibration import window_rows
from splaser_plugin.reduction.moments import Moments, measure
from splaser_plugin.reduction.truncation import decompose_by_moments
from splaser_plugin.scoring.perplexity import PerplexityScorer
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model
from splaser_plugin.weights.matrices import Matrix
from tests.benchmarks.reduction import ROOT, windows
from tests.benchmarks.training import interval


class AsAtFirst(Weights):
    """Reads the weights as they were when it was made; the model computes with those of now."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._first = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def effective(self, name: str) -> Tensor:
        return self._first[name]


def reduce(weights: AsAtFirst, moments: Mapping[Matrix, Moments], budget: float) -> float:
    """Truncate the first weights by the moments. Returns the predicted cost, in nats a token."""
    found = {matrix: decompose_by_moments(weights.read(matrix), moments[matrix]) for matrix in moments}
    curves = [curve(matrix.shape, found[matrix].costs, gauge_storage) for matrix in found]
    allocation = allocate(curves, int((1 - budget) * sum(math.prod(matrix.shape) for matrix in found)))
    for matrix, rank in zip(found, allocation.ranks, strict=True):
        weights.write(matrix, found[matrix].truncated(weights.read(matrix), rank))
    return allocation.cost


def main() -> None:
    parser = argparse.ArgumentParser(description="Statistics of the dense model against those of the reduced one.")
    parser.add_argument("--text", required=True, help="UTF-8 file, the one that the statistics are of")
    parser.add_argument("--statistics", required=True, help="FILE.pt of tests/benchmarks/reduction.py")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2], help="shares to remove")
    parser.add_argument("--calibration-tokens", type=int, default=24_576, help="those of the statistics")
    parser.add_argument("--judged-tokens", type=int, default=8_192)
    parser.add_argument("--threads", type=int, help="threads of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")
    weights = AsAtFirst(model)
    moments, _ = torch.load(arguments.statistics, weights_only=False)
    tokens = tokenizer("".join(open_text(arguments.text)), add_special_tokens=False, verbose=False)["input_ids"]
    first, second = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    rows = window_rows(windows(first, arguments.calibration_tokens))
    judge = PerplexityScorer(model, windows(second, arguments.judged_tokens), batch_size=1)

    def losses() -> np.ndarray:
        return -np.array(judge.score(range(judge.size)).values)

    base = losses()
    print("| removed | statistics of | predicted | nats a token above the base | less the first row |")
    print("| --- | --- | ---: | ---: | --- |", flush=True)
    for budget in arguments.budgets:
        rows_of: list[np.ndarray] = []
        taken = moments
        for name in ("the dense model", "the model so reduced"):
            predicted = reduce(weights, taken, budget)
            rows_of.append(losses() - base)
            print(
                f"| {budget:.0%} | {name} | {predicted:.4f} | {rows_of[-1].mean():.4f} | {less(rows_of)} |", flush=True
            )
            if len(rows_of) == 1:
                taken = {
                    matrix: one for matrix, one in measure(weights, list(moments), rows) if isinstance(one, Moments)
                }


def less(rows: Sequence[np.ndarray]) -> str:
    """The last one less the first, with its 95 % interval over windows; empty for the first itself."""
    if len(rows) == 1:
        return ""
    change = rows[-1] - rows[0]
    low, high = interval(change)
    return f"{change.mean():+.4f} ({low:+.4f} to {high:+.4f})"


if __name__ == "__main__":
    main()

"""How far the predicted cost of a truncation is from the second order that it stands for, by module type, on SmolLM2.

    python tests/benchmarks/second_order.py --text FILE --statistics FILE.pt [--blocks N ...] [--windows N]

Every matrix of some blocks is truncated alone, to the rank of which 0.005 nats a token are predicted by the statistics
that tests/benchmarks/reduction.py left in FILE.pt, from the first half of the same text. The second order of one change
dW of a weight is 1/2 E[(g' dW x)^2] over tokens, with labels that are drawn from the model; the prediction takes a
token's input x and gradient g for independent. It is taken on windows of the first half, some of which the statistics
are of, and on windows of the second half. What is left between that and a measured divergence are the terms between
tokens and the higher orders.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.data.windows import open_text
from splaser_plugin.generation.evaluation import evaluating
from splaser_plugin.reduction.moments import Moments, draw
from splaser_plugin.reduction.products import Product, watching
from splaser_plugin.reduction.truncation import decompose_by_moments
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model
from splaser_plugin.weights.matrices import Matrix
from tests.benchmarks.reduction import ROOT, WINDOW, windows

COST = 0.005
"""Predicted of each truncation, in nats a token."""


@torch.no_grad()
def truncations(
    weights: Weights, moments: Mapping[Matrix, Moments], blocks: Sequence[int]
) -> dict[Matrix, tuple[Tensor, float]]:
    """The change of each matrix of the blocks, and what it is predicted to cost."""
    found = {}
    for matrix in moments:
        if matrix.block in blocks:
            weight = weights.read(matrix)
            decomposed = decompose_by_moments(weight, moments[matrix])
            rank = 1 + int(np.argmin(np.abs(decomposed.costs[1:-1] - COST)))
            found[matrix] = decomposed.truncated(weight, rank) - weight, float(decomposed.costs[rank])
    return found


def second_orders(
    weights: Weights, changes: Mapping[Matrix, Tensor], rows: Sequence[Sequence[int]]
) -> dict[Matrix, float]:
    """1/2 E[(g' dW x)^2] of each change, in nats a token."""
    squares: dict[Matrix, float] = defaultdict(float)

    def see(matrix: Matrix, product: Product) -> None:
        change = changes[matrix].mT if product.columns_are_inputs else changes[matrix]
        along = ((product.inputs @ change) * product.output_gradients).sum(1)
        squares[matrix] += float(along.double().square().sum())

    with watching(weights, list(changes), see), evaluating(weights.model):
        for place, row in enumerate(rows):
            logits = weights.model(torch.tensor([row])).logits[0]
            labels = draw(logits, torch.Generator().manual_seed(place))
            functional.cross_entropy(logits, labels, reduction="sum").backward()
    return {matrix: total / 2 / sum(map(len, rows)) for matrix, total in squares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted costs of truncations against their second order.")
    parser.add_argument("--text", required=True, help="UTF-8 file, the one that the statistics are of")
    parser.add_argument("--statistics", required=True, help="FILE.pt of tests/benchmarks/reduction.py")
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--windows", type=int, default=2, help=f"of each half, {WINDOW} tokens each")
    arguments = parser.parse_args()
    model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")
    weights = Weights(model)
    moments, _ = torch.load(arguments.statistics, weights_only=False)
    found = truncations(weights, moments, arguments.blocks)
    changes = {matrix: change for matrix, (change, _) in found.items()}
    tokens = tokenizer("".join(open_text(arguments.text)), add_special_tokens=False, verbose=False)["input_ids"]
    half, count = len(tokens) // 2, arguments.windows * WINDOW
    measured = [second_orders(weights, changes, windows(part, count)) for part in (tokens[:half], tokens[half:])]
    print("| module | second order over predicted, first half | second half |\n| --- | ---: | ---: |")
    for name in dict.fromkeys(matrix.type for matrix in found):
        ratios = [
            [totals[matrix] / cost for matrix, (_, cost) in found.items() if matrix.type == name] for totals in measured
        ]
        print(f"| {name} | " + " | ".join(", ".join(f"{ratio:.2f}" for ratio in part) for part in ratios) + " |")


if __name__ == "__main__":
    main()

"""Ranks by measured divergence against the predicted ones: SmolLM2, `fisher` in gauge storage at 10 %.

    python tests/benchmarks/ranks.py --text FILE --statistics FILE.pt --measured FILE.jsonl [--calibration-tokens N]
        [--groups kinds|depths] [--searched-tokens N] [--judged-tokens N] [--tries N] [--threads N]

The statistics are those that tests/benchmarks/reduction.py left, of so many tokens of the first half of the same text.
Two ways to better the ranks are measured on windows of that half that no statistics are of. A correction multiplies
each matrix's costs by its own second order over the predicted one (tests/benchmarks/second_order.py), at the predicted
ranks, and ranks are allotted again. A swap lets one group of matrices store some numbers more and another as many less;
within a group ranks are those of least predicted cost. Groups are the kinds, as all `q_proj`, or parts of the depth, of
five blocks each. Each first gets more at the cost of all others, which says what a number is worth there; then so many
swaps are tried, those of the largest difference in worth first, and each is kept that lowers the divergence (KL). One
that is kept is tried again. All ranks are judged on the second half. Each model is measured once and kept in the file,
and the options beside it in FILE.settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.data.windows import open_text
from splaser_plugin.reduction.allocation import allocate, curve, gauge_storage
from splaser_plugin.reduction.truncation import decompose_by_moments
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model
from splaser_plugin.weights.matrices import Matrix
from tests.benchmarks.reduction import ROOT, standard_error, stored_numbers, windows
from tests.benchmarks.reduction_rows import hold_to
from tests.benchmarks.second_order import second_orders
from tests.benchmarks.training import interval

Ranks = Mapping[Matrix, int]
BUDGET = 0.1
"""Share of the numbers to remove."""
LARGEST_CORRECTION = 4.0
"""Costs are multiplied by at most that, and divided by at most that."""
STEP = 0.002
"""Numbers that a swap moves, as a share of all there are."""


def depth(matrix: Matrix) -> str:
    """Its five blocks."""
    first = (matrix.block or 0) // 5 * 5
    return f"blocks {first} to {first + 4}"


GROUPS: Mapping[str, Callable[[Matrix], str]] = {"kinds": lambda matrix: matrix.type, "depths": depth}


class Study:
    """SmolLM2 with any ranks, and what these do to its predictions."""

    def __init__(self, text: str, statistics: Path, path: Path) -> None:
        self.path = path
        self.model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")
        self.weights = Weights(self.model)
        moments, _ = torch.load(statistics, weights_only=False)
        self.originals = {matrix: self.weights.read(matrix).clone() for matrix in moments}
        self.found = {matrix: decompose_by_moments(self.originals[matrix], moments[matrix]) for matrix in moments}
        self.curves = {matrix: curve(matrix.shape, one.costs, gauge_storage) for matrix, one in self.found.items()}
        self.dense = sum(math.prod(matrix.shape) for matrix in self.originals)
        tokens = tokenizer("".join(open_text(text)), add_special_tokens=False, verbose=False)["input_ids"]
        self.halves = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
        self.full: Ranks = {matrix: min(matrix.shape) for matrix in self.originals}
        self.ranks = self.full
        """Of the model as it is now."""
        self.base_logs: dict[int, Tensor] = {}
        self.divergences: dict[str, np.ndarray] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            name, values = json.loads(line)
            self.divergences[name] = np.array(values)

    def corrected(self, ranks: Ranks, searched: Sequence[Sequence[int]]) -> Ranks:
        """As many numbers as these ranks store, by costs that hold at these ranks to the second order measured."""
        changed = {matrix: rank for matrix, rank in ranks.items() if rank < self.full[matrix]}
        self.bring_to(self.full)
        changes = {
            matrix: self.found[matrix].truncated(self.originals[matrix], rank) - self.originals[matrix]
            for matrix, rank in changed.items()
        }
        curves = dict(self.curves)
        for matrix, measured in second_orders(self.weights, changes, searched).items():
            costs = self.found[matrix].costs
            ratio = np.clip(measured / costs[changed[matrix]], 1 / LARGEST_CORRECTION, LARGEST_CORRECTION)
            curves[matrix] = curve(matrix.shape, costs * ratio, gauge_storage)
        return dict(zip(ranks, allocate(list(curves.values()), stored(ranks)).ranks, strict=True))

    def allotted(self, matrices: Sequence[Matrix], numbers: int) -> Ranks:
        """The ranks of least predicted cost for these matrices that store at most so many numbers."""
        return dict(zip(matrices, allocate([self.curves[matrix] for matrix in matrices], numbers).ranks, strict=True))

    def bring_to(self, ranks: Ranks) -> None:
        for matrix, rank in ranks.items():
            if rank != self.ranks[matrix]:
                self.weights.write(matrix, self.found[matrix].truncated(self.originals[matrix], rank))
        self.ranks = dict(ranks)

    @torch.no_grad()
    def logs(self, window: Sequence[int]) -> Tensor:
        return self.model(torch.tensor([window])).logits[0].log_softmax(-1)

    def divergence(self, ranks: Ranks, searched: Sequence[Sequence[int]]) -> np.ndarray:
        """KL(model || model with these ranks) on each window, in nats a token."""
        name = " ".join(map(str, ranks.values()))
        if name not in self.divergences:
            if not self.base_logs:
                self.bring_to(self.full)
                self.base_logs = {place: self.logs(window) for place, window in enumerate(searched)}
            self.bring_to(ranks)
            values = [kl(self.base_logs[place], self.logs(window)) for place, window in enumerate(searched)]
            self.divergences[name] = np.array(values)
            with self.path.open("a") as file:
                file.write(json.dumps([name, values]) + "\n")
        return self.divergences[name]

    def judge(self, models: Sequence[Ranks], judged: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Divergence, and loss above the base's, of each model on each window: (models, windows)."""
        divergences, losses = np.zeros((2, len(models), len(judged)))
        self.bring_to(self.full)
        bases = [self.logs(window) for window in judged]
        for one, ranks in enumerate(models):
            self.bring_to(ranks)
            for place, (base, window) in enumerate(zip(bases, judged, strict=True)):
                logs = self.logs(window)
                divergences[one, place] = kl(base, logs)
                losses[one, place] = mean_loss(logs, window) - mean_loss(base, window)
        return divergences, losses


def kl(base: Tensor, logs: Tensor) -> float:
    return float(functional.kl_div(logs, base, log_target=True, reduction="sum")) / len(logs)


def mean_loss(logs: Tensor, window: Sequence[int]) -> float:
    return float(functional.nll_loss(logs[:-1], torch.tensor(window[1:])))


def stored(ranks: Ranks) -> int:
    return sum(stored_numbers(matrix, rank, gauge_storage) for matrix, rank in ranks.items())


def moved(study: Study, ranks: Ranks, more: Sequence[Matrix], less: Sequence[Matrix], numbers: int) -> Ranks:
    """Ranks with which the matrices `more` store so many numbers more, and `less` as many less."""
    grown = study.allotted(more, stored({matrix: ranks[matrix] for matrix in more}) + numbers)
    room = stored({matrix: ranks[matrix] for matrix in (*more, *less)})
    return {**ranks, **grown, **study.allotted(less, room - stored(grown))}


def climb(
    study: Study, ranks: Ranks, group_of: Callable[[Matrix], str], tries: int, searched: Sequence[Sequence[int]]
) -> Ranks:
    """The ranks after the swaps between groups that lower the divergence on the windows."""
    numbers = int(STEP * study.dense)
    groups: dict[str, list[Matrix]] = {}
    for matrix in ranks:
        groups.setdefault(group_of(matrix), []).append(matrix)
    before = study.divergence(ranks, searched)
    print(f"\nSwaps of {numbers:,} numbers between {len(groups)} groups, from {before.mean():.4f} nats a token:")
    worth = {}
    for name, more in groups.items():
        others = [matrix for matrix in ranks if group_of(matrix) != name]
        change = study.divergence(moved(study, ranks, more, others, numbers), searched) - before
        worth[name] = -change.mean()
        print(f"{name} more, all others less: {change.mean():+.5f} +- {standard_error(change):.5f}", flush=True)
    pairs = sorted(itertools.permutations(groups, 2), key=lambda pair: worth[pair[1]] - worth[pair[0]])
    while tries and pairs:
        gains, loses = pairs[0]
        swapped = moved(study, ranks, groups[gains], groups[loses], numbers)
        tries -= 1
        change = study.divergence(swapped, searched) - study.divergence(ranks, searched)
        is_kept = change.mean() < 0
        outcome = ", kept" if is_kept else ""
        print(f"{gains} more, {loses} less: {change.mean():+.5f} +- {standard_error(change):.5f}{outcome}", flush=True)
        if is_kept:
            ranks = swapped
        else:
            del pairs[0]
    return ranks


def main() -> None:
    parser = argparse.ArgumentParser(description="Ranks by measured divergence against those predicted.")
    parser.add_argument("--text", required=True, help="UTF-8 file, the one that the statistics are of")
    parser.add_argument("--statistics", required=True, help="FILE.pt of tests/benchmarks/reduction.py")
    parser.add_argument("--measured", type=Path, required=True, help="file that keeps the divergences")
    parser.add_argument("--calibration-tokens", type=int, default=24_576, help="those of the statistics")
    parser.add_argument("--groups", choices=GROUPS, default="kinds", help="what swaps are between")
    parser.add_argument("--searched-tokens", type=int, default=2_048)
    parser.add_argument("--judged-tokens", type=int, default=8_192)
    parser.add_argument("--tries", type=int, default=5, help="swaps to try")
    parser.add_argument("--threads", type=int, help="threads of torch")
    arguments = parser.parse_args()
    names = ("text", "statistics", "calibration_tokens", "searched_tokens")
    hold_to(", ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in names), arguments.measured)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    study = Study(arguments.text, arguments.statistics, arguments.measured)
    first, second = study.halves
    calibrated = windows(first, arguments.calibration_tokens)
    spare = [window for window in windows(first, len(first)) if window not in calibrated]
    searched = windows(list(itertools.chain(*spare)), arguments.searched_tokens)
    started = time.monotonic()
    start = study.allotted(list(study.originals), int((1 - BUDGET) * study.dense))
    models = {
        "as predicted": start,
        "corrected": study.corrected(start, searched),
        "after the swaps": climb(study, start, GROUPS[arguments.groups], arguments.tries, searched),
    }
    print(f"\n{len(study.divergences)} models measured, {time.monotonic() - started:.0f} s in this run")
    divergences, losses = study.judge(list(models.values()), windows(second, arguments.judged_tokens))
    found = np.array([study.divergence(ranks, searched) for ranks in models.values()])
    measured = {
        "divergence, windows searched on": found,
        "divergence, judged": divergences,
        "loss above the base's, judged": losses,
    }
    print("\n| ranks | numbers | " + " | ".join(measured) + " |\n| --- | ---: |" + " ---: |" * len(measured))
    for place, (name, ranks) in enumerate(models.items()):
        cells = [f"{values[place].mean():.4f}{against(values[place] - values[0])}" for values in measured.values()]
        print(f"| {name} | {stored(ranks):,} | " + " | ".join(cells) + " |")


def against(changes: np.ndarray) -> str:
    """The mean change from the predicted ranks with its 95 % interval over windows, where there is one."""
    if not changes.any():
        return ""
    low, high = interval(changes)
    return f"; {changes.mean():+.4f} ({low:+.4f} to {high:+.4f})"


if __name__ == "__main__":
    main()

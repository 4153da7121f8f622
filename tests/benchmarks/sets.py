"""One candidate after the other against sets of them, at equal tokens: SmolLM2, its margin on the example pairs.

    python tests/benchmarks/sets.py --measured FILE.jsonl [--runs N] [--searched N] [--judged N] [--threads N]

The matrices of lowest snr are the candidates, one fewer than runs, each at its iqr rank. Three ways to choose:
- `greedy`: one after the other, kept where the mean margin of the pairs searched on rises.
- `screening`: as many models as runs, in each of which another half of the candidates is reduced (a Hadamard matrix). A
  candidate's effect is the mean of the models with it less that of those without. All candidates with an effect above
  0, or above its standard error, are reduced together, and confirmed: kept where the margin rises of pairs that these
  models didn't see. So that it scores no more pairs than `greedy`, it explores on fewer.
- `zero sum`: components of the same matrices, the smallest predicted effects on the margin first, their running sum
  held at 0 (ZS-SVD, arXiv 2602.02848): as many as a model of the screening loses on average. The gradients are of the
  pairs searched on, so that it takes far fewer tokens; confirmed in the same way.
All are judged on the first pairs of examples/data/held_out.jsonl. Each model is measured once and kept in the file, and
the options beside it in FILE.settings: run the command again to go on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.scanning.scan import matrix_scan
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.search.prediction import sensitivities
from splaser_plugin.spectra.spectrum import components, singular_values, truncate
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import context_length, load_model
from splaser_plugin.weights.matrices import Matrix
from tests.benchmarks.reduction_rows import hold_to
from tests.benchmarks.training import interval

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"


class Study:
    """SmolLM2, the candidates, and the margins of every model that was measured."""

    def __init__(self, path: Path, runs: int, searched: int, judged: int) -> None:
        self.path, self.runs = path, runs
        model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")
        self.weights = Weights(model)
        pairs = load_pairs(DATA / "pairs.jsonl").pairs
        prompter = Prompter(tokenizer, context=context_length(model))
        self.scorers = {
            name: MarginScorer(model, prompter, chosen, batch_size=16)
            for name, chosen in (
                ("searched", pairs[:searched]),
                ("confirmed", pairs[searched : 2 * searched]),
                ("held out", load_pairs(DATA / "held_out.jsonl").pairs[:judged]),
            )
        }
        scans = [(matrix, matrix_scan(matrix, singular_values(self.weights.read(matrix)))) for matrix in
                 self.weights.matrices()[0]]  # fmt: skip
        edges = [(matrix, found.edges["iqr"]) for matrix, found in scans if found.edges["iqr"].snr is not None]
        edges.sort(key=lambda entry: entry[1].snr or 0.0)
        self.ranks = {matrix: max(1, edge.rank) for matrix, edge in edges[: runs - 1]}
        self.matrices = list(self.ranks)
        self.originals = {matrix: self.weights.read(matrix).clone() for matrix in self.matrices}
        self.dropped = sum(min(matrix.shape) - rank for matrix, rank in self.ranks.items())
        self.margins: dict[tuple[str, str], np.ndarray] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            name, pairs_of, values = json.loads(line)
            self.margins[name, pairs_of] = np.array(values)

    def measured(self, name: str, pairs_of: str, changed: Mapping[Matrix, Tensor]) -> np.ndarray:
        """Margin of each pair with these weights in place of the model's own."""
        if (name, pairs_of) not in self.margins:
            for matrix, weight in changed.items():
                self.weights.write(matrix, weight)
            scorer = self.scorers[pairs_of]
            self.margins[name, pairs_of] = np.array(scorer.score(range(scorer.size)).values)
            for matrix in changed:
                self.weights.write(matrix, self.originals[matrix])
            with self.path.open("a") as file:
                file.write(json.dumps([name, pairs_of, self.margins[name, pairs_of].tolist()]) + "\n")
        return self.margins[name, pairs_of]

    def change(self, places: Sequence[int], pairs_of: str) -> np.ndarray:
        """Of each pair's margin, with these candidates reduced."""
        matrices = [self.matrices[place] for place in sorted(places)]
        changed = {matrix: truncate(self.originals[matrix], self.ranks[matrix]) for matrix in matrices}
        name = ",".join(str(place) for place in sorted(places))
        return self.measured(name, pairs_of, changed) - self.measured("", pairs_of, {})


def shown(changes: np.ndarray) -> str:
    low, high = interval(changes)
    return f"{changes.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def greedy(study: Study) -> list[int]:
    kept: list[int] = []
    best = 0.0
    for place in range(len(study.matrices)):
        change = study.change([*kept, place], "searched").mean()
        if change > best:
            kept, best = [*kept, place], change
    return kept


def effects(study: Study, explored: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each candidate, with its standard error over the pairs explored on."""
    design = hadamard(study.runs)[:, 1:]
    runs = [study.change(np.flatnonzero(signs < 0).tolist(), "searched")[:explored] for signs in design]
    of_pairs = -(design.T @ np.array(runs)) / (study.runs / 2)
    return of_pairs.mean(1), of_pairs.std(1, ddof=1) / explored**0.5


def zero_sum(study: Study) -> dict[Matrix, Tensor]:
    """The candidates without the components whose predicted effects are smallest and add up to nothing."""
    found = sensitivities(study.weights, study.scorers["searched"], study.matrices)
    gains = np.concatenate([-found[matrix].slopes.mean(0) for matrix in study.matrices])
    owners = np.concatenate([np.full(min(matrix.shape), place) for place, matrix in enumerate(study.matrices)])
    places = np.concatenate([np.arange(min(matrix.shape)) for matrix in study.matrices])
    order = np.argsort(np.abs(gains))
    rising, falling = list(order[gains[order] >= 0]), list(order[gains[order] < 0])
    total, chosen = 0.0, []
    while len(chosen) < study.dropped // 2:
        take = (rising if total <= 0 and rising else falling or rising).pop(0)
        total += gains[take]
        chosen.append(take)
    changed = {}
    for place, matrix in enumerate(study.matrices):
        weight = study.originals[matrix]
        basis = components(weight)[1][:, [int(places[one]) for one in chosen if owners[one] == place]].to(weight)
        on_columns = weight.shape[0] >= weight.shape[1]
        changed[matrix] = weight - (weight @ basis @ basis.mT if on_columns else basis @ (basis.mT @ weight))
    print(f"zero sum: {len(chosen)} of {len(gains)} components, predicted {total:+.5f}")
    return changed


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Greedy search against sets of candidates, on SmolLM2's margin.")
    parser.add_argument("--measured", type=Path, required=True, help="file that keeps the measurements")
    parser.add_argument("--runs", type=int, default=16, choices=(4, 8, 16, 32), help="models of the screening")
    parser.add_argument("--searched", type=int, default=24, help="pairs to search on, and as many to confirm on")
    parser.add_argument("--judged", type=int, default=96, help="held-out pairs")
    parser.add_argument("--threads", type=int, help="threads of torch")
    arguments = parser.parse_args(words)
    names = ("runs", "searched", "judged")
    hold_to(", ".join(f"--{name} {getattr(arguments, name)}" for name in names), arguments.measured)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runs = arguments.runs
    study = Study(arguments.measured, runs, arguments.searched, arguments.judged)
    print(f"{len(study.matrices)} candidates, which lose {study.dropped} components in all", file=sys.stderr)
    kept = greedy(study)
    held = study.change(kept, "held out")
    print(f"greedy keeps {kept}: searched {shown(study.change(kept, 'searched'))}, held out {shown(held)}")
    explored = arguments.searched - 2 * arguments.searched // runs
    effect, error = effects(study, explored)
    print("effects: " + ", ".join(f"{one:+.4f} +- {of:.4f}" for one, of in zip(effect, error, strict=True)))
    for title, least in (("0", 0 * error), ("its standard error", error)):
        picks = np.flatnonzero(effect > least).tolist()
        if not picks:
            print(f"screening, above {title}: none")
            continue
        there = study.change(picks, "held out")
        print(
            f"screening, above {title}: {picks}, predicted {effect[picks].sum():+.4f}, confirmed "
            f"{shown(study.change(picks, 'confirmed'))}, held out {shown(there)}, less greedy "
            f"{shown(there - held)}"
        )
    changed = zero_sum(study)
    confirmed, there = (
        study.measured("zero sum", pairs_of, changed) - study.measured("", pairs_of, {})
        for pairs_of in ("confirmed", "held out")
    )
    print(f"zero sum: confirmed {shown(confirmed)}, held out {shown(there)}, less greedy {shown(there - held)}")
    print(
        f"pairs scored: greedy {runs * arguments.searched}; screening {runs * explored + 2 * arguments.searched}; zero "
        f"sum {arguments.searched} gradients and {2 * arguments.searched}"
    )


if __name__ == "__main__":
    main()

"""Which ordering of truncations predicts best what they do: SmolLM2, the example pairs, as a table.

    python tests/benchmarks/ranking.py [--depths 10] [--ranks 2] [--pairs 12] [--tokens 24] [--measured FILE]
        [--statistics FILE.pt] [--only-others]

Every type of matrix at evenly spaced depths is truncated alone, each to one of several ranks, all in turn. What it does
to the mean margin is measured on some of the pairs that the gradient was taken from, and on others; with --tokens also
what it does to the score of the model's own answers to those others. --measured keeps the measurements, a line each, so
that a stopped run goes on, with the pairs and statistics beside it in FILE.settings; what is predicted is computed anew
each time. With --statistics, those that tests/benchmarks/reduction.py has left, truncations are those of `--reduce
fisher`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from splaser_plugin.cli.demo import prepare_embedder, prepare_model
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.jobs.stages import GRADIENT_PAIRS
from splaser_plugin.reduction.measured_reducer import MeasuredReducer
from splaser_plugin.reduction.truncation import decompose_by_moments
from splaser_plugin.scanning.scan import MatrixScan, matrix_scan
from splaser_plugin.scoring.embedding import SentenceEmbedder
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.scoring.scores import Scorer
from splaser_plugin.scoring.semantic import SemanticScorer
from splaser_plugin.search.prediction import sensitivities
from splaser_plugin.spectra.spectrum import singular_values
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import context_length, load_model
from splaser_plugin.weights.matrices import Matrix
from tests.benchmarks.reduction_rows import hold_to

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"
REACH_WEIGHTS = {
    "output lost": (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "nats": (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
}
"""What c is chosen from, for each way to say how far a truncation reaches."""
SCORERS = {"seen": "margin, pairs seen", "unseen": "margin, other pairs", "answers": "answers to other pairs"}
SNR = "snr, lowest first"
PRODUCT = "--rank-by gradient"
"""What the product orders by where matrices are reduced by their statistics: its c was chosen on no truncations."""
PLAIN = "that of plain truncations"
"""What `--rank-by gradient` goes by where matrices are reduced by their own spectrum."""
RANKS = ("iqr", 0.5, "mp", 0.25, 0.1)


class Study:
    """SmolLM2, its scorers, and the truncations to look at."""

    def __init__(self, pairs: int, tokens: int, depths: int, statistics: Path | None, *, seen: bool) -> None:
        self.model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")
        self.weights = Weights(self.model)
        prompter = Prompter(tokenizer, context=context_length(self.model))
        used = load_pairs(DATA / "pairs.jsonl", samples=max(pairs, GRADIENT_PAIRS)).pairs
        unseen = load_pairs(DATA / "held_out.jsonl", samples=pairs).pairs
        self.gradient = MarginScorer(self.model, prompter, used, batch_size=8)
        self.margins = {"unseen": MarginScorer(self.model, prompter, unseen, batch_size=8)}
        if seen:
            self.margins = {"seen": MarginScorer(self.model, prompter, used[:pairs], batch_size=8), **self.margins}
        self.answers: dict[str, Scorer] = {}
        if tokens:
            embedder = SentenceEmbedder(str(prepare_embedder()), torch.device("cpu"))
            generator = Generator(self.model, prompter, max_new_tokens=tokens, batch_size=32)
            self.answers["answers"] = SemanticScorer(generator, embedder, unseen)
        blocks = {matrix.block for matrix in self.weights.matrices()[0] if matrix.block is not None}
        chosen = {round(place * max(blocks) / (depths - 1)) for place in range(depths)}
        self.matrices = [matrix for matrix in self.weights.matrices()[0] if matrix.block in chosen]
        self.scans = {
            matrix: matrix_scan(matrix, singular_values(self.weights.read(matrix))) for matrix in self.matrices
        }

        self.reducer = self._reducer(statistics) if statistics else None
        self.reach = "nats" if statistics else "output lost"
        """How far a truncation reaches, by its name in the tables."""
        self.product = PRODUCT if statistics else "gradient - 2 SE - c output lost"
        """The ordering that stands for `--rank-by gradient`; of plain truncations c was chosen by this benchmark."""

    def _reducer(self, statistics: Path) -> MeasuredReducer:
        moments = torch.load(statistics, weights_only=False)[0]
        reducer = MeasuredReducer(self.matrices, is_in_nats=True)
        for matrix in self.matrices:
            reducer.add(matrix, decompose_by_moments(self.weights.read(matrix), moments[matrix]))
        self.weights.reducer = reducer
        return reducer

    def edits(self, ranks: int) -> list[tuple[Matrix, int]]:
        """Every matrix at some of the ranks, in turn, so that each type meets each rank; block by block."""
        types = sorted({matrix.type for matrix in self.matrices})
        blocks = sorted({matrix.block for matrix in self.matrices if matrix.block is not None})
        edits = []
        for place, block in enumerate(blocks):
            for matrix in self.matrices:
                if matrix.block == block:
                    first = types.index(matrix.type) + place
                    chosen = [RANKS[(first + 2 * turn) % len(RANKS)] for turn in range(ranks)]
                    edits += [
                        (matrix, rank) for rank in dict.fromkeys(rank_at(self.scans[matrix], step) for step in chosen)
                    ]
        return edits

    def measure(self, scorers: Mapping[str, Scorer]) -> dict[str, list[float]]:
        """Score of each pair by each of these scorers."""
        return {name: list(scorer.score(range(scorer.size)).values) for name, scorer in scorers.items()}


def rank_at(found: MatrixScan, step: str | float) -> int:
    if isinstance(step, str):
        return max(1, found.edges[step].rank)
    return max(1, round(step * min(found.shape)))


class Replay(nn.Module):
    """In the place of the embeddings: what was recorded, one batch after the other, again and again."""

    def __init__(self, recorded: list[torch.Tensor]) -> None:
        super().__init__()
        self.recorded = recorded
        self.turn = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        return self.recorded[(self.turn - 1) % len(self.recorded)]


@contextmanager
def starting_at(study: Study, block: int) -> Iterator[None]:
    """Inside, margins are computed from this block on, with what came out of the blocks before."""
    model = study.model.model
    recorded: list[torch.Tensor] = []
    handle = model.layers[block].register_forward_pre_hook(lambda module, inputs: recorded.append(inputs[0]))
    study.measure(study.margins)
    handle.remove()
    layers, embeddings = model.layers, model.embed_tokens
    model.layers, model.embed_tokens = layers[block:], Replay(recorded)
    try:
        yield
    finally:
        model.layers, model.embed_tokens = layers, embeddings


class Measured:
    """What is measured of each truncation, by name and rank; name "" is the model as it is."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.scores: dict[tuple[str, int], dict[str, list[float]]] = {}
        for line in path.read_text().splitlines() if path and path.exists() else ():
            name, rank, scores = json.loads(line)
            self.scores.setdefault((name, rank), {}).update(scores)

    def add(self, name: str, rank: int, scores: dict[str, list[float]]) -> None:
        self.scores.setdefault((name, rank), {}).update(scores)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps([name, rank, scores]) + "\n")

    def lacks(self, name: str, rank: int, scorers: Iterable[str]) -> bool:
        return not self.scores.get((name, rank), {}).keys() >= set(scorers)


def measure_edits(study: Study, edits: Sequence[tuple[Matrix, int]], measured: Measured) -> None:
    """Measure what is not measured yet: the margins first, block by block, then the answers."""
    for scorers in (study.margins, study.answers):
        if measured.lacks("", 0, scorers):
            measured.add("", 0, study.measure(scorers))
        left = [edit for edit in edits if measured.lacks(edit[0].name, edit[1], scorers)]
        for block in dict.fromkeys(matrix.block for matrix, _ in left):
            started = time.monotonic()
            with starting_at(study, block or 0) if scorers is study.margins else nullcontext():
                for matrix, rank in left:
                    if matrix.block != block:
                        continue
                    with study.weights.trying(matrix) as attempt:
                        attempt.reduce(rank)
                        measured.add(matrix.name, rank, study.measure(scorers))
            print(f"block {block}: {', '.join(scorers)}: {time.monotonic() - started:.0f} s", file=sys.stderr)


def predict(study: Study, edits: Sequence[tuple[Matrix, int]]) -> dict[str, np.ndarray]:
    """What each ordering goes by, one number a truncation, higher is tried first."""
    started = time.monotonic()
    found = sensitivities(study.weights, study.gradient, study.matrices, reducer=study.reducer)
    print(f"gradients of {len(found)} matrices: {time.monotonic() - started:.0f} s", file=sys.stderr)
    plain = sensitivities(study.weights, study.gradient, study.matrices) if study.reducer else {}

    def of_all(number: Callable[[Matrix, int], float]) -> np.ndarray:
        return np.array([number(matrix, rank) for matrix, rank in edits])

    def reach(matrix: Matrix, rank: int) -> float:
        return float(study.reducer.costs[matrix][rank]) if study.reducer else found[matrix].output_lost(rank)

    first_order = of_all(lambda matrix, rank: found[matrix].first_order(rank))
    return {
        SNR: of_all(lambda matrix, rank: -(study.scans[matrix].edges["iqr"].snr or np.inf)),
        "share of components kept": of_all(lambda matrix, rank: rank / min(matrix.shape)),
        study.reach: -of_all(reach),
        "gradient": first_order,
        "gradient - 2 SE": first_order - 2 * of_all(lambda matrix, rank: found[matrix].standard_error(rank)),
        **{
            name: of_all(lambda matrix, rank, of=of: of[matrix].predicted(rank))
            for name, of in ((PRODUCT, found), (PLAIN, plain))
            if study.reducer
        },
    }


def with_reach(predicted: dict[str, np.ndarray], reach: str, change: np.ndarray, fit: np.ndarray) -> dict[str, float]:
    """Take c times the reach off the gradients; returns the c with which each ranks the truncations `fit` best."""
    weights = {}
    for name in ("gradient", "gradient - 2 SE"):
        sums = {c: predicted[name] + c * predicted[reach] for c in REACH_WEIGHTS[reach]}
        best = max(sums, key=lambda c: rank_correlation(sums[c][fit], change[fit]))
        predicted[f"{name} - c {reach}"] = sums[best]
        weights[name] = best
    return weights


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's."""
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equals share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def interval(
    first: np.ndarray, second: np.ndarray, against: np.ndarray | None = None, resamples: int = 2000
) -> tuple[float, float]:
    """95 % bootstrap interval, over truncations, of the rank correlation, or of how much it is above another's."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        drawn = random.integers(len(first), size=len(first))
        other = 0.0 if against is None else rank_correlation(against[drawn], second[drawn])
        found.append(rank_correlation(first[drawn], second[drawn]) - other)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def report(study: Study, edits: Sequence[tuple[Matrix, int]], measured: Measured) -> str:
    base = measured.scores["", 0]
    changes = {
        scorer: np.array(
            [np.mean(np.subtract(measured.scores[matrix.name, rank][scorer], base[scorer])) for matrix, rank in edits]
        )
        for scorer in base
    }
    predicted = predict(study, edits)
    blocks = sorted({matrix.block for matrix, _ in edits if matrix.block is not None})
    judged = np.array([blocks.index(matrix.block or 0) % 2 == 1 for matrix, _ in edits])
    weights = with_reach(predicted, study.reach, changes["unseen"], ~judged)
    chosen = ", ".join(f"{c:g} for {name}" for name, c in weights.items())
    lines = [
        f"{len(edits)} truncations; c was chosen on the {int((~judged).sum())} at depths {blocks[::2]}: {chosen}.",
        *table(predicted, changes, np.full(len(edits), True), f"All {len(edits)} truncations"),
        *table(predicted, changes, judged, f"The {int(judged.sum())} at depths {blocks[1::2]}"),
    ]
    compared, where = (np.full(len(edits), True), "Over all") if study.reducer else (judged, "There")
    first, change = predicted[study.product][compared], changes["unseen"][compared]
    for name in (SNR, PLAIN) if study.reducer else (SNR,):
        second = predicted[name][compared]
        above = rank_correlation(first, change) - rank_correlation(second, change)
        low, high = interval(first, change, second)
        found = f"{above:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(f"\n{where}, on other pairs, '{study.product}' is above '{name}' by {found}.")
    return "\n".join(lines)


def table(
    predicted: dict[str, np.ndarray], changes: dict[str, np.ndarray], some: np.ndarray, title: str
) -> Iterator[str]:
    """Rank correlation with each change, and what the first ten by each ordering do to it on average."""
    yield f"\n{title}:\n"
    yield "| ordering | " + " | ".join(f"{SCORERS[scorer]} | first ten" for scorer in changes) + " |"
    yield "| --- |" + " ---: | ---: |" * len(changes)
    for name, values in predicted.items():
        cells = []
        for change in changes.values():
            low, high = interval(values[some], change[some])
            first = np.argsort(-values[some], kind="stable")[:10]
            cells.append(f"{rank_correlation(values[some], change[some]):+.2f} ({low:+.2f} to {high:+.2f})")
            cells.append(f"{change[some][first].mean():+.3f}")
        yield f"| {name} | " + " | ".join(cells) + " |"
    means = " | ".join(f" | {change[some].mean():+.3f}" for change in changes.values())
    yield f"| all, for comparison | {means} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Which ordering of truncations predicts best what they do.")
    parser.add_argument("--depths", type=int, default=10, help="blocks to look at, evenly spaced")
    parser.add_argument(
        "--ranks", type=int, default=2, choices=range(1, 6), help="how many of the ranks for each matrix"
    )
    parser.add_argument("--pairs", type=int, default=12, help="pairs to measure on, of those seen and of others")
    parser.add_argument("--only-others", action="store_true", help="measure on the other pairs alone")
    parser.add_argument("--tokens", type=int, default=24, help="longest own answer, in tokens; 0 for none")
    parser.add_argument("--measured", type=Path, help="file that keeps the measurements")
    parser.add_argument("--statistics", type=Path, help="FILE.pt that tests/benchmarks/reduction.py has left")
    parser.add_argument("--threads", type=int, help="threads of torch")
    arguments = parser.parse_args()
    if arguments.measured:
        hold_to(f"--pairs {arguments.pairs}, --statistics {arguments.statistics}", arguments.measured)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    study = Study(
        arguments.pairs, arguments.tokens, arguments.depths, arguments.statistics, seen=not arguments.only_others
    )
    measured = Measured(arguments.measured)
    edits = study.edits(arguments.ranks)
    measure_edits(study, edits, measured)
    print(report(study, edits, measured))


if __name__ == "__main__":
    main()

"""Which ordering of truncations predicts best what they do: SmolLM2, the example pairs, as a table.

    python tests/benchmarks/ranking.py [--depths 10] [--pairs 12] [--tokens 24] [--measured FILE] [--threads N]

Every type of matrix at evenly spaced depths is truncated alone, each to one rung of a ladder, all rungs in turn. What
it does to the mean margin is measured on some of the pairs that the gradient was taken from, and on others; with
--tokens also what it does to the score of the model's own answers to those others. --measured keeps the measurements,
a line each, so that a stopped run goes on; what is predicted is computed anew each time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from splaser_plugin.demo import prepare_embedder, prepare_model
from splaser_plugin.embedding import SentenceEmbedder
from splaser_plugin.generation import Generator
from splaser_plugin.jobs import GRADIENT_PAIRS
from splaser_plugin.loading import context_length, load_model
from splaser_plugin.margin import MarginScorer
from splaser_plugin.matrices import Matrix
from splaser_plugin.pairs import load_pairs
from splaser_plugin.prompts import Prompter
from splaser_plugin.scan import MatrixScan, matrix_scan
from splaser_plugin.scoring import Scorer, SemanticScorer
from splaser_plugin.spectrum import singular_values
from splaser_plugin.weights import Weights

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"
LADDER = ("iqr", 0.5, "mp", 0.25, 0.1)


class Study:
    """SmolLM2, its rulers, and the truncations to look at."""

    def __init__(self, pairs: int, tokens: int, depths: int) -> None:
        self.model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")
        self.weights = Weights(self.model)
        prompter = Prompter(tokenizer, context=context_length(self.model))
        used = load_pairs(DATA / "pairs.jsonl", samples=max(pairs, GRADIENT_PAIRS)).pairs
        unseen = load_pairs(DATA / "held_out.jsonl", samples=pairs).pairs
        self.gradient = MarginScorer(self.model, prompter, used, batch_size=8)
        self.margins = {
            "seen": MarginScorer(self.model, prompter, used[:pairs], batch_size=8),
            "unseen": MarginScorer(self.model, prompter, unseen, batch_size=8),
        }
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

    def edits(self) -> list[tuple[Matrix, int]]:
        """Every matrix, each with the rank of one rung, so that each type meets each rung."""
        types = sorted({matrix.type for matrix in self.matrices})
        blocks = sorted({matrix.block for matrix in self.matrices if matrix.block is not None})
        return [
            (matrix, rung_rank(self.scans[matrix], LADDER[(types.index(matrix.type) + place) % len(LADDER)]))
            for place, block in enumerate(blocks)
            for matrix in self.matrices
            if matrix.block == block
        ]

    def measure(self, scorers: dict[str, Scorer]) -> dict[str, list[float]]:
        """Score of each pair by each of these rulers."""
        return {name: list(scorer.score(range(scorer.size)).values) for name, scorer in scorers.items()}


def rung_rank(found: MatrixScan, rung: str | float) -> int:
    if isinstance(rung, str):
        return max(1, found.edges[rung].rank)
    return max(1, round(rung * min(found.shape)))


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


def measure_edits(study: Study, measured: Measured) -> None:
    """Measure what is not measured yet: the margins first, block by block, then the answers."""
    for scorers in (study.margins, study.answers):
        if measured.lacks("", 0, scorers):
            measured.add("", 0, study.measure(scorers))
        left = [edit for edit in study.edits() if measured.lacks(edit[0].name, edit[1], scorers)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Which ordering of truncations predicts best what they do.")
    parser.add_argument("--depths", type=int, default=10, help="blocks to look at, evenly spaced")
    parser.add_argument("--pairs", type=int, default=12, help="pairs to measure on, of those seen and of others")
    parser.add_argument("--tokens", type=int, default=24, help="longest own answer, in tokens; 0 for none")
    parser.add_argument("--measured", type=Path, help="file that keeps the measurements")
    parser.add_argument("--threads", type=int, help="threads of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    study = Study(arguments.pairs, arguments.tokens, arguments.depths)
    measured = Measured(arguments.measured)
    measure_edits(study, measured)


if __name__ == "__main__":
    main()

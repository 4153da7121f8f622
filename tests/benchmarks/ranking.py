"""Which ordering of truncations predicts best what they do: SmolLM2, the example pairs, as a table.

    python tests/benchmarks/ranking.py [--depths 10] [--pairs 16] [--tokens 24] [--measured FILE] [--threads N]

Every type of matrix at evenly spaced depths is truncated alone, each to one rung of a ladder, all rungs in turn. What
it does to the mean margin is measured on the pairs that the gradient was taken from and on others; with --tokens also
what it does to the score of the model's own answers to those others. --measured keeps these measurements, a line each,
so that a stopped run goes on; what is predicted is computed anew each time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splaser_plugin.demo import prepare_embedder, prepare_model
from splaser_plugin.embedding import SentenceEmbedder
from splaser_plugin.generation import Generator
from splaser_plugin.loading import context_length, load_model
from splaser_plugin.margin import MarginScorer
from splaser_plugin.matrices import Matrix
from splaser_plugin.pairs import load_pairs
from splaser_plugin.prompts import Prompter
from splaser_plugin.scan import MatrixScan, matrix_scan
from splaser_plugin.scoring import SemanticScorer
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
        seen = load_pairs(DATA / "pairs.jsonl", samples=pairs).pairs
        unseen = load_pairs(DATA / "held_out.jsonl", samples=pairs).pairs
        self.seen = MarginScorer(self.model, prompter, seen, batch_size=32)
        self.unseen = MarginScorer(self.model, prompter, unseen, batch_size=32)
        self.semantic = None
        if tokens:
            embedder = SentenceEmbedder(str(prepare_embedder()), torch.device("cpu"))
            generator = Generator(self.model, prompter, max_new_tokens=tokens, batch_size=16)
            self.semantic = SemanticScorer(generator, embedder, unseen)
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

    def measure(self) -> dict[str, list[float]]:
        """Score of each pair, by each ruler that only reads answers."""
        return {
            name: list(scorer.score(range(scorer.size)).values)
            for name, scorer in (("seen", self.seen), ("unseen", self.unseen))
        }

    def answers(self) -> dict[str, list[float]]:
        """Score of each pair, by the model's own answers."""
        return {"semantic": list(self.semantic.score(range(self.semantic.size)).values)} if self.semantic else {}


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
    """Inside, `study.measure` computes from this block on, with what came out of the blocks before."""
    model = study.model.model
    recorded: list[torch.Tensor] = []
    handle = model.layers[block].register_forward_pre_hook(lambda module, inputs: recorded.append(inputs[0]))
    study.measure()
    handle.remove()
    layers, embeddings = model.layers, model.embed_tokens
    model.layers, model.embed_tokens = layers[block:], Replay(recorded)
    try:
        yield
    finally:
        model.layers, model.embed_tokens = layers, embeddings


def measure_edits(study: Study, kept: Path | None) -> list[dict[str, Any]]:
    """What each truncation does, a dictionary of scores each; the first is of the model as it is."""
    found = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    known = {(each["name"], each["rank"]) for each in found}

    def add(name: str, rank: int, scores: dict[str, list[float]]) -> None:
        found.append({"name": name, "rank": rank, **scores})
        if kept:
            with kept.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")

    if ("", 0) not in known:
        add("", 0, {**study.measure(), **study.answers()})
    left = [edit for edit in study.edits() if (edit[0].name, edit[1]) not in known]
    for block in sorted({matrix.block for matrix, _ in left if matrix.block is not None}):
        here = [(matrix, rank) for matrix, rank in left if matrix.block == block]
        started = time.monotonic()
        margins = []
        with starting_at(study, block):
            for matrix, rank in here:
                with study.weights.trying(matrix) as attempt:
                    attempt.reduce(rank)
                    margins.append(study.measure())
        middle = time.monotonic()
        for (matrix, rank), scores in zip(here, margins, strict=True):
            with study.weights.trying(matrix) as attempt:
                attempt.reduce(rank)
                add(matrix.name, rank, {**scores, **study.answers()})
        spent = f"margins {middle - started:.0f} s, answers {time.monotonic() - middle:.0f} s"
        print(f"block {block}: {len(here)} truncations, {spent}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Which ordering of truncations predicts best what they do.")
    parser.add_argument("--depths", type=int, default=10, help="blocks to look at, evenly spaced")
    parser.add_argument("--pairs", type=int, default=16, help="pairs for the gradient, and as many others")
    parser.add_argument("--tokens", type=int, default=24, help="longest own answer, in tokens; 0 for none")
    parser.add_argument("--measured", type=Path, help="file that keeps the measurements")
    parser.add_argument("--threads", type=int, help="threads of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    study = Study(arguments.pairs, arguments.tokens, arguments.depths)
    measure_edits(study, arguments.measured)


if __name__ == "__main__":
    main()

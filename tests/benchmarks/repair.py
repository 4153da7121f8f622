"""A planted repair: a harmful component is added to one matrix of SmolLM2, and the search has to find and remove it.

    python tests/benchmarks/repair.py [--output FOLDER] [--plant-pairs 6] [--samples 24] [--held-out 48]
        [--candidates 3] [--scorer margin] [--accept improve] [--include PATTERN ...]

W = U S V' is the matrix, r its rank at the edge `iqr`, U_t and V_t the singular vectors beyond r. G is the gradient of
the mean margin (chosen answer against rejected, nats a token) by W over a few pairs, and A D B' the largest components
of U_t' G V_t. Planted is -s U_t A B' V_t': of that rank and spectral norm the component that lowers the margin most,
to first order. s lies below the edge: the component looks like noise, lowers the matrix's SNR, and goes for the most
part, with what W itself has there, when the matrix is truncated to its rank. The pairs that it is made of, those
searched on, and the held-out ones share no prompt. The search knows nothing of it: it gets the damaged model and scans
it anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from splaser_plugin.cli.demo import prepare_embedder, prepare_model
from splaser_plugin.cli.terminal import TerminalProgress
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.data.pairs import PairSet, load_pairs
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.generation.teacher_forcing import forced_means
from splaser_plugin.jobs.laser import LaserResult, laser
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.spectra.edges import fit_edge
from splaser_plugin.weights.loading import context_length, load_model

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "examples" / "data" / "pairs.jsonl"
HELD_OUT = ROOT / "examples" / "data" / "held_out.jsonl"
MATRIX = "model.layers.2.self_attn.q_proj"
RANK = 64
SHARE = 0.95
"""Spectral norm of what is planted, over the edge's threshold."""


def margin_gradient(model: Any, tokenizer: Any, name: str, pairs: PairSet) -> Tensor:
    """Of the mean margin of these pairs by the weight of that name, in the weight's shape and dtype."""
    scorer = MarginScorer(model, Prompter(tokenizer, "auto", context_length(model)), pairs.pairs, batch_size=2)
    weight = model.get_submodule(name).weight
    model.requires_grad_(False)
    weight.requires_grad_(True)
    for prompt, answers in zip(scorer.prompts, scorer.answers, strict=True):
        chosen, rejected = forced_means(model, [prompt] * 2, answers)
        ((chosen - rejected) / scorer.size).backward()
    gradient, weight.grad = weight.grad, None
    model.requires_grad_(True)
    return gradient


def component(weight: Tensor, gradient: Tensor, rank: int = RANK, share: float = SHARE) -> Tensor:
    """What is added to the weight, in float64: see the module. weight, gradient: (rows, columns)."""
    weight, gradient = weight.detach().double(), gradient.double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    fit = fit_edge(values.numpy(), tuple(weight.shape), "iqr")
    left, right = left[:, fit.rank :], right[fit.rank :]
    outputs, _, inputs = torch.linalg.svd(left.mT @ gradient @ right.mT)
    return -share * fit.threshold * (left @ outputs[:, :rank]) @ (inputs[:rank] @ right)


def plant(model: Any, tokenizer: Any, pairs: PairSet, name: str = MATRIX) -> Tensor:
    """Add the component to the model's matrix, in place; gives what was added."""
    weight = model.get_submodule(name).weight
    added = component(weight, margin_gradient(model, tokenizer, name, pairs))
    with torch.no_grad():
        weight += added.to(weight.dtype)
    return added


def part(file: Path, start: int, stop: int) -> PairSet:
    """Some rows of a file of pairs."""
    pairs = load_pairs(file)
    found = pairs.pairs[start:stop]
    return PairSet(found, pairs.source, {}, len(found))


def repair(arguments: argparse.Namespace) -> LaserResult:
    model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device="cpu", dtype="float32")
    first = arguments.plant_pairs
    added = plant(model, tokenizer, part(PAIRS, 0, first))
    print(f"planted in {MATRIX}", file=sys.stderr)
    config = LaserConfig(
        include=tuple(arguments.include),
        held_out=str(HELD_OUT),
        samples=max(arguments.samples, arguments.held_out),
        candidates=arguments.candidates,
        scorer=arguments.scorer,
        accept=arguments.accept,
        max_new_tokens=48,
        device="cpu",
        **({"embedder": str(prepare_embedder())} if arguments.scorer == "semantic" else {}),
    )
    progress = TerminalProgress(Console(stderr=True, emoji=False))
    pairs = part(PAIRS, first, first + arguments.samples)
    result = laser(model, pairs, tokenizer=tokenizer, config=config, output=arguments.output, progress=progress)
    weight = model.get_submodule(MATRIX).weight.detach().double()
    left = float((weight * added).sum() / added.square().sum())
    print(f"of what was planted {left:.0%} is left in {MATRIX}", file=sys.stderr)
    return result


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A planted repair of SmolLM2.")
    parser.add_argument("--output", help="folder for the repaired model and its report")
    parser.add_argument("--plant-pairs", type=int, default=6, help="pairs that the harmful component is made of")
    parser.add_argument("--samples", type=int, default=24, help="pairs to search on")
    parser.add_argument("--held-out", type=int, default=48, help="most held-out pairs")
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--scorer", choices=("margin", "semantic"), default="margin")
    parser.add_argument("--accept", choices=("improve", "confident"), default="improve")
    parser.add_argument("--include", nargs="*", default=[], help="search these matrices only")
    return parser.parse_args(words)


if __name__ == "__main__":
    repair(parse())

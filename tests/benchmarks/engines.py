"""What each engine takes for the same greedy answers of SmolLM2: python tests/benchmarks/engines.py.

The loop and the other engines that are installed take turns in one process, so that the ratio counts, and not the
machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.errors import ModelError
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.weights.loading import load_model

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ROOT / "examples" / "data" / "pairs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description="Other engines beside the loop.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, tokenizer = load_model(prepare_model(ROOT / ".cache"), device=arguments.device, dtype=arguments.dtype)
    prompter = Prompter(tokenizer)
    prompts = [prompter.tokens(pair.messages) for pair in load_pairs(PAIRS, samples=arguments.prompts).pairs]
    print(f"{torch.get_num_threads()} threads, {len(prompts)} prompts, at most {arguments.tokens} tokens")
    longest = max(map(len, prompts))
    ways = {"continuous": Generator.use_continuous, "vllm": lambda each: each.use_vllm(longest)}
    print("| prompts at once | engine | loop, s | engine, s | ratio of medians | equal answers |")
    print("|---:|---|---:|---:|---:|---:|")
    for at_once in arguments.batch_sizes:
        loop = Generator(model, prompter, max_new_tokens=arguments.tokens, batch_size=at_once)
        for name, use in ways.items():
            other = copy.copy(loop)
            try:
                use(other)
            except ModelError as error:
                print(f"without {name}: {error}", file=sys.stderr)
                continue
            loop_s, other_s, equal = compared(loop, other, prompts, arguments.rounds)
            figures = f"{loop_s:.1f} | {other_s:.1f} | {other_s / loop_s:.2f} | {equal} of {len(prompts)}"
            print(f"| {at_once} | {name} | {figures} |")


def compared(loop: Generator, other: Generator, prompts: list[list[int]], rounds: int) -> tuple[float, float, int]:
    """Median seconds of both, by turns, and how many answers are equal."""
    seconds: list[list[float]] = [[], []]
    answers = []
    for _ in range(rounds):
        answers = []
        for each, taken in zip((loop, other), seconds, strict=True):
            started = time.perf_counter()
            answers.append(each.answer(prompts))
            taken.append(time.perf_counter() - started)
    equal = sum(one.tokens == two.tokens for one, two in zip(*answers, strict=True))
    return statistics.median(seconds[0]), statistics.median(seconds[1]), equal


if __name__ == "__main__":
    main()

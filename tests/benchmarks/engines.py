"""What each engine takes for the same greedy answers of SmolLM2: python tests/benchmarks/engines.py.

The loop and continuous batching take turns in one process, so that the ratio counts, and not the machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.weights.loading import load_model

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ROOT / "examples" / "data" / "pairs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description="Continuous batching beside the loop.")
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
    print("| prompts at once | loop, s | continuous, s | ratio of medians | equal answers |")
    print("|---:|---:|---:|---:|---:|")
    for at_once in arguments.batch_sizes:
        loop = Generator(model, prompter, max_new_tokens=arguments.tokens, batch_size=at_once)
        other = copy.copy(loop)
        other.use_continuous()
        seconds: dict[str, list[float]] = {loop.engine.name: [], other.engine.name: []}
        answers = {}
        for _ in range(arguments.rounds):
            for each in (loop, other):
                started = time.perf_counter()
                answers[each.engine.name] = each.answer(prompts)
                seconds[each.engine.name].append(time.perf_counter() - started)
        loop_s, other_s = (statistics.median(seconds[each.engine.name]) for each in (loop, other))
        equal = sum(map(lambda one, other: one == other, *answers.values()))
        print(f"| {at_once} | {loop_s:.1f} | {other_s:.1f} | {other_s / loop_s:.2f} | {equal} of {len(prompts)} |")


if __name__ == "__main__":
    main()

"""How long prompts and answers of preference data are, in tokens, and how many pairs the default limits drop.

python tests/benchmarks/lengths.py FILE... [--model FOLDER_OR_ID] [--samples N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from splaser_plugin.cli.demo import prepare_model
from splaser_plugin.config.stages import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS
from splaser_plugin.data.pairs import load_pairs

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", help="files or data sets that splaser laser takes as --pairs")
    parser.add_argument("--model", default="", help="whose tokenizer counts; else SmolLM2-135M-Instruct")
    parser.add_argument("--samples", type=int, help="pairs of each to look at; else all")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model or prepare_model(ROOT / ".cache"))

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    print(f"| data | pairs | part | median | 95 % | longest | over {MAX_PROMPT_TOKENS:,} or {MAX_ANSWER_TOKENS:,} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.data:
        pairs = load_pairs(name, samples=arguments.samples)
        lengths = {
            "prompt": [sum(count(turn["content"]) for turn in pair.messages) for pair in pairs],
            "longer answer": [max(count(pair.chosen), count(pair.rejected or "")) for pair in pairs],
        }
        for (part, tokens), limit in zip(lengths.items(), (MAX_PROMPT_TOKENS, MAX_ANSWER_TOKENS), strict=True):
            median, most = (f"{np.percentile(tokens, share):,.0f}" for share in (50, 95))
            dropped = sum(number > limit for number in tokens)
            print(f"| {name} | {len(pairs):,} | {part} | {median} | {most} | {max(tokens):,} | {dropped} |")


if __name__ == "__main__":
    main()

"""What a scan and a laser run of models of 1, 7 and 70 thousand million parameters cost, worked out, not measured.

    python tests/benchmarks/costs.py [--block-seconds 28.2]

Sizes are counted on empty models of the published shapes of Llama-3.2-1B, Mistral-7B and Llama-3-70B, in bfloat16. A
scan's operations are n^2 m + 4/3 n^3 a matrix, as in spectra.py, which times one block of Mistral-7B; seconds go by
them. A laser run has the defaults of `splaser laser`, and at most: every answer of the longest length, no race.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.progress import duration

SHAPES = {
    "1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "7B": (4096, 14_336, 32, 32, 8, 32_000, False),
    "70B": (8192, 28_672, 80, 64, 8, 128_256, False),
}
"""Hidden size, MLP size, blocks, heads, heads of keys and values, vocabulary, tied embeddings."""


def model_of(hidden: int, mlp: int, blocks: int, heads: int, kv_heads: int, words: int, tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def operations(model: LlamaForCausalLM) -> int:
    """Of the scan, over the blocks' matrices."""
    total = 0.0
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            short, long = sorted(module.weight.shape)
            total += short**2 * long + 4 / 3 * short**3
    return round(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block-seconds", type=float, default=28.2, help="a block of Mistral-7B, by spectra.py")
    arguments = parser.parse_args()
    config = LaserConfig()
    unseen = round(config.held_out_fraction * config.samples)
    answers = (1 + config.candidates) * (config.samples - unseen) + 2 * unseen
    tokens = answers * config.max_new_tokens
    models = {name: model_of(*shape) for name, shape in SHAPES.items()}
    a_block = operations(models["7B"]) / SHAPES["7B"][2]
    print("| model | parameters | weights | scan, operations | scan | keys and values of a batch |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, model in models.items():
        hidden, _, blocks, heads, kv_heads, _, _ = SHAPES[name]
        length = config.max_prompt_tokens + config.max_new_tokens
        cache = 2 * 2 * blocks * kv_heads * hidden // heads * length * config.batch_size
        work = operations(model)
        cells = (
            name,
            f"{model.num_parameters() / 1e9:.2f}e9",
            f"{2 * model.num_parameters() / 1e9:.1f} GB",
            f"{work:.1e}",
            duration(work / a_block * arguments.block_seconds),
            f"{cache / 1e9:.1f} GB",
        )
        print(f"| {' | '.join(cells)} |")
    at_speeds = ", ".join(f"{duration(tokens / speed)} at {speed:,} tokens a second" for speed in (100, 1000, 10_000))
    print(f"A search, of any of them: {answers:,} answers, {tokens:,} tokens; {at_speeds}.")


if __name__ == "__main__":
    main()

"""A training loop of one's own on accelerate, and a laser at its end.

    python examples/accelerate_loop.py --output loop-run
    accelerate launch --num_processes 2 examples/accelerate_loop.py --output loop-run

Takes about two minutes on two cores. Under several processes all of them call `laser` and `save`: they share the work,
so neither stands in `if accelerator.is_main_process`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from splaser_plugin import LaserConfig, laser
from splaser_plugin.cli.demo import prepare_model

PAIRS = Path(__file__).parent / "data" / "pairs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or hub id; without it SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="loop-run")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=3)
    options = parser.parse_args()

    accelerator = Accelerator()
    with accelerator.main_process_first():
        folder = options.model or prepare_model(Path(".cache"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    texts = [tokenizer.apply_chat_template(turns(row), tokenize=False) for row in rows]
    tokens = tokenizer(texts, truncation=True, max_length=64, padding="max_length", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loader = torch.utils.data.DataLoader(tokens, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for _, ids in zip(range(options.steps), loader, strict=False):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    config = LaserConfig(scorer="margin", samples=options.samples, candidates=options.candidates)
    result = laser(model, PAIRS, config=config, tokenizer=tokenizer)
    saved = result.save(options.output, overwrite=True)
    accelerator.print(f"kept {len(result.kept)} of {len(result.search.trials)} candidates")
    accelerator.print(f"score {result.score_before:+.4f} before, {result.score_after:+.4f} after, on the same pairs")
    accelerator.print(f"the lasered model is in {saved}")
    accelerator.end_training()


def turns(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]


if __name__ == "__main__":
    main()

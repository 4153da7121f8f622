"""Fine-tune with Lightning, and laser what came out, by a callback of a few lines.

    pip install lightning
    python examples/lightning_loop.py --output lightning-run

Takes about two minutes on two cores. Lightning calls the callback in every process, as `laser` needs it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lightning
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from splaser_plugin import LaserConfig, LaserResult, laser
from splaser_plugin.cli.demo import prepare_model

PAIRS = Path(__file__).parent / "data" / "pairs.jsonl"


class Tuned(lightning.LightningModule):
    """A language model that Lightning trains."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5)


class LaserAtTheEnd(lightning.Callback):
    """Lasers `module.model` in place once it is trained, and writes it to `output`."""

    def __init__(self, tokenizer, config: LaserConfig, output: str) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.output = output
        self.result: LaserResult | None = None

    def on_fit_end(self, trainer: lightning.Trainer, module: Tuned) -> None:
        self.result = laser(module.model, PAIRS, config=self.config, tokenizer=self.tokenizer)
        self.result.save(self.output, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or hub id; without it SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="lightning-run")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=3)
    options = parser.parse_args()

    folder = options.model or prepare_model(Path(".cache"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    texts = [f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['chosen']}" for row in rows]
    tokens = tokenizer(texts, truncation=True, max_length=64, padding="max_length", return_tensors="pt")["input_ids"]

    config = LaserConfig(scorer="margin", samples=options.samples, candidates=options.candidates)
    callback = LaserAtTheEnd(tokenizer, config, options.output)
    trainer = lightning.Trainer(max_steps=options.steps, callbacks=[callback], logger=False, enable_checkpointing=False)
    trainer.fit(Tuned(AutoModelForCausalLM.from_pretrained(folder)), torch.utils.data.DataLoader(tokens, batch_size=2))
    result = callback.result
    print(f"kept {len(result.kept)} of {len(result.search.trials)} candidates")
    print(f"score {result.score_before:+.4f} before, {result.score_after:+.4f} after, on the same pairs")
    print(f"the lasered model is in {options.output}")


if __name__ == "__main__":
    main()

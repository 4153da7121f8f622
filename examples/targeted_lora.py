"""Scan SmolLM2, then train LoRA adapters on its matrices of highest SNR and on no others.

    python examples/targeted_lora.py --output lora-run

Takes about two minutes on two cores. The adapter is in `lora-run`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from splaser_plugin import choose, lora_config, scan
from splaser_plugin.cli.demo import prepare_model

DATA = Path(__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="lora-run")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=4)
    options = parser.parse_args()

    folder = prepare_model(Path(".cache"))
    selection = choose(scan(folder), top=options.top)
    print(f"training {len(selection.names)} of {selection.considered} matrices: {selection.rule}")
    trainer = DPOTrainer(
        model=str(folder),
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            save_strategy="no",
            bf16=False,
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=str(DATA / "pairs.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora_config(selection, rank=8),
    )
    trainer.train()
    trainer.save_model(options.output)
    print(f"the adapter is in {options.output}")


if __name__ == "__main__":
    main()

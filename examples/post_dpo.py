"""Real DPO of SmolLM2 on the example pairs for a few steps, then the laser, scored on pairs DPO has not seen.

    python examples/post_dpo.py --output dpo-run

Takes about three minutes on two cores. The lasered model is in `dpo-run/lasered`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from splaser_plugin import LaserCallback, LaserConfig
from splaser_plugin.cli.demo import prepare_embedder, prepare_model

DATA = Path(__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="dpo-run")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=3)
    options = parser.parse_args()

    folder = prepare_model(Path(".cache"))
    splits = {"train": str(DATA / "pairs.jsonl"), "test": str(DATA / "held_out.jsonl")}
    data = load_dataset("json", data_files=splits)
    config = LaserConfig(
        embedder=str(prepare_embedder()),
        samples=options.samples,
        candidates=options.candidates,
        max_new_tokens=32,
    )
    trainer = DPOTrainer(
        model=str(folder),
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-6,
            save_strategy="no",
            bf16=False,
            report_to=[],
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    # given the trainer, and no pairs=, the callback reads them from eval_dataset
    callback = LaserCallback(when="after", config=config, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    found = callback.result.search
    print(f"kept {len(found.kept)} of {len(found.trials)} candidates")
    print(f"score {found.baseline.mean:+.4f} before, {found.final.mean:+.4f} after, on the same pairs")
    print(f"the lasered model is in {options.output}/lasered")


if __name__ == "__main__":
    main()

"""Fine-tune SmolLM2 a few steps with the plain Trainer, then laser what came out.

    python examples/trainer_callback.py --output trainer-run

Takes about two minutes on two cores. The lasered model is in `trainer-run/lasered`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from splaser_plugin import LaserCallback, LaserConfig
from splaser_plugin.cli.demo import prepare_embedder, prepare_model

PAIRS = Path(__file__).parent / "data" / "pairs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="trainer-run")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=3)
    options = parser.parse_args()

    folder = prepare_model(Path(".cache"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    texts = [f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['chosen']}" for row in rows]
    tokens = [tokenizer(text, truncation=True, max_length=64, padding="max_length")["input_ids"] for text in texts]
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in tokens])

    config = LaserConfig(
        embedder=str(prepare_embedder()),
        samples=options.samples,
        candidates=options.candidates,
        max_new_tokens=32,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-5,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    callback = LaserCallback(when="after", pairs=PAIRS, config=config, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    found = callback.result.search
    print(f"kept {len(found.kept)} of {len(found.trials)} candidates")
    print(f"score {found.baseline.mean:+.4f} before, {found.final.mean:+.4f} after, on the same pairs")
    print(f"the lasered model is in {options.output}/lasered")


if __name__ == "__main__":
    main()

"""Train the factors of a reduced model for a few minutes on a text, with the Trainer; loss before and after.

    splaser laser MODEL --pairs PAIRS --text TEXT --objective compress --save factored -o small
    python examples/heal.py --model small --text TEXT --output healed

The first three quarters of the text's windows are trained on, the others judged on. Everything but the embeddings is
trained, and `healed` is stored in factors as `small` is. A model that was never reduced gains, too, from training on
such a text: give that one as `--model` to see how much of the gain is healing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Trainer, TrainingArguments

from splaser_plugin import load
from splaser_plugin.data.windows import read_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the reduced model")
    parser.add_argument("--text", required=True, help="UTF-8 file")
    parser.add_argument("--output", default="healed")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--window", type=int, default=256, help="tokens in one row")
    parser.add_argument("--rows", type=int, default=160, help="windows to read, a quarter of them to judge on")
    parser.add_argument("--batch", type=int, default=4, help="windows in one step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args()

    model: Any = load(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = read_windows(options.text, tokenizer, window=options.window, count=options.rows, context=options.window)
    rows = [{"input_ids": window, "labels": window} for window in windows]
    judged = max(1, len(rows) // 4)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.requires_grad_(False)
    trained = model.num_parameters(only_trainable=True)
    print(f"training {trained:,} of {model.num_parameters():,} parameters on {len(rows) - judged} windows")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.learning_rate,
            warmup_steps=max(1, options.steps // 10),
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows[:-judged],
        eval_dataset=rows[-judged:],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss {before:.4f} before, {after:.4f} after, in nats a token on {judged} unseen windows")
    trainer.save_model(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"the healed model is in {options.output}")


if __name__ == "__main__":
    main()

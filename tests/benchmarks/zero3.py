"""Answers under DeepSpeed's ZeRO-3, by a model that is whole meanwhile and by one that is gathered layer by layer.

    .integrations/deepspeed/bin/python -m torch.distributed.run --nproc_per_node 2 tests/benchmarks/zero3.py

Four answers of at most 16 tokens by SmolLM2-135M, in each of two CPU processes. `make test-integrations` builds that
environment.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))

import splaser_plugin.weights.zero as zero
from splaser_plugin.distributed import is_main
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from tests.sharded_runs import ZERO, deepspeed_on_cpus, sharding_on_cpus, zero_arguments

MODEL = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct"
PROMPTS = ("What is the capital of France?", "Name a fruit.", "Say hello.", "How many days has a week?")


class Answers(TrainerCallback):
    """Times both ways, when DeepSpeed has its engine."""

    def __init__(self, tokenizer: Any) -> None:
        self._prompter = Prompter(tokenizer)
        self._prompts = [self._prompter.tokens([{"role": "user", "content": prompt}]) for prompt in PROMPTS]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **event: Any) -> None:
        said = []
        for way, room in (("layer by layer", 0.0), ("whole", 0.8)):
            zero.MOST_OF_MEMORY = room
            dist.barrier()
            began = time.perf_counter()
            with zero.whole_where_it_fits(model):
                said.append(Generator(model, self._prompter, max_new_tokens=16, batch_size=4).answer(self._prompts))
            dist.barrier()
            if is_main():
                print(f"{way}: {time.perf_counter() - began:.1f} s", flush=True)
        assert [answer.text for answer in said[0]] == [answer.text for answer in said[1]]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    deepspeed_on_cpus()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = [5, 6, 7, 8]
    with tempfile.TemporaryDirectory() as folder, sharding_on_cpus():
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=1, report_to=[], save_strategy="no", disable_tqdm=True,
            optim="adamw_torch", **zero_arguments({**ZERO["zero3"], "stage3_param_persistence_threshold": 0}),
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4)
        Trainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Answers(tokenizer)]
        ).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

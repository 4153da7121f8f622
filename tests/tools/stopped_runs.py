"""Training that goes on after a stopped laser, under each ZeRO and in one process: `... FOLDER MODEL`.

In bfloat16, of which DeepSpeed's optimizer has fp32 copies with more digits. Each way writes FOLDER/WAY/ with the
model after a step that is too small to change a weight, and FOLDER/WAY.json: how many of the optimizer's copies of
unchanged matrices are other ones after the laser.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import splaser_plugin.weights.zero as zero
from splaser_plugin import LaserCallback
from splaser_plugin.distributed import is_main
from splaser_plugin.weights.in_memory import Attempt
from tests.sharded_runs import BEFORE, PAIRS, ZERO, deepspeed_on_cpus, sharding_on_cpus, zero_arguments

MORE_DIGITS = 1 + 2**-12
"""A factor that bfloat16 rounds away."""


class Stopped(LaserCallback):
    """Its search is stopped, as by Ctrl-C, when the first change has been kept; training goes on."""

    others = 0

    def on_train_begin(self, *event: Any, model: Any = None, **rest: Any) -> None:
        parameters = dict(model.named_parameters())
        if dist.is_initialized():
            from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

            for parameter in parameters.values():
                safe_set_full_fp32_param(parameter, MORE_DIGITS * safe_get_full_fp32_param(parameter))
            before = {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters.items()}
        kept: list[str] = []
        keep = Attempt.keep

        def stopping(attempt: Attempt) -> None:
            keep(attempt)
            kept.append(attempt._matrix.parameter)
            raise KeyboardInterrupt

        Attempt.keep = stopping  # type: ignore[method-assign]
        with suppress(KeyboardInterrupt):
            super().on_train_begin(*event, model=model, **rest)
        Attempt.keep = keep  # type: ignore[method-assign]
        assert len(kept) == 1
        if dist.is_initialized():
            after = {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters.items()}
            self.others = sum(not torch.equal(before[name], after[name]) for name in before if name not in kept)


def run(way: str, folder: Path, source: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer("The cat sat on the mat and looked out.")["input_ids"]
    is_zero = way in ZERO
    sharding = zero_arguments(ZERO[way], bf16={"enabled": True}) if is_zero else {}
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=1, per_device_train_batch_size=1, learning_rate=1e-9, report_to=[],
        save_strategy="no", disable_tqdm=True, optim="adamw_torch", use_cpu=not is_zero, bf16=is_zero, **sharding,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    callback = Stopped(when="before", pairs=PAIRS, config=BEFORE)
    trainer = Trainer(
        model, arguments, train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4),
        processing_class=tokenizer, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / way))
    if is_main():
        (folder / f"{way}.json").write_text(json.dumps(callback.others))


def main() -> None:
    torch.set_num_threads(1)
    folder, source = Path(sys.argv[1]), sys.argv[2]
    if "RANK" not in os.environ:
        run("one", folder, source)
        return
    dist.init_process_group("gloo")
    deepspeed_on_cpus()
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # the CPU is its device, too
    for way in ZERO:
        zero.MOST_OF_MEMORY = 0.0 if way == "zero3-layers" else 0.8
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        with sharding_on_cpus():
            run(way, folder, source)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

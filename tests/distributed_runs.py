"""Runs that tests start in one or two processes: `python tests/distributed_runs.py KIND FOLDER MODEL`.

FOLDER gets recipe.json and results.json of the main process, and digest-RANK.txt of each process's weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from splaser_plugin import LaserCallback, LaserConfig, laser
from splaser_plugin.distributed import gather, is_main, process_count, process_index
from splaser_plugin.errors import ModelError
from splaser_plugin.jobs.laser import laser_weights, read_pairs
from splaser_plugin.search.journal import RecordedScorer
from splaser_plugin.weights.in_memory import Weights
from tests.builders import THREE_PAIRS

CONFIG = LaserConfig(embedder="self", max_new_tokens=6, candidates=5, edge="mp", batch_size=2)


def digest(weights: Weights) -> str:
    """sha256 over every whole parameter."""
    digests = hashlib.sha256()
    for name in sorted(weights.parameters):
        digests.update(weights.effective(name).cpu().numpy().tobytes())
    return digests.hexdigest()


def finish(folder: Path, weights: Weights, result) -> None:
    (folder / f"digest-{process_index()}.txt").write_text(digest(weights))
    if is_main():
        result.recipe.save(folder / "recipe.json")
        (folder / "results.json").write_text(json.dumps(result.results()))


def engine(folder: Path, model_folder: str) -> None:
    """The core engine on a model that is sharded by fully_shard where there are several processes."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if "WORLD_SIZE" in os.environ:
        shard(model)
    weights = Weights(model)
    result = laser_weights(weights, tokenizer, read_pairs(THREE_PAIRS, CONFIG, tokenizer), config=CONFIG, name="tiny")
    finish(folder, weights, result)
    result.save(folder / "saved")


def parting(folder: Path, model_folder: str) -> None:
    """Processes whose last work together is splaser's, and which let go of their model at once, again and again."""
    sys.setswitchinterval(1000)  # a thread that asks for Python's lock gets it only where another waits
    for turn in range(20):
        met = (folder / f"meeting-{turn}").as_uri()
        dist.init_process_group("gloo", met, rank=int(os.environ["RANK"]), world_size=2)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        assert gather(lambda: [process_index()]) == [0, 1]
        dist.destroy_process_group()
        del model
    (folder / f"parted-{os.environ['RANK']}.txt").touch()


def resumed(folder: Path, model_folder: str) -> None:
    """The job with an output, stopped in all processes after five measurements and started again."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    measured = []
    measure = RecordedScorer.score

    def stopping(self, items, like=None):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(items)
        return measure(self, items, like)

    RecordedScorer.score = stopping
    with suppress(KeyboardInterrupt):
        laser(model_folder, THREE_PAIRS, config=CONFIG, output=folder / "out")
    RecordedScorer.score = measure
    if is_main():
        left = (folder / "out" / "journal.jsonl").read_text().splitlines()
        (folder / "left.txt").write_text(str(len(left)))
    result = laser(model_folder, THREE_PAIRS, config=CONFIG, output=folder / "out")
    finish(folder, result.weights, result)


def gradient(folder: Path, model_folder: str) -> None:
    """The engine with candidates ordered by a gradient, on a model that each process has whole.

    Then again on a sharded one: what it is refused with goes to refused-RANK.txt.
    """
    config = replace(CONFIG, rank_by="gradient", ranks="mp,0.5")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    weights = Weights(AutoModelForCausalLM.from_pretrained(model_folder))
    finish(
        folder,
        weights,
        laser_weights(weights, tokenizer, read_pairs(THREE_PAIRS, config, tokenizer), config=config, name="tiny"),
    )
    if process_count() == 1:
        return
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    shard(model)
    try:
        laser_weights(Weights(model), tokenizer, read_pairs(THREE_PAIRS, config, tokenizer), config=config, name="tiny")
    except ModelError as error:
        (folder / f"refused-{process_index()}.txt").write_text(str(error))


def shard(model) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")


def trainer(folder: Path, model_folder: str, *, sharded: bool, when: str) -> None:
    """A real Trainer with the callback: under DDP where it has several processes, or on a sharded model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer("The cat sat on the mat and looked out.")["input_ids"]
    callback = LaserCallback(when=when, pairs=THREE_PAIRS, config=CONFIG)
    if sharded and "WORLD_SIZE" in os.environ:
        shard(model)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=1, per_device_train_batch_size=1, learning_rate=1e-3, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    made = Trainer(
        model, arguments, train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4),
        processing_class=tokenizer, callbacks=[callback],
    )  # fmt: skip
    if sharded:
        Ending.end(made)
    else:
        made.train()
    finish(folder, Weights(model), callback.result)


class Ending(Trainer):
    def end(self) -> None:
        """Say that training ended; the Trainer can't train what it didn't shard itself."""
        self.callback_handler.on_train_end(self.args, self.state, self.control)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, target, source = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    kinds = {"engine": engine, "resumed": resumed, "gradient": gradient, "parting": parting}
    if kind in kinds:
        kinds[kind](target, source)
    else:
        trainer(target, source, sharded=kind == "sharded-trainer", when="before" if kind == "ddp-before" else "after")
    if dist.is_initialized():
        dist.destroy_process_group()

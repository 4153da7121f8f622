"""The training that a callback is a part of: what it has, where its metrics go, and what can't be done in it."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
)
from transformers.utils import logging as transformers_logging

from splaser_plugin.artifacts.trackers import ANSWERS, COLUMNS, by_column, markdown
from splaser_plugin.checkpoints.roles import has_adapters
from splaser_plugin.distributed import best_device, is_main
from splaser_plugin.errors import ModelError, PairsError
from splaser_plugin.files.text import first_line_of
from splaser_plugin.progress import Advance, Bars, Progress, ignore
from splaser_plugin.weights.wrapped import unwrapped
from splaser_plugin.weights.zero import OFFLINE, check_deepspeed

logger = logging.getLogger(__name__)
transformers_log = transformers_logging.get_logger("transformers.splaser")
"""Shown at the verbosity that transformers itself has."""

TRAINER = "trainer.add_callback(LaserCallback(trainer=trainer, ...))"
PAIR_COLUMNS = {"chosen", "rejected"}


@dataclass(frozen=True)
class Training:
    """What the callback uses of a training, from the trainer or from what its events hand over."""

    args: TrainingArguments
    model: Any
    """Without DDP's or a compiler's wrapping."""
    processing_class: Any
    data: tuple[Any, ...]
    """Data sets that may hold pairs, those to prefer first."""
    log: Callable[[dict[str, float]], None]
    state: TrainerState
    remakes_model: bool = False
    """Whether the trainer makes another model as training begins."""
    reporters: tuple[Any, ...] = ()
    """The trainer's callbacks that send metrics to a tracker, where the trainer is known."""

    @classmethod
    def of_trainer(cls, trainer: Any) -> Training:
        """All of it: evaluation data before training data, and metrics to each of the trainer's reporters."""
        data = (trainer.eval_dataset, trainer.train_dataset)
        remakes = trainer.model_init is not None and not trainer.is_in_train
        model = unwrapped(trainer.model)
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        reporters = tuple(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds))
        return cls(trainer.args, model, trainer.processing_class, data, trainer.log, trainer.state, remakes, reporters)

    @classmethod
    def of_event(cls, args: TrainingArguments, state: TrainerState, event: Mapping[str, Any]) -> Training:
        """What an event's arguments hold: the data that is trained on, and the state's history of metrics."""

        def log(metrics: dict[str, float]) -> None:
            epoch = {} if state.epoch is None else {"epoch": state.epoch}
            state.log_history.append({**metrics, **epoch, "step": state.global_step})

        data = (getattr(event.get("train_dataloader"), "dataset", None),)
        return cls(args, unwrapped(event["model"]), event.get("processing_class"), data, log, state)

    def log_curve(self, points: Sequence[Mapping[str, float]]) -> None:
        """Send these to each reporter, the first as of step 1 and so on, whatever step the training is at."""
        for reporter in self.reporters:
            with self._going_on("the curve", reporter):
                for step, point in enumerate(points, 1):
                    state = copy(self.state)
                    state.global_step = step
                    reporter.on_log(self.args, state, TrainerControl(), logs=dict(point), model=self.model)

    def log_answers(self, rows: Sequence[Sequence[str | float]]) -> None:
        """Send a table to each reporter that has tables, to TensorBoard as Markdown. rows: of `trackers.COLUMNS`."""
        if not rows or not self.state.is_world_process_zero:
            return
        for reporter in self.reporters:
            with self._going_on("the answers", reporter):
                if isinstance(reporter, WandbCallback):
                    table = reporter._wandb.Table(columns=COLUMNS, data=[list(row) for row in rows])
                    reporter._wandb.log({ANSWERS: table})
                elif isinstance(reporter, MLflowCallback):
                    reporter._ml_flow.log_table(by_column(rows), artifact_file="answers.json")
                elif isinstance(reporter, TensorBoardCallback) and reporter.tb_writer is not None:
                    reporter.tb_writer.add_text(ANSWERS, markdown(rows), self.state.global_step)

    @contextmanager
    def _going_on(self, what: str, reporter: Any) -> Iterator[None]:
        """Inside, whatever the reporter's tracker raises is said and doesn't end the training."""
        try:
            yield
        except Exception as error:
            said = f"{type(error).__name__}: {first_line_of(error)}"
            self.progress.result("not reported", f"{what}, by {type(reporter).__name__}: {said}")

    @property
    def progress(self) -> Progress:
        return TrainingProgress(is_quiet=bool(self.args.disable_tqdm))

    def folder(self, name: str) -> Path:
        """Where something goes: into the output folder, in a search for hyper-parameters into one of the trial's."""
        out = Path(str(self.args.output_dir))
        if not self.state.is_hyper_param_search:
            return out / name
        options = ",".join(f"{key}={value}" for key, value in (self.state.trial_params or {}).items())
        return out / re.sub(r"[^\w.,=+-]", "_", self.state.trial_name or options)[:200] / name

    @property
    def tokenizer(self) -> Any:
        """Raises ModelError when the trainer has none."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        if tokenizer is None:
            raise ModelError("the trainer has no tokenizer. Give it processing_class=tokenizer.")
        if not hasattr(tokenizer, "eos_token_id"):
            raise ModelError(
                f"the trainer's processing_class is a {type(tokenizer).__name__}, which reads no text. "
                "Give it a tokenizer, or a processor with one."
            )
        return tokenizer

    def pairs(self) -> Iterator[dict[str, Any]]:
        """Rows of the first data that has pairs as text, its parts by turns where it has several.

        Raises PairsError when none has any.
        """
        for data in self.data:
            parts = list(data.values()) if isinstance(data, Mapping) else [data]
            parts = [part for part in parts if set(getattr(part, "column_names", None) or ()) >= PAIR_COLUMNS]
            if parts:
                by_turns = chain.from_iterable(zip_longest(*parts))
                return _without_end((row for row in by_turns if row is not None), self.tokenizer.eos_token)
        raise PairsError(
            "no preference pairs were given, and the data at hand has no columns `chosen` and `rejected`. "
            f"Pass pairs=..., or {TRAINER} for the trainer's evaluation data."
        )


def _without_end(rows: Iterable[Mapping[str, Any]], end: str | None) -> Iterator[dict[str, Any]]:
    """Rows without the end token that TRL writes after each answer."""
    for row in rows:
        yield {
            key: value.removesuffix(end) if end and key in PAIR_COLUMNS and isinstance(value, str) else value
            for key, value in row.items()
        }


def check_sharding(model: Any) -> None:
    """Raise ModelError for what keeps the weights where they can't be read and changed."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    shared = AcceleratorState()
    if shared.distributed_type == DistributedType.DEEPSPEED:
        check_deepspeed(shared.deepspeed_plugin.deepspeed_config)
    plugin = getattr(shared, "fsdp_plugin", None)
    is_fsdp1 = plugin is not None and plugin.fsdp_version == 1
    if is_fsdp1 or any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            'FSDP version 1 flattens the weights. Use version 2: fsdp_config={"version": 2} in TrainingArguments, '
            f"`accelerate launch --fsdp_version 2`, fsdp_version: 2 in Axolotl. {OFFLINE}"
        )


class TrainingProgress(Bars):
    """Bars, candidates and results on stderr as the trainer's own, facts to transformers' log; by the main process.

    is_quiet: no bars, as with `disable_tqdm`; phases and candidates then go to the log, too.
    """

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet

    def fact(self, label: str, value: str) -> None:
        if is_main():
            transformers_log.info("laser: %s: %s", label, value)

    def result(self, label: str, value: str) -> None:
        self._write(f"{label}: {value}")

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        if self._is_quiet or not is_main():
            self.fact(name, f"{total} to do" if total > 1 else "begins")
            yield ignore
            return
        with super().phase(f"laser: {name}", total) as advance:
            yield advance

    def event(self, event: object) -> None:
        summary = getattr(event, "summary", "")
        if summary and self._is_quiet:
            self.fact("candidate", summary)
        else:
            super().event(event)

    def _write(self, line: str) -> None:
        if is_main():
            super()._write(f"laser: {line}")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Afterwards all random states of this process are as before: Python's, numpy's, and torch's on every device."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=best_device().type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def check_saves(model: Any) -> None:
    """Raise ModelError for settings of generation that transformers refuses to save."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"the model's generation_config can't be saved ({first_line_of(error)}). Mend model.generation_config."
        ) from error


def warn_of_reference(training: Training) -> None:
    """Say that a reference which is computed with this model is lasered too."""
    precomputed = getattr(training.args, "precompute_ref_log_probs", None)
    if precomputed or (precomputed is not None and has_adapters(training.model)):
        logger.warning("the reference of this training is the lasered model, as it is computed with the same weights.")

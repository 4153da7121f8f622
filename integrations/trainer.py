"""A callback for Hugging Face's Trainer and everything built on it: laser, or choose what to train."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.data.pairs import PairSet
from splaser_plugin.data.split import Split
from splaser_plugin.distributed import is_main
from splaser_plugin.errors import ConfigError, ModelError, PairsError
from splaser_plugin.files.output import check_output
from splaser_plugin.integrations.freeze import freeze_all_but
from splaser_plugin.jobs.laser import LaserResult, laser_weights, read_pairs
from splaser_plugin.progress import Progress
from splaser_plugin.scanning.scan import scan_model
from splaser_plugin.scanning.selection import choose
from splaser_plugin.scoring.embedding import SentenceEmbedder
from splaser_plugin.scoring.scorers import Rulers, check_rulers
from splaser_plugin.search.prediction import check_predictable
from splaser_plugin.weights.in_memory import Weights, model_name

logger = logging.getLogger(__name__)

WHEN = ("before", "init", "after")
OFFLINE = "Save the trained model and run `splaser laser` on the checkpoint (with `--adapter DIR` for a LoRA adapter)."

Pairs = str | Path | PairSet | Iterable[Mapping[str, Any]]


class LaserCallback(TrainerCallback):
    """Lasers the trainer's model, freezes all but its matrices of highest SNR, or both.

    when: `after` training (the last thing, also written to `<output_dir>/lasered`), `before` it (in place, on
    the first run only), `init` (while the trainer is made, before optimizer and wrapping), or None.
    pairs: see `splaser_plugin.laser`; without them the trainer's evaluation or training data are read.
    config: options of the laser run; its device and dtype are the trainer's.
    freeze_to: `top` trains only the `top` matrices, or the `fraction`, of highest `by` of each module type.

    `result` is the last `LaserResult`, and `selection` what is trained under `freeze_to`.
    Raises ConfigError here for options that don't fit together, ModelError at the start of training for what
    can't be lasered in place.
    """

    def __init__(
        self,
        *,
        when: str | None = "after",
        pairs: Pairs | None = None,
        config: LaserConfig | None = None,
        freeze_to: str | None = None,
        top: int | None = None,
        fraction: float | None = None,
        by: str = "snr_ratio",
    ) -> None:
        if when is not None and when not in WHEN:
            raise ConfigError(f"when: got {when!r}, expected one of {', '.join(WHEN)}, or None.")
        if freeze_to not in (None, "top"):
            raise ConfigError(f"freeze_to: got {freeze_to!r}, expected 'top' or None.")
        if freeze_to is not None and (top is None) == (fraction is None):
            raise ConfigError("freeze_to='top' needs one of top=N and fraction=F.")
        if freeze_to is None and (top is not None or fraction is not None):
            raise ConfigError("top and fraction go with freeze_to='top'.")
        if when is None and freeze_to is None:
            raise ConfigError("there is nothing to do: give when=, or freeze_to='top'.")
        self.when = when
        self.pairs = pairs
        self.config = config or LaserConfig()
        self.freeze_to = freeze_to
        self.top = top
        self.fraction = fraction
        self.by = by
        self.result: LaserResult | None = None
        self.selection: Any = None
        self._split: Split | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **rest: Any
    ) -> None:
        trainer = _calling_trainer()
        _refuse(trainer, args, model)
        if self.when == "init":
            self._laser(trainer, model)
        if self.freeze_to is not None:
            with undisturbed():
                self.selection = self._freeze(args, model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **rest: Any
    ) -> None:
        trainer = _calling_trainer()
        _refuse(trainer, args, model)
        if self.when == "before" and state.global_step > 0:
            logger.warning("resumed at step %d: the laser before training is not repeated.", state.global_step)
        elif self.when == "before":
            trainer.log(self._laser(trainer, model))
        elif self.when == "init" and self.result is not None:
            trainer.log(self._metrics(self.result))
        elif self.when == "after":
            self._check_what_training_would_be_lost_on(trainer, args, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **rest: Any
    ) -> None:
        if self.when == "after":
            trainer = _calling_trainer()
            trainer.log(self._laser(trainer, model))
            if self.result is not None:
                written = self.result.save(_output(args), overwrite=True)
                logger.info("the lasered model is in %s", written)

    def _check_what_training_would_be_lost_on(self, trainer: Any, args: TrainingArguments, model: Any) -> None:
        """Raise now what would otherwise be raised after hours of training."""
        unwrapped = trainer.accelerator.unwrap_model(model)
        if self.config.save == "factored":
            _weights(unwrapped).keep_factors()
        if self.config.rank_by == "gradient":
            check_predictable(_weights(unwrapped))
        with undisturbed():
            self._split = read_pairs(self._rows(trainer), self.config)
            check_output(_output(args), overwrite=True, inputs=(model_name(unwrapped),))
            check_rulers(self.config)
            rulers, scorers = Rulers(unwrapped, trainer.processing_class, self.config), self.config.scorers
            if "perplexity" in scorers:
                rulers.windows()
            for pair in self._split.pairs if scorers & {"semantic", "margin"} else ():
                rulers.prompter.tokens(pair.messages)
            if "semantic" in scorers and self.config.embedder != "self":
                SentenceEmbedder(self.config.embedder, torch.device("cpu"), allow_pickle=self.config.allow_pickle)

    def _laser(self, trainer: Any, model: Any) -> dict[str, float]:
        started = time.monotonic()
        unwrapped = trainer.accelerator.unwrap_model(model)
        with undisturbed():
            self.result = laser_weights(
                _weights(unwrapped),
                trainer.processing_class,
                self._split or read_pairs(self._rows(trainer), self.config),
                config=self.config,
                name=model_name(unwrapped),
                progress=_LoggedProgress(),
            )
        self._seconds = round(time.monotonic() - started, 3)
        return self._metrics(self.result)

    def _metrics(self, result: LaserResult) -> dict[str, float]:
        found = result.search
        last = {each.matrix: each.rank for each in found.kept}
        metrics = {
            "laser/score_before": found.baseline.mean,
            "laser/score_after": found.final.mean,
            "laser/matrices_tried": len({each.candidate.matrix for each in found.trials}),
            "laser/matrices_kept": len(last),
            "laser/rank_removed": sum(min(matrix.shape) - rank for matrix, rank in last.items()),
            "laser/seconds": self._seconds,
        }
        if result.held_out is not None:
            metrics["laser/held_out_difference"] = result.held_out.difference
            metrics["laser/held_out_low"], metrics["laser/held_out_high"] = result.held_out.interval
        return metrics

    def _rows(self, trainer: Any) -> Pairs | None:
        if self.pairs is not None:
            return self.pairs
        for name in ("eval_dataset", "train_dataset"):
            dataset: Any = getattr(trainer, name, None)
            if {"chosen", "rejected"} <= set(getattr(dataset, "column_names", None) or ()):
                return _without_end(dataset, trainer.processing_class.eos_token)
        if not self.config.needs_pairs:
            return None
        raise PairsError(
            "no preference pairs were given, and the trainer's data sets have no text to read them from. Pass pairs=..."
        )

    def _freeze(self, args: TrainingArguments, model: Any) -> Any:
        if hasattr(model, "peft_config"):
            raise ModelError(
                "freeze_to is for full fine-tuning, and this model has adapters. Give PEFT the LoraConfig of "
                "splaser_plugin.integrations.peft.lora_config instead."
            )
        scan = scan_model(Weights(model), config=self.config, name=getattr(model.config, "_name_or_path", ""))
        selection = choose(scan, top=self.top, fraction=self.fraction, by=self.by)
        freeze_all_but(model, selection.names)
        checkpointing: Any = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and checkpointing.get("use_reentrant", True):
            model.enable_input_require_grads()
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        total = sum(each.numel() for each in model.parameters())
        logger.info(
            "training %d matrices, %d of %d parameters: %s", len(selection.names), trained, total, selection.rule
        )
        return selection


class _LoggedProgress(Progress):
    def fact(self, label: str, value: str) -> None:
        if is_main():
            logger.info("laser: %s: %s", label, value)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Afterwards all random states of this process are as before."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _without_end(rows: Iterable[Mapping[str, Any]], end: str | None) -> Iterator[dict[str, Any]]:
    """Rows without the end token that TRL writes after each answer."""
    for row in rows:
        yield {
            key: value.removesuffix(end) if end and key in ("chosen", "rejected") and isinstance(value, str) else value
            for key, value in row.items()
        }


def _calling_trainer() -> Any:
    """The trainer whose event this is: it hands itself to no callback, so it is looked up among the callers."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise ConfigError("LaserCallback is called by a transformers Trainer, and only by one.")


def _output(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir)) / "lasered"


def _weights(model: Any) -> Weights:
    if not hasattr(model, "peft_config"):
        return Weights(model)
    from splaser_plugin.weights.adapted import MergedWeights

    return MergedWeights(model)


def _refuse(trainer: Any, args: TrainingArguments, model: Any) -> None:
    """Raise ModelError for what can't be lasered inside this trainer."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if args.deepspeed is not None or trainer.is_deepspeed_enabled:
        raise ModelError(f"DeepSpeed keeps its own fp32 copies of the weights, which would undo the change. {OFFLINE}")
    is_fsdp1 = trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2
    if is_fsdp1 or any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(f"FSDP version 1 flattens the weights. Use FSDP version 2 (fsdp_version: 2). {OFFLINE}")
    _weights(trainer.accelerator.unwrap_model(model)).check_dense()

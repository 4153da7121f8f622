"""A callback for Hugging Face's Trainer and everything built on it: laser, or choose what to train."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from splaser_plugin.artifacts.trackers import answers, curve
from splaser_plugin.checkpoints.roles import has_adapters, shape_of
from splaser_plugin.config.stages import AFTER_PROMPTS, LaserConfig, Measure, SelectConfig
from splaser_plugin.data.pairs import PairSet
from splaser_plugin.data.split import Split
from splaser_plugin.errors import ConfigError, ModelError
from splaser_plugin.files.output import check_output
from splaser_plugin.integrations.colocated import find_llm, lent
from splaser_plugin.integrations.freeze import check_without_adapters, freeze_all_but, head_of
from splaser_plugin.integrations.training import (
    TRAINER,
    Training,
    check_saves,
    check_sharding,
    undisturbed,
    warn_of_reference,
)
from splaser_plugin.jobs.cost import check_rooms
from splaser_plugin.jobs.importance import importances
from splaser_plugin.jobs.laser import LaserResult, laser_weights, read_pairs
from splaser_plugin.jobs.materials import materials
from splaser_plugin.jobs.stages import begin, scan_of_these_weights
from splaser_plugin.scanning.measures import MEASURED
from splaser_plugin.scanning.scan import Scan, scan_source
from splaser_plugin.scanning.selection import Selection, choose
from splaser_plugin.scoring.embedding import SentenceEmbedder
from splaser_plugin.scoring.scorers import Scorers, check_scorers
from splaser_plugin.scoring.semantic import directions
from splaser_plugin.weights.adapted import BaseWeights, restore_base, weights_of
from splaser_plugin.weights.in_memory import Weights, check_generates, model_name
from splaser_plugin.weights.loading import context_length

logger = logging.getLogger(__name__)

When: TypeAlias = Literal["before", "init", "after"]
WHEN: tuple[When, ...] = get_args(When)
LASERED, BASE = "lasered", "lasered_base"
"""Folders of the output: the model lasered after training, and the lasered base that an adapter was trained on."""
NOT_AT_INIT = (
    "the model that is trained isn't the one that the callback saw while the trainer was made: model_init made a new "
    "one, or the callback was added later."
)
FREEZE_THERE = (
    "Freeze in model_init, by splaser_plugin.freeze_all_but(model, names); or, without model_init, "
    f"give the callback to the trainer's callbacks=, or use {TRAINER}."
)

_LASERING: weakref.WeakKeyDictionary[Any, dict[str, tuple[weakref.ref[LaserCallback], weakref.ref[TrainerState]]]] = (
    weakref.WeakKeyDictionary()
)
"""Which callback lasers a model before its training, and which after it, and in which training that was."""

Pairs = str | Path | PairSet | Iterable[Mapping[str, Any]]


class LaserCallback(TrainerCallback):
    """Lasers the trainer's model, freezes all but its matrices of highest SNR, or both.

    `result` is the last `LaserResult`, and `selection` what is trained under `freeze_to`.

    Args:
        when: `after` training (the last thing, also written to `<output_dir>/lasered`), `before` it (in place, on the
            first run only), `init` (while the trainer is made, before optimizer and wrapping), or None.
        pairs: See `splaser_plugin.laser`; without them the trainer's evaluation or training data are read.
        config: Options of the laser run; its device and dtype are the trainer's. `fisher` and `gradient` are measured
            on its text, and `random` has its seed. With `engine` auto or vllm a vLLM that the trainer runs in its own
            process (TRL's colocate mode; needs `trainer`) writes the answers.
        freeze_to: `top` trains only the matrices that are best of each module type; see `SelectConfig`.
        top: How many those are.
        fraction: What share of each type they are, instead.
        by: What they are best by.
        trainer: The trainer itself, for `trainer.add_callback(LaserCallback(trainer=trainer))`. Pairs are then read
            from its evaluation data too, metrics go to each of its reporters, and what belongs to `init` is done at
            once. Without it, as in `callbacks=[LaserCallback()]`, the callback has what an event hands over: the data
            that is trained on, and the history of metrics.

    Raises:
        ConfigError: Options don't fit together.
        ModelError: The model can't be lasered in place; at the start of training.
    """

    def __init__(
        self,
        *,
        when: When | None = "after",
        pairs: Pairs | None = None,
        config: LaserConfig | None = None,
        freeze_to: Literal["top"] | None = None,
        top: int | None = None,
        fraction: float | None = None,
        by: Measure = "snr_ratio",
        trainer: Trainer | None = None,
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
        if config is not None and config.engine == "vllm" and not config.engine_url and trainer is None:
            raise ConfigError(f"engine: vllm is the trainer's own here. Use {TRAINER}, engine_url, or transformers.")
        if config is not None and config.adapter:
            raise ConfigError("adapter: the trainer's model has its own. Leave it out; train from a merged model.")
        if config is not None and config.scan and when == "after":
            raise ConfigError("scan: training changes the weights that it is of. Leave it out.")
        self.when = when
        self.pairs = pairs
        self.config = config or LaserConfig()
        self.freeze_to = freeze_to
        text = self.config.text if by in MEASURED else ""
        self._select = SelectConfig(top=top, fraction=fraction, by=by, text=text, seed=self.config.seed)
        self.trainer = trainer
        self.result: LaserResult | None = None
        self.selection: Selection | None = None
        self._split: Split | None = None
        self._seconds = 0.0
        self._prepared: weakref.ref[Any] | None = None
        if trainer is not None:
            self._at_init(Training.of_trainer(trainer))

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        self._at_init(self._training(args, state, event))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        training = self._training(args, state, event)
        self._check(training)
        self._refuse_another(training)
        self._move(first=True)
        is_prepared = self._prepared is not None and self._prepared() is training.model
        if self.trainer is None and args.report_to and self.when is not None:
            logger.warning(
                "the laser's metrics go to the state's log_history; %s sends them to %s too.",
                TRAINER,
                ", ".join(args.report_to),
            )
        if self.freeze_to is not None and not is_prepared:
            raise ModelError(f"freeze_to: {NOT_AT_INIT} {FREEZE_THERE}")
        if self.when == "before" and state.global_step > 0:
            self._resume(training)
        elif self.when == "after":
            self._check_what_training_would_be_lost_on(training)
        elif self.when is not None:
            if not is_prepared and self.when == "init":
                logger.warning("%s It is lasered now, as with when='before'.", NOT_AT_INIT)
            result = self.result if is_prepared and self.result else self._laser(training)
            self._report(training, result)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        self._move(first=False)
        training = self._training(args, state, event)
        is_adapted = has_adapters(training.model)
        if self.when == "before":
            self._prepared = None
        if self.when in ("before", "init") and is_adapted:
            training.progress.result("base of the adapter", str(training.folder(BASE)))
        if self.when != "after":
            return
        if state.is_hyper_param_search and state.global_step < state.max_steps and not control.should_training_stop:
            logger.warning("this trial was pruned at step %d, so it isn't lasered.", state.global_step)
            return
        result = self._laser(training)
        training.progress.result("lasered model", str(result.save(training.folder(LASERED), overwrite=True)))
        if is_adapted:
            training.progress.result("adapter", "save_model() and checkpoints hold it as trained, without the laser")
        self._report(training, result)
        if state.is_world_process_zero:
            state.save_to_json(str(Path(str(args.output_dir)) / "trainer_state.json"))

    def _training(self, args: TrainingArguments, state: TrainerState, event: Mapping[str, Any]) -> Training:
        return Training.of_trainer(self.trainer) if self.trainer is not None else Training.of_event(args, state, event)

    def _move(self, *, first: bool) -> None:
        """Before the trainer's reporters, some of which close their run at the end of training; or after them, as a
        run is opened where training begins. Without the trainer nothing moves.
        """
        if self.trainer is None:
            return
        handler = self.trainer.callback_handler
        others = [callback for callback in handler.callbacks if callback is not self]
        handler.callbacks = [self, *others] if first else [*others, self]

    def _check(self, training: Training) -> None:
        check_sharding(training.model)
        if self.when is not None:
            check_generates(training.model)
        with undisturbed():
            weights_of(training.model).check_dense()

    def _at_init(self, training: Training) -> None:
        self._check(training)
        self._refuse_another(training)
        if training.remakes_model:
            if self.freeze_to is not None:
                raise ModelError(f"freeze_to: model_init makes a new model as training begins. {FREEZE_THERE}")
            return
        if self.when == "init":
            warn_of_reference(training)
            self._laser(training)
        if self.freeze_to is not None:
            with undisturbed():
                self.selection = self._freeze(training)
            self._prepared = weakref.ref(training.model)

    @property
    def _end(self) -> str:
        """The end of training at which it lasers."""
        return "after" if self.when == "after" else "before"

    def _refuse_another(self, training: Training) -> None:
        """Raise ConfigError where another callback of this training lasers at the same end of it as this one does.

        The trainer knows its callbacks. Without it each claims the model as the trainer is made and as training begins.
        """
        if self.when is None:
            return
        said = f"two LaserCallbacks would laser this model {self._end} training. Leave one out."
        if self.trainer is not None:
            others = [other for other in self.trainer.callback_handler.callbacks if isinstance(other, LaserCallback)]
            if any(other is not self and other.when and other._end == self._end for other in others):
                raise ConfigError(said)
            return
        claims = _LASERING.setdefault(training.model, {})
        if self._end in claims:
            claimed_by, claimed_in = claims[self._end]
            other = claimed_by()
            if other is not None and other is not self and claimed_in() is training.state:
                has_changed = other.result is not None and not other.result.is_unchanged
                raise ConfigError(said + " The first has changed the model: load it anew." * has_changed)
        claims[self._end] = weakref.ref(self), weakref.ref(training.state)

    def _check_what_training_would_be_lost_on(self, training: Training) -> None:
        """Raise now what would otherwise be raised after hours of training."""
        model = training.model
        check_saves(model)
        with undisturbed():
            run = begin(weights_of(model), training.tokenizer, name=model_name(model), config=self.config)
            self._split = self._read_pairs(training)
            check_output(training.folder(LASERED), overwrite=True, inputs=(model_name(model),))
            check_rooms(run, training.folder(LASERED))
            check_scorers(self.config)
            everything = (*self._split.search, *self._split.held_out)
            llm, used = find_llm(self.trainer, self.config), self.config.scorers
            scorers = Scorers(model, training.tokenizer, self.config, pairs=everything, llm=llm)
            materials(self._split, scorers, self.config)
            for pair in everything if self.config.reads_prompts else ():
                scorers.prompter.tokens(pair.messages, before_answer=bool(used & AFTER_PROMPTS))
            if "semantic" in used and self.config.engine != "auto":
                training.progress.detail("engine", scorers.engine)
            if "semantic" in used and self.config.embedder != "self":
                embedder = SentenceEmbedder(
                    self.config.embedder, torch.device("cpu"), allow_pickle=self.config.allow_pickle
                )
                if warning := directions(embedder, everything)[1].warning:
                    training.progress.result("warning", warning)

    def _read_pairs(self, training: Training) -> Split:
        tokenizer, context = training.tokenizer, context_length(training.model)
        is_given = self.pairs is not None or not self.config.needs_pairs
        return read_pairs(self.pairs if is_given else training.pairs(), self.config, tokenizer, context)

    def _laser(self, training: Training) -> LaserResult:
        """Laser the model, and save the base that its adapters are to be trained on."""
        started = time.monotonic()
        keeps_base = self.when != "after" and has_adapters(training.model)
        if keeps_base:
            check_saves(training.model)
            check_output(training.folder(BASE), overwrite=True, inputs=(model_name(training.model),))
        with undisturbed(), lent(self.trainer, training.model, self.config) as llm:
            self.result = laser_weights(
                weights_of(training.model),
                training.tokenizer,
                self._split or self._read_pairs(training),
                config=self.config,
                name=model_name(training.model),
                progress=training.progress,
                llm=llm,
            )
        self._seconds = round(time.monotonic() - started, 3)
        self._prepared = weakref.ref(training.model)
        if keeps_base:
            replace(self.result, weights=BaseWeights(training.model)).save(training.folder(BASE), overwrite=True)
        return self.result

    def _resume(self, training: Training) -> None:
        """The checkpoint has what was trained: under full fine-tuning the lasered weights, else adapters alone."""
        logger.warning("resumed at step %d: the laser before training is not repeated.", training.state.global_step)
        if has_adapters(training.model):
            with undisturbed():
                restore_base(training.model, training.folder(BASE))
            training.progress.result("base of the adapter", f"restored from {training.folder(BASE)}")

    def _report(self, training: Training, result: LaserResult) -> None:
        record = result.record
        training.log_curve(curve(record))
        training.log(self._metrics(result))
        training.log_answers(answers(record))

    def _metrics(self, result: LaserResult) -> dict[str, float]:
        found = result.search
        last, tried = found.ranks, {trial.candidate.matrix for trial in found.trials}
        tried.update(matrix for budget in found.budgets for matrix in budget.budget.ranks)
        metrics = {
            "laser/score_before": found.baseline.mean,
            "laser/score_after": found.final.mean,
            "laser/matrices_tried": len(tried),
            "laser/matrices_kept": len(last),
            "laser/rank_removed": sum(min(matrix.shape) - rank for matrix, rank in last.items()),
            "laser/seconds": self._seconds,
        }
        if result.held_out is not None:
            metrics["laser/held_out_difference"] = result.held_out.difference
            metrics["laser/held_out_low"], metrics["laser/held_out_high"] = result.held_out.interval
        return metrics

    def _scan(self, weights: Weights) -> Scan:
        """A new scan, or the given one of these weights: lasered ones are others."""
        config = self.config
        if not config.scan or self.when == "init":
            return scan_source(weights, config=config, name=getattr(weights.model.config, "_name_or_path", ""))
        matrices, _ = weights.matrices(config.include, config.exclude, config.towers)
        return scan_of_these_weights(config, matrices, weights.identity())

    def _freeze(self, training: Training) -> Any:
        args, model, select = training.args, training.model, self._select
        check_without_adapters(model)
        head = head_of(model)
        scan = self._scan(Weights(model))
        values = None
        if select.by in MEASURED:
            values = importances(model, training.tokenizer, by=select.by, text=select.text, progress=training.progress)
        selection = choose(scan, select, importances=values)
        freeze_all_but(model, selection.names)
        for parameter in head:
            parameter.requires_grad_(True)
        checkpointing: Any = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and checkpointing.get("use_reentrant", True):
            model.enable_input_require_grads()
        trained = sum(math.prod(shape_of(weight)) for weight in model.parameters() if weight.requires_grad)
        total = sum(math.prod(shape_of(weight)) for weight in model.parameters())
        logger.info(
            "training %d matrices, %d of %d parameters: %s", len(selection.names), trained, total, selection.rule
        )
        return selection

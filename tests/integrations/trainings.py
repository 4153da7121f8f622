"""Short trainings of the tiny model, on the CPU."""

from __future__ import annotations

from transformers import TrainerCallback, TrainingArguments

from splaser_plugin import LaserConfig
from tests.builders import states

CONFIG = LaserConfig(embedder="self", max_new_tokens=6, candidates=4, edge="mp")
SHORT = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Arguments of a training of two steps, of any trainer."""


def training_arguments(folder, **changes):
    """Those of transformers' own trainer."""
    return TrainingArguments(**{"output_dir": str(folder), "seed": 5, **SHORT, **changes})


class Logs(TrainerCallback):
    """A reporter: keeps what the trainer sends to its reporters."""

    def __init__(self):
        self.seen = {}

    def on_log(self, args, state, control, logs=None, **rest):
        self.seen.update(logs)


class AtFirstStep(TrainerCallback):
    """Keeps the weights with which the first step begins."""

    def on_step_begin(self, args, state, control, model=None, **rest):
        if not state.global_step:
            self.weights = states(model)


def steps_of(callback):
    """The parameters that the callback reduced."""
    return {step.name + ".weight" for step in callback.result.recipe.steps}

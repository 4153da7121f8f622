"""What the stages of a laser run work on, and what they measure with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.data.split import Split
from splaser_plugin.progress import Progress
from splaser_plugin.reduction.calibration import Row
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.scoring.scorers import Material
from splaser_plugin.scoring.scores import Scorer
from splaser_plugin.search.guard import Guard
from splaser_plugin.search.journal import Journal
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix


@dataclass(frozen=True)
class Run:
    """What every stage of one run works on and with."""

    weights: Weights
    tokenizer: Any
    name: str
    """How the model is called."""
    config: LaserConfig
    matrices: tuple[Matrix, ...]
    """Of the model, in its order: those that the run may reduce."""
    journal: Journal
    progress: Progress
    llm: Any = None
    """A `vllm.LLM` of this process that may write the answers; None for none."""
    began: float = field(default_factory=time.monotonic)

    @property
    def dtype(self) -> str:
        return self.weights.dtype


@dataclass(frozen=True)
class Measures:
    """What a run measures with, and on what."""

    split: Split
    searched: Material
    unseen: Material | None
    """What is held out; None for nothing."""
    scorer: Scorer
    held_out: Scorer | None
    guards: tuple[Guard, ...]
    predictor: MarginScorer | None
    """Of the margin whose gradient orders the candidates."""
    text: Scorer | None
    """Of the windows that have a say beside the scorer; None where there are none."""
    held_out_text: Scorer | None
    calibration: tuple[Row, ...]
    """What a reduction is measured on; nothing for `svd`."""
